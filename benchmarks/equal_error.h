// The paper's mode at the error of a budget: from which similarity on may an earlier request count?
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "calibration.h"
#include "llmcache/options.h"
#include "loaded_model.h"
#include "token_file.h"

namespace llmcache::bench {

/// A sequence answered by the most similar one before it.
struct Nearest {
  double similarity = 0;
  double error = 0;  ///< of that answer, in the metric of the budget
};

/// Of a cache of fidelity threshold, on the training part that budgets are calibrated on: the first 70 % of it fill the
/// cache, each sequence of the rest gets the answer of the most similar one. `options`: of such a cache; every
/// similarity counts, whatever they say. Throws what the model throws.
std::vector<Nearest> nearest_answers(LoadedModel& model, const TokenFile& tokens, std::int64_t cut,
                                     const Calibration& calibration, Options options);

/// Writes them for load_nearest(); where that fails, a later run finds them again.
void save_nearest(const std::filesystem::path& path, const std::vector<Nearest>& nearest);

/// What save_nearest() wrote with this version of the library; empty if there is nothing whole.
std::vector<Nearest> load_nearest(const std::filesystem::path& path);

/// The least similarity at which the mean error over all of these, 0 where nothing is as similar, is at most epsilon; 1
/// if there is none.
double threshold_within(std::vector<Nearest> nearest, double epsilon);

}  // namespace llmcache::bench
