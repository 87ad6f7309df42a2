// Calibrating caches of fidelity budget on a workload's fill part, and what their answers are compared by.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "experiment.h"
#include "linear_probe.h"
#include "loaded_model.h"
#include "outputs.h"
#include "settings.h"
#include "token_file.h"

namespace llmcache::bench {

/// Requests [begin, end) of a token file.
struct RequestRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t count() const { return end - begin; }
};

/// For one model on one workload.
class Calibration {
 public:
  /// `context` must outlive it. `decoder`: the model can reuse prefixes.
  Calibration(const ExperimentContext& context, const std::optional<LinearProbe>& probe, bool decoder);

  /// The options of a budget that the settings and the probe say; epsilon and early exit are the run's.
  [[nodiscard]] BudgetOptions options(const RunConfig& config) const;

  /// Calibrates `cache`, or gives it the profile that an earlier run kept beside the models. The requests run once for
  /// all caches that hold the weights alike. Throws Failure.
  void calibrate(Cache& cache, const RunConfig& config);

  /// Errors of the sequences of an answer against the plain model's, in the metric of the budget. Empty where they
  /// cannot be told: before calibrate(), for a relative error.
  [[nodiscard]] std::vector<double> errors(const Returned& answer, const Returned& plain) const;
  [[nodiscard]] BudgetMetric metric() const { return metric_; }

  /// What is found on the training part is kept for later runs.
  [[nodiscard]] bool keeps() const { return context_.settings.calibration == "kept"; }
  /// Where: the name tells model, data, probe and `what` apart. The folder is there, if it could be made.
  [[nodiscard]] std::filesystem::path kept_path(const std::string& what) const;

  /// Requests that a run is calibrated on: of the fill part those that the probe was not fitted on, all if there are
  /// none; or a part of them.
  [[nodiscard]] RequestRange requests(const RunConfig& config = {}) const;

 private:
  [[nodiscard]] bool take_kept(Cache& cache, const std::filesystem::path& path);
  void make(Cache& cache, const RunConfig& config);
  void keep(const Cache& cache, const std::filesystem::path& path) const;
  [[nodiscard]] at::Tensor pooled(const c10::IValue& output) const;

  const ExperimentContext& context_;
  const TokenFile& tokens_ = context_.tokens;
  const BudgetMetric metric_;
  ScoreFunction scores_;
  std::int64_t first_ = 0;                            // request that is calibrated on
  std::map<std::string, CalibrationSample> samples_;  // by how weights are held, and part
  double typical_distance_ = 0;
  std::uint64_t probe_hash_ = 0;
};

// The paper's mode at the error of a budget: from which similarity on may an earlier request count?

/// A sequence answered by the most similar one before it.
struct Nearest {
  double similarity = 0;
  double error = 0;  ///< of that answer, in the metric of the budget
};

/// Of a cache of fidelity threshold, on the training part that budgets are calibrated on: the first 70 % of it fill the
/// cache, each sequence of the rest gets the answer of the most similar one. `options`: of such a cache; every
/// similarity counts, whatever they say. Throws what the model throws.
std::vector<Nearest> nearest_answers(const ExperimentContext& context, const Calibration& calibration, Options options);

/// Writes them for load_nearest(); where that fails, a later run finds them again.
void save_nearest(const std::filesystem::path& path, const std::vector<Nearest>& nearest);

/// What save_nearest() wrote with this version of the library; empty if there is nothing whole.
std::vector<Nearest> load_nearest(const std::filesystem::path& path);

/// The least similarity at which the mean error over all of these, 0 where nothing is as similar, is at most epsilon; 1
/// if there is none.
double threshold_within(std::vector<Nearest> nearest, double epsilon);

}  // namespace llmcache::bench
