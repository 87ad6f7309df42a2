// What keeps a layer of 8 bits near the layer as it was: which of its inputs are multiplied in float32, and how the
// others are scaled before they are rounded.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace llmcache {

/// Found from a sample of requests, and fixed from then on: what is chosen for each batch would let rows change each
/// other.
struct Int8Recipe {
  /// On the CPU: float32 `[in]`, powers of two: inputs are divided by it, and the columns of the weight multiplied. It
  /// lies near the root of an input's peak over its column's (SmoothQuant, arXiv 2211.10438, alpha 0.5), so that
  /// neither decides alone how coarsely a row is rounded.
  at::Tensor smoothing;
  /// On the CPU: int64, ascending: the inputs that are the largest. They stay in float32 (LLM.int8(), arXiv
  /// 2208.07339).
  at::Tensor outliers;
};

/// The recipe of a weight `[out, in]` of finite values. `peaks`: float32 `[in]`, the largest magnitude of each input in
/// a sample. Layers of fewer than 32 inputs have no outliers, those of fewer than 128 have 8, others 32.
Int8Recipe int8_recipe(const at::Tensor& weight, const at::Tensor& peaks);

}  // namespace llmcache
