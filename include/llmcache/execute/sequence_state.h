// What the layers computed for one sequence: the donor of a partial recomputation.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmcache {

/// Tensors of one sequence, on the model's device. Immutable once made; share it by
/// std::shared_ptr<const SequenceState>.
struct SequenceState {
  std::int64_t tokens = 0;
  /// hidden[l]: input of layer l; hidden[L]: the final state. `[1, tokens, hidden]`. A state that
  /// was not captured is undefined.
  std::vector<at::Tensor> hidden;
  /// keys[layer][attention_op]: the key-side tensors of that attention operator, over all tokens.
  std::vector<std::vector<std::vector<at::Tensor>>> keys;

  [[nodiscard]] std::size_t bytes() const;  ///< of all tensors
};

}  // namespace llmcache
