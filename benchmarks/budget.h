// How the time of a run is divided among models and workloads.
#pragma once

#include "arguments.h"
#include "model_files.h"
#include "token_file.h"

namespace llmcache::bench {

/// How much more time a model gets on a workload than one without a task to measure, which gets 1: 2
/// with one, since more settings run there, and 6 where the caches have to be filled before.
/// A model with random weights has no task to measure.
double cell_weight(const ModelFile& model, const TokenFile& tokens);

/// Seconds for a weight of 1, where all cells together weigh `weights`; infinite with --limit.
double share_seconds(const Arguments& arguments, double weights);

}  // namespace llmcache::bench
