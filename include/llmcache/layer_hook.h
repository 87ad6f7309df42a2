// Seeing, changing and stopping what flows through a wrapped model between its layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace llmcache {

/// What a sequence does from a layer on.
enum class HookAction {
  kGoOn,
  kStop,  ///< no further layer, and not the head, is run for it: its entries in the result are zero
};

/// The hidden states of one sequence in front of a layer.
struct LayerStates {
  std::int64_t row = 0;    ///< of the batch
  std::int64_t layer = 0;  ///< that they enter, from 0; ModelProfile::layers: the final states
  /// `[tokens, hidden]`, one row for each real token of the sequence, in the model's type and on its device. A view,
  /// valid during the call: clone() what is kept. A hook that writes() may write to it in place, or put another tensor
  /// of the same sizes and type there.
  at::Tensor states;
};

/// A forward hook, as PyTorch has for modules that run in Python and not for loaded TorchScript modules.
///
/// Given to a cache (LayerCacheBase::add_hook()) it is called in every forward(), given to a request
/// (RequestOptions::hook) in that one. Hooks of the cache come first, in the order in which they were added.
///
/// A call with a hook neither looks anything up nor keeps anything, whatever its fidelity: every token runs through
/// every layer, padding left out, and what other calls have kept stays as it was. So a hook sees all states, and no
/// other request ever gets what a hook has changed. Such an answer is not compared with the plain module's either.
/// Where no hook is given nothing is done for any.
///
/// A call runs in one thread and calls its hooks one after another, layer by layer, row by row. Calls in several
/// threads call a hook of the cache at once: what it shares between calls is its own business. What it throws ends the
/// call and reaches the caller unchanged.
///
/// Needs a model of granularity tokens or packed rows, and a batch whose rows have no holes: forward() throws
/// Error(kNotAvailable) or Error(kInvalidInput) otherwise.
class LayerHook {
 public:
  virtual ~LayerHook() = default;

  /// True if at_layer() is to be called in front of this layer (0 to ModelProfile::layers). Called for each layer of a
  /// call, before at_layer(). Default: all.
  [[nodiscard]] virtual bool watches(std::int64_t /*layer*/) const { return true; }
  /// True if at_layer() may change states: the pass then works on a copy of them, a few percent of a layer's time.
  [[nodiscard]] virtual bool writes() const { return false; }
  virtual HookAction at_layer(LayerStates& at) = 0;
};

}  // namespace llmcache
