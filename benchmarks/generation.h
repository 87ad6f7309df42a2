// Text generation: each variant continues prompts and conversations greedily, token by token.
#pragma once

#include <vector>

#include "cell.h"

namespace llmcache::bench {

/// Measures a workload of task generation; one record for each setting. Throws Failure, or what the model throws.
///
/// A request is a conversation of one turn or more. In each turn the model gets everything said so far (prefill) and
/// says tokens until it has said `new_tokens`, or the file's stop token, which is not part of what was said. All
/// variants run a turn one after the other, then the next turn; each goes on with what it said itself. nocache, whose
/// every token takes a pass over the whole sequence, stops within a turn once it has had its share of the time budget:
/// the steps it lacks count with the mean time of those it made, and it goes on with what another variant said.
///
/// What the others say is compared with nocache's own tokens, and where it has said none with those that come out on
/// top in a pass of the plain model over the whole sequence: in a causal model a token's logits do not depend on what
/// is behind it. The comparison of a turn ends at the first difference.
std::vector<Record> run_generation(const CellContext& context);

}  // namespace llmcache::bench
