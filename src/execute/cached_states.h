// What a cache holds of one sequence, as a pass reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>

namespace llmcache {

/// States of one sequence. Tensors have the token as their first dimension, and the model's type and device; they are
/// read only. Const members may be called from many threads at once.
class CachedStates {
 public:
  virtual ~CachedStates() = default;

  [[nodiscard]] virtual std::int64_t tokens() const = 0;
  /// Key-side tensor number `input` of an attention operator, its token dimension moved to the front.
  [[nodiscard]] virtual at::Tensor keys(std::int32_t layer, std::int64_t attention_op, std::size_t input) const = 0;
  /// The states that enter `layer`, `[tokens, hidden]`; 0: the embedding's output, the number of layers: the final
  /// states. Undefined if they were not kept; these two always are.
  [[nodiscard]] virtual at::Tensor hidden(std::int32_t layer) const = 0;
};

}  // namespace llmcache
