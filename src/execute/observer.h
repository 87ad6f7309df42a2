// Watching a packed pass between its layers, and taking sequences out of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "llmcache/model/token_level.h"

namespace llmcache {

/// Told how a packed pass goes on. Belongs to one pass; called by the thread that runs it. What it
/// throws ends the pass.
class LayerObserver {
 public:
  virtual ~LayerObserver() = default;

  /// True if at_layer() wants to see the states that enter layer l; l = L: the final states.
  [[nodiscard]] virtual bool watches(std::int32_t l) const = 0;

  /// `states[i]` is the hidden state `[1, tokens, hidden]` of sequence i of the plan, undefined if the
  /// sequence has stopped or not all its tokens are computed. A view: copy what is kept. Returns the
  /// sequences that stop here: no further layer, and not the head, is run for them.
  virtual std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) = 0;

  /// True if attended() wants to see the tensors that meet at the attention of layer l.
  [[nodiscard]] virtual bool watches_attention(std::int32_t /*l*/) const { return false; }
  virtual void attended(std::int32_t /*l*/, std::int64_t /*site*/, std::size_t /*sequence*/,
                        const SiteTensors& /*tensors*/) {}
};

}  // namespace llmcache
