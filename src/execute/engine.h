// Layer Execution Manager (LLMCache, arXiv 2512.16843): runs a Plan on a Model.
#pragma once

#include <memory>
#include <vector>

#include "execute/observer.h"
#include "llmcache/execute/sequence_state.h"
#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"
#include "llmcache/report.h"

namespace llmcache {

using Donors = std::vector<std::shared_ptr<const SequenceState>>;

/// Runs the model as it is: [batch, tokens, hidden], padding included. Fills execution and times of
/// `report`, not its sequences.
c10::IValue execute_dense(const Model& model, const Inputs& inputs, ForwardReport& report);

/// Runs `plan` on packed rows. The plan has been validated against inputs and donors, the model has
/// a token level, and at least one token is real. Fills `report`; `capture`, if given, gets one state
/// a sequence. `observer`, if given, may stop sequences: the result's entries for them are zero, and
/// the result is None if it stopped all.
c10::IValue execute_packed(const Model& model, const Inputs& inputs, const Plan& plan, const Donors& donors,
                           Donors* capture, ForwardReport& report, LayerObserver* observer = nullptr);

/// Counts of `plan` for a report.
std::vector<SequenceReport> count_tokens(const Plan& plan);

}  // namespace llmcache
