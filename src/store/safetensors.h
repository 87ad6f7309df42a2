// Reads safetensors files that may be damaged: every length and offset is checked before it is used.
//
// A file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype, shape and
// place; texts in "__metadata__"), and the tensors, which must fill the rest exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache {

/// A parsed file. It refers to the bytes, which must live as long. What throws, throws DamagedData.
class Safetensors {
 public:
  static constexpr std::size_t kMostHeaderBytes = std::size_t{1} << 20;
  static constexpr std::size_t kMostDimensions = 8;

  struct Tensor {
    std::string dtype;                ///< "F32", "I64" and so on
    std::vector<std::int64_t> shape;  ///< its bytes follow from it: no product of it overflows
    std::string_view bytes;           ///< aligned to nothing
  };

  /// Throws if the header is damaged, or the tensors do not fill the data exactly.
  explicit Safetensors(std::string_view bytes);

  [[nodiscard]] const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  [[nodiscard]] bool has(const std::string& tensor) const { return tensors_.contains(tensor); }
  /// Throws if the tensor is missing or is of another type or number of dimensions.
  [[nodiscard]] const Tensor& tensor(const std::string& name, const std::string& dtype, std::size_t dimensions) const;

  /// The values of a tensor of `dimensions` dimensions, in order of memory, and its shape if `shape` is given. T: float
  /// (F32), std::int32_t (I32), std::int64_t (I64). Throws as tensor() does.
  template <class T>
  [[nodiscard]] std::vector<T> values(const std::string& tensor, std::size_t dimensions = 1,
                                      std::vector<std::int64_t>* shape = nullptr) const;

  /// Metadata; all of it is text. Throws if the key is missing or is not text.
  [[nodiscard]] std::string text(const std::string& key) const;
  /// The same, unset where the key is missing.
  [[nodiscard]] std::optional<std::string> optional_text(const std::string& key) const;
  /// Metadata that is a whole number of at most nine digits.
  [[nodiscard]] std::int64_t whole_number(const std::string& key) const;
  /// Metadata that is a JSON list of text.
  [[nodiscard]] std::vector<std::string> text_list(const std::string& key) const;

  /// Throws: this file is damaged, because of `what`.
  [[noreturn]] static void damaged(const std::string& what);

 private:
  void check_layout(std::string_view data) const;

  std::map<std::string, Tensor> tensors_;
  std::optional<std::map<std::string, std::optional<std::string>>> metadata_;  ///< values unset: not text
};

/// True if no value of an F32 tensor is NaN or infinite.
[[nodiscard]] bool all_finite(const Safetensors::Tensor& tensor);

}  // namespace llmcache
