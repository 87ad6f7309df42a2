// Reads safetensors files that may be damaged: every length and offset is checked before it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace llmcache::bench {

/// A parsed file. Tensors are copied out of the bytes, which must live as long as this object.
class Safetensors {
 public:
  /// `name` and `kind` ("token file", "probe file") are for messages. Throws Failure if the header
  /// is damaged, or the tensors do not fill the data exactly.
  Safetensors(std::string_view bytes, std::string name, std::string kind);

  [[nodiscard]] bool has(const std::string& tensor) const { return tensors_.contains(tensor); }

  /// The values of a tensor of `dimensions` dimensions, in order of memory, and its shape if `shape`
  /// is given. T: float (F32), std::int32_t (I32), std::int64_t (I64). Throws Failure if the tensor
  /// is missing or is of another type.
  template <class T>
  [[nodiscard]] std::vector<T> values(const std::string& tensor, std::size_t dimensions = 1,
                                      std::vector<std::int64_t>* shape = nullptr) const;

  /// Metadata; all of it is text. Throws Failure if the key is missing or is not text.
  [[nodiscard]] std::string text(const std::string& key) const;
  /// The same, unset where the key is missing.
  [[nodiscard]] std::optional<std::string> optional_text(const std::string& key) const;
  /// Metadata that is a whole number of at most nine digits.
  [[nodiscard]] std::int64_t whole_number(const std::string& key) const;
  /// Metadata that is a JSON list of text.
  [[nodiscard]] std::vector<std::string> text_list(const std::string& key) const;

  /// Throws Failure: this file is damaged, because of `what`.
  [[noreturn]] void damaged(const std::string& what) const;

 private:
  struct View {
    std::string dtype;
    std::vector<std::uint64_t> shape;
    std::uint64_t begin = 0;  ///< in data_
    std::uint64_t end = 0;
  };
  void check_layout() const;
  [[nodiscard]] const View& view(const std::string& tensor, const std::string& dtype, std::size_t dimensions) const;

  std::string name_;
  std::string kind_;
  std::string_view data_;
  std::map<std::string, View> tensors_;
  std::map<std::string, std::optional<std::string>> metadata_;  ///< unset: not text
};

/// All bytes of a file. Throws Failure if it cannot be read or is larger than 1 GiB.
std::string read_file(const std::filesystem::path& path, const std::string& kind);

}  // namespace llmcache::bench
