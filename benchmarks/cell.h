// One model on one workload, in all settings side by side.
#pragma once

#include <vector>

#include "arguments.h"
#include "loaded_model.h"
#include "progress.h"
#include "records.h"
#include "token_file.h"

namespace llmcache::bench {

/// What a cell is made from; all of it must outlive run_cell().
struct CellContext {
  LoadedModel& model;
  const ModelFile& file;
  const TokenFile& tokens;
  const Arguments& arguments;
  double budget_seconds;  ///< filling and warm-up included; one request always runs
  Progress& progress;
};

/// Measures; one record for each setting. Throws Failure, or what the model throws.
std::vector<Record> run_cell(const CellContext& context);

}  // namespace llmcache::bench
