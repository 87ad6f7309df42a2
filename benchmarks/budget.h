// How the time of a run is divided among models and workloads.
#pragma once

#include "arguments.h"
#include "model_files.h"
#include "token_file.h"

namespace llmcache::bench {

/// How much of the time a model gets on a workload, in proportion to the others. Without a quality
/// that can be measured (random weights, no task, classes but no probe) 0.5: a few requests tell the
/// speed. With one 1; where log-likelihoods are scored 2, since reuse comes only with the requests behind the first
/// ones; duplicates 2, since their first texts fill the caches before. Classes with a probe 12: thousands of training
/// queries fill them, and those are the rows that say what similarity costs. `probe`: there is one for this model and
/// workload.
double cell_weight(const ModelFile& model, const TokenFile& tokens, bool probe);

/// Seconds for a weight of 1, where all cells together weigh `weights`; infinite with --limit.
double share_seconds(const Arguments& arguments, double weights);

}  // namespace llmcache::bench
