// Layer Execution Manager (LLMCache, arXiv 2512.16843): runs a Plan on a Model.
#pragma once

#include <memory>
#include <vector>

#include "execute/batch.h"
#include "execute/donor_states.h"
#include "execute/engine_hook.h"
#include "llmcache/execute/sequence_state.h"
#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"
#include "llmcache/report.h"

namespace llmcache {

/// Runs the model as it is: [batch, tokens, hidden], padding included. Fills execution and times of
/// `report`, not its sequences.
c10::IValue execute_dense(const Model& model, const Inputs& inputs, ForwardReport& report);

/// What a packed pass runs on: inputs as Model::embed() takes them, and of a checked batch what is known of it.
struct PassInputs {
  PassInputs(const Inputs& given) : inputs(given) {}  // NOLINT(google-explicit-constructor)
  /// The batch must outlive it.
  PassInputs(const Batch& checked)
      : inputs(checked.model_inputs()), batch(&checked) {}  // NOLINT(google-explicit-constructor)

  Inputs inputs;
  const Batch* batch = nullptr;  ///< null: it is not known
};

/// Tokens whose results are wanted, and where these stand in the result.
struct Selection {
  struct Span {
    std::int64_t begin = 0;   ///< first token, counted from the sequence's first real token
    std::int64_t tokens = 0;  ///< 0: none
    std::int64_t first = 0;   ///< position of its result in the row
  };
  /// Results that a sequence has in common with another one, whose span covers them.
  struct Copy {
    std::size_t to = 0, from = 0;  ///< sequences of the plan
    std::int64_t begin = 0;        ///< first token, counted from the other sequence's first real token
    std::int64_t tokens = 0;
    std::int64_t first = 0;  ///< position in the row of sequence `to`
  };
  std::int64_t padded_length = 0;  ///< of the result's rows
  std::vector<Span> spans;         ///< one a sequence of the plan
  std::vector<Copy> copies;
};

/// All tokens, in their places.
Selection select_all(const Plan& plan);

/// Runs `plan` on packed rows, with the results of `selection` only (which must be all tokens where the head is not
/// token-wise; where it chooses tokens, which must be real, these alone are read). The plan has been validated, the
/// model has a token level, and at least one token is real. `hook` supplies what the plan does not compute, and may
/// stop sequences: the result's entries for them are zero. Fills `report`. None if no token is selected, or all
/// sequences stopped.
c10::IValue execute_packed(const Model& model, const PassInputs& inputs, const Plan& plan, EngineHook& hook,
                           const Selection& selection, ForwardReport& report);

/// The same for all tokens, with states from `donors`. `capture`, if given, gets one state a sequence. `watcher`, if
/// given, watches the pass.
c10::IValue execute_packed(const Model& model, const PassInputs& inputs, const Plan& plan, const Donors& donors,
                           Donors* capture, ForwardReport& report, EngineHook* watcher = nullptr);

/// Counts of `plan` for a report.
std::vector<SequenceReport> count_tokens(const Plan& plan);

}  // namespace llmcache
