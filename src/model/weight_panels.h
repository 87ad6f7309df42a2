// Products with weights of 8 and 16 bits on CPUs for which LibTorch has none, or none that is right.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace llmcache {

/// A weight in panels of 16 outputs, as products read it: front to back. Const and thread-safe. Uses AVX2 where the CPU
/// has it. What becomes of a row depends on nothing but the row, bit for bit.
class WeightPanels {
 public:
  /// The most inputs of an int8 weight: sums of as many products of 127 and 127 fit into 32 bits.
  static constexpr std::int64_t kMostInt8Inputs = 133'000;

  /// `weight`: int8 (from -127 to 127), bfloat16 or half `[out, in]` of any strides, on the CPU.
  explicit WeightPanels(const at::Tensor& weight);

  /// float32 `[rows, out]`: rows x weight, transposed. `rows`: contiguous, int8 for an int8 weight, whose sums are made
  /// of whole numbers, and float32 for others, whose sums are float32. `scales`: float32 `[out]`, with which
  /// each output is multiplied at the end; undefined: none.
  [[nodiscard]] at::Tensor multiply(const at::Tensor& rows, const at::Tensor& scales = {}) const;

  /// True if the CPU has AVX2 and nothing wider, so that nothing else multiplies faster by more than a little.
  static bool suit_the_cpu() noexcept;

  [[nodiscard]] std::size_t bytes() const { return panels_.nbytes(); }

 private:
  at::Tensor panels_;
  std::int64_t out_;
  std::int64_t in_;  ///< with an int8 weight an even number: one more of zeros, if need be
};

}  // namespace llmcache
