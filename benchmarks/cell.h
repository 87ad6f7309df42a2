// One model on one workload, in all settings side by side.
#pragma once

#include <vector>

#include "arguments.h"
#include "loaded_model.h"
#include "progress.h"
#include "records.h"
#include "request_stream.h"
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

/// True if the model can go on behind keys and values that are kept. Throws Failure if kvcache was asked for, and it
/// cannot.
bool reuses_prefixes(const CellContext& context);

/// What records of a setting have in common: names, versions, settings.
Record record_of(const CellContext& context, const Stream& stream, const Setting& setting);

/// Sum of the one divided by the sum of the other; NaN without values.
double ratio_of_sums(const std::vector<double>& one, const std::vector<double>& other);

}  // namespace llmcache::bench
