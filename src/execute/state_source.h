// Where a packed pass takes the states from that it does not compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "llmcache/match/plan.h"
#include "llmcache/model/token_level.h"

namespace llmcache {

/// What a sequence of a pass does from some layer on.
enum class Course {
  kGoOn,
  kWiden,  ///< all its tokens run
  kStop,   ///< no further layer, and not the head, is run for it
};

/// Belongs to one pass; called by the thread that runs it. Sequences are numbered as the plan's. What it throws ends
/// the pass.
class StateSource {
 public:
  virtual ~StateSource() = default;

  /// The keys of all tokens of a sequence at an attention site, in order. `fresh`: those of its active tokens, one
  /// tensor a key-side input, valid for this call and until the site has been attended. Called for all sequences with
  /// active tokens before the first of them is attended: what one writes another may read.
  virtual std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t site,
                                       std::vector<at::Tensor> fresh) = 0;

  /// True if embedded() and before_layer() are to be called.
  [[nodiscard]] virtual bool steers() const { return false; }
  /// The embedded states of the sequence's tokens that run from layer 0 on, `[1, active, hidden]`, to be changed in
  /// place.
  virtual void embedded(std::size_t /*sequence*/, at::Tensor /*rows*/) {}
  /// Asked before layer l > 0; `active`: the states of the tokens that ran through the layer before, `[1, active,
  /// hidden]`. After kWiden, and where the plan has tokens that first run in l, entering() is asked for the others.
  virtual Course before_layer(std::size_t /*sequence*/, std::int32_t /*layer*/, const at::Tensor& /*active*/) {
    return Course::kGoOn;
  }

  /// The hidden state that enters `layer` of tokens that first run there, from other layers than the pass computed:
  /// `[1, end - begin, hidden]`.
  virtual at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) = 0;

  /// Told the final states of the tokens that ran through the last layer, `[1, active, hidden]`.
  virtual void finished(std::size_t sequence, const at::Tensor& fresh) = 0;
  /// The final states of tokens [begin, end), `[1, end - begin, hidden]`, active or not. Asked after all finished().
  virtual at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) = 0;

  /// The layer, above 0 and with an attention site, by whose keys the source chooses which tokens go on; -1: none. The
  /// model must be self-contained.
  [[nodiscard]] virtual std::int32_t choosing_layer() const { return -1; }
  /// Shown the keys that a sequence's active tokens have at the first site of that layer, before any token runs through
  /// it. Returns the ranges by which the sequence goes on, which must say the same as the plan's about the layers
  /// before.
  virtual std::vector<TokenRange> choose(std::size_t /*sequence*/, const std::vector<at::Tensor>& /*fresh*/) {
    return {};
  }
};

}  // namespace llmcache
