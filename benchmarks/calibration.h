// Calibrating caches of fidelity budget on a workload's fill part, and what their answers are compared by.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "linear_probe.h"
#include "loaded_model.h"
#include "outputs.h"
#include "progress.h"
#include "run_config.h"
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
  /// All must outlive it. `cut`: most tokens of a sequence.
  Calibration(LoadedModel& model, const TokenFile& tokens, const Settings& settings,
              const std::optional<LinearProbe>& probe, bool decoder, std::int64_t cut, Progress& progress);

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
  [[nodiscard]] bool keeps() const { return settings_.calibration == "kept"; }
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

  LoadedModel& model_;
  const TokenFile& tokens_;
  const Settings& settings_;
  const BudgetMetric metric_;
  const std::int64_t cut_;
  Progress& progress_;
  ScoreFunction scores_;
  std::int64_t first_ = 0;                            // request that is calibrated on
  std::map<std::string, CalibrationSample> samples_;  // by how weights are held, and part
  double typical_distance_ = 0;
  std::uint64_t probe_hash_ = 0;
};

}  // namespace llmcache::bench
