// What a run without options measures: for each model and workload the settings that a user would choose.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"
#include "model_files.h"
#include "token_file.h"

namespace llmcache::bench {

/// One measurement of a model on a workload.
struct Part {
  Arguments arguments;
  double weight = 0;  ///< its share of the time, in proportion to the others
};

/// Parts for a model on a workload in a run without options, none where they would show nothing that others do not.
/// `probe`: there is one. Encoders with trained weights and a pooled output: classification with the paper's mode at
/// 0.85 and at the error of the budget, a semantic cache, and a budget; similarity thresholds and capacities; edits
/// within a budget; questions about documents and choices. Decoders with trained weights: conversations, documents,
/// choices, articles and generation against an ordinary key-value cache, weights as loaded and in half precision. Models
/// with random weights: the paper's three workloads, speed only.
std::vector<Part> first_run(const Arguments& arguments, const ModelFile& model, const std::string& workload, bool probe);

/// The workload of real data that a sample of the repository stands in for, or the workload itself: "squad" for
/// "sample-documents" and "squad".
std::string kind_of(const std::string& workload);

}  // namespace llmcache::bench
