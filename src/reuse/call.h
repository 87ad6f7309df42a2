// One request on its way through the chain of reuse strategies.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "execute/batch.h"
#include "llmcache/layer_hook.h"
#include "llmcache/options.h"
#include "model/wrapped_model.h"
#include "reuse/running_calls.h"

namespace llmcache {

/// Made once for a request, and read by all strategies. Its rows' keys are made from Batch::on_host.
struct Call {
  const WrappedModel& wrapped;
  const Batch batch;  ///< checked
  const RequestOptions& request;
  const Fidelity fidelity;
  std::uint64_t first_number = 0;  ///< of its first row; rows are numbered in the order of the calls
  std::uint64_t epoch = 0;         ///< of the weights and banks; what belongs to an earlier one is not kept
  std::uint64_t dropped = 0;       ///< another number after each erasure of a tenant too
  bool packable = false;           ///< its real tokens can be run without the padding between them
  /// A strategy that serves it computes only the tokens that request.output names. Whole outputs are not made then, so
  /// that there are none to keep and none to find.
  bool cuts_output = false;
  const RunningCalls::Entry* running = nullptr;  ///< tells if its tenant was erased meanwhile; null: it is not asked
  std::vector<std::shared_ptr<LayerHook>> hooks = {};  ///< with any, nothing is looked up and nothing kept
};

}  // namespace llmcache
