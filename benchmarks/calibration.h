// Calibrating caches of fidelity budget on a workload's fill part, and what their answers are compared by.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "loaded_model.h"
#include "outputs.h"
#include "probe.h"
#include "progress.h"
#include "token_file.h"

namespace llmcache::bench {

/// The probe's classes as BudgetOptions::scores.
ScoreFunction scores_of(const Probe& probe);

/// For one model on one workload.
class Calibration {
 public:
  /// All must outlive it. `cut`: most tokens of a sequence.
  Calibration(LoadedModel& model, const TokenFile& tokens, const Arguments& arguments,
              const std::optional<Probe>& probe, bool decoder, std::int64_t cut, Progress& progress);

  /// The options of a budget that the command line and the probe say; epsilon and early exit are the setting's.
  [[nodiscard]] BudgetOptions options(const Setting& setting) const;

  /// Calibrates `cache`, or gives it the profile that --calibration names, or in a run without options the one that an
  /// earlier run kept beside the models. The fill part runs once for all caches that hold the weights alike. Throws
  /// Failure.
  void calibrate(Cache& cache, const Setting& setting);

  /// Errors of the sequences of an answer against the plain model's, in the metric of the budget. Empty where they
  /// cannot be told: before calibrate(), for a relative error.
  [[nodiscard]] std::vector<double> errors(const Returned& answer, const Returned& plain) const;
  [[nodiscard]] BudgetMetric metric() const { return metric_; }

  /// Requests that are calibrated on: those of the fill part that the probe was not fitted on, all if there are none.
  [[nodiscard]] std::int64_t first_request() const { return first_; }
  [[nodiscard]] std::int64_t requests() const {
    const std::int64_t all = tokens_.fill_requests - first_;
    return std::min(arguments_.calibration_requests.value_or(all), all);
  }

 private:
  /// Where a run without options keeps a profile: its name tells model, data, probe and setting apart.
  [[nodiscard]] std::filesystem::path kept_path(const Setting& setting) const;
  [[nodiscard]] bool take_kept(Cache& cache, const std::filesystem::path& path);
  void make(Cache& cache, const Setting& setting);
  void keep(const Cache& cache, const std::filesystem::path& path) const;
  [[nodiscard]] at::Tensor pooled(const c10::IValue& output) const;

  LoadedModel& model_;
  const TokenFile& tokens_;
  const Arguments& arguments_;
  const BudgetMetric metric_;
  const std::int64_t cut_;
  Progress& progress_;
  ScoreFunction scores_;
  std::int64_t first_ = 0;                            // request that is calibrated on
  std::map<std::string, CalibrationSample> samples_;  // by how weights are held
  double typical_distance_ = 0;
  std::uint64_t probe_hash_ = 0;
};

}  // namespace llmcache::bench
