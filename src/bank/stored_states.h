// States of tokens as a bank holds them: in its format, to be copied out, token by token, straight to where they are
// used.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "llmcache/bank/format.h"

namespace llmcache {

/// A tensor of states over a number of tokens, such as keys [batch, heads, tokens, head width] or hidden states
/// [batch, tokens, hidden], on the device of the model. Scales of kInt8 belong to groups of the last dimension, which
/// is never the one of the tokens.
///
/// A copy shares the tensors of the original. const members are safe from any thread; write() needs that nobody reads
/// or writes the same tokens.
///
/// On the CPU, float32 states go through loops of their own in one thread (group_kernels.h), all else through ATen.
/// Errors: Error(kInvalidInput) for tensors that do not fit, Error(kInvalidOptions) for token_dim and group.
class StoredStates {
 public:
  static constexpr std::int64_t kGroup = 32;

  StoredStates() = default;  ///< of no tokens; only to be assigned to

  /// Room for sizes[token_dim] tokens, to be filled by write(). `options`: type and device of the model's states.
  static StoredStates empty(at::IntArrayRef sizes, std::int64_t token_dim, const at::TensorOptions& options,
                            BankFormat format, std::int64_t group = kGroup);
  static StoredStates encode(const at::Tensor& states, std::int64_t token_dim, BankFormat format,
                             std::int64_t group = kGroup);
  /// As values() and scales() were of states of these sizes; unset: they could not have been. Takes both.
  static std::optional<StoredStates> of(at::IntArrayRef sizes, std::int64_t token_dim, const at::TensorOptions& options,
                                        BankFormat format, at::Tensor values, at::Tensor scales,
                                        std::int64_t group = kGroup);
  /// True if nothing is lost of states that a model computes in this type.
  static bool lossless(at::ScalarType computed, BankFormat format) noexcept;
  /// What bytes() of empty() will be, to be reserved before.
  static std::size_t bytes_for(at::IntArrayRef sizes, const at::TensorOptions& options, BankFormat format,
                               std::int64_t group = kGroup);

  /// Tokens [begin, begin + states.size(token_dim)) become `states`.
  void write(std::int64_t begin, const at::Tensor& states);

  /// target = tokens [begin, begin + target.size(token_dim)), + shift if that is defined. The target may be any view of
  /// floating point whose last dimension is contiguous, the shift anything that broadcasts to it with one token, in
  /// float32: one correction of all tokens, added before rounding to the target's type.
  void copy_to(const at::Tensor& target, std::int64_t begin, const at::Tensor& shift = {}) const;
  /// All tokens, in the model's type.
  [[nodiscard]] at::Tensor decode() const;
  /// Tokens [begin, begin + count), in the model's type. Where they are held as they were computed a view of what is
  /// held: not to be written to.
  [[nodiscard]] at::Tensor rows(std::int64_t begin, std::int64_t count) const;

  [[nodiscard]] std::size_t bytes() const;  ///< that values and scales take on their device
  /// What is held, read only. Scales are undefined but for kInt8.
  [[nodiscard]] const at::Tensor& values() const noexcept { return values_; }
  [[nodiscard]] const at::Tensor& scales() const noexcept { return scales_; }
  [[nodiscard]] BankFormat format() const noexcept { return format_; }
  [[nodiscard]] at::IntArrayRef sizes() const { return values_.sizes(); }
  [[nodiscard]] std::int64_t token_dim() const noexcept { return token_dim_; }
  [[nodiscard]] std::int64_t tokens() const { return values_.size(token_dim_); }

  /// ||decode() - original|| / ||original||; 0 where nothing was lost.
  [[nodiscard]] double relative_error(const at::Tensor& original) const;

 private:
  [[nodiscard]] at::Tensor plain(std::int64_t begin, std::int64_t count) const;
  [[nodiscard]] bool copy_by_rows(const at::Tensor& target, std::int64_t begin, const at::Tensor& shift) const;
  void check_range(std::int64_t begin, const at::Tensor& other) const;

  BankFormat format_ = BankFormat::kAsComputed;
  at::ScalarType computed_ = at::kFloat;
  std::int64_t token_dim_ = 0;
  std::int64_t group_ = kGroup;
  at::Tensor values_;  ///< contiguous, of the sizes of the states
  at::Tensor scales_;  ///< kInt8: contiguous float32, the last dimension one for each group
};

namespace detail {

/// kInt8 by ATen, on any device: values of the sizes of `states`, and scales. The same numbers as quantise_row gives.
std::pair<at::Tensor, at::Tensor> quantise(const at::Tensor& states, std::int64_t group);
/// The inverse, in float32.
at::Tensor dequantise(const at::Tensor& values, const at::Tensor& scales, std::int64_t group);

}  // namespace detail
}  // namespace llmcache
