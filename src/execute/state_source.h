// Where a packed pass takes the states from that it does not compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "llmcache/model/token_level.h"

namespace llmcache {

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

  /// The hidden state that enters `layer` of tokens that first run there, from other layers than the pass computed:
  /// `[1, end - begin, hidden]`.
  virtual at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) = 0;

  /// Told the final states of the tokens that ran through the last layer, `[1, active, hidden]`.
  virtual void finished(std::size_t sequence, const at::Tensor& fresh) = 0;
  /// The final states of tokens [begin, end), `[1, end - begin, hidden]`, active or not. Asked after all finished().
  virtual at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) = 0;
};

}  // namespace llmcache
