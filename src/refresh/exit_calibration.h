// Fits an ExitModel on computed sequences, and certifies the thresholds of its gates.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "llmcache/refresh/calibration.h"
#include "refresh/exit_model.h"

namespace llmcache {

/// What a part of a pass takes: `pass_ms` however few sequences run, such as reading its weights, and `sequence_ms` for
/// each of them.
struct PartTime {
  double pass_ms = 0;
  double sequence_ms = 0;

  /// From one sequence alone, and `rows` of them together.
  static PartTime from(double alone_ms, double together_ms, double rows);
};

/// Sequences that were computed in full, in the order of the traffic. float32, all on one device.
struct ExitSample {
  std::vector<at::Tensor> states;  ///< one a layer: `[n, hidden]`, mean over its tokens of the state that enters it
  at::Tensor outputs;              ///< `[n, values]`, final pooled outputs
  std::vector<PartTime> layer_times;
  double batch_rows = 1;             ///< mean number of sequences that came together
  std::vector<std::int64_t> tokens;  ///< of each sequence; empty: not known
};

/// An ExitModel fitted on a part of a sample, whose thresholds the rest may certify. Of one thread.
class ExitCalibration {
 public:
  /// What CalibrationProfile says: banks and translator from the first part of the sample, gates from the second, which
  /// then joins the banks. `capacity_bytes` limits the banks. Throws Error(kInvalidInput) if the sample is too small to
  /// fit anything. References must outlive it.
  ExitCalibration(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes);
  ~ExitCalibration();
  ExitCalibration(const ExitCalibration&) = delete;
  ExitCalibration& operator=(const ExitCalibration&) = delete;

  /// Sequences of this many tokens or more do not leave; 0: all may.
  static constexpr std::int64_t kAll = 0;

  /// Part of the token-layers that sequences below `longest` tokens would run through if all sequences together had an
  /// error of `epsilon`, by the second part of the sample; unset: leaving early would save no time, or there are no
  /// such sequences. What certifies has no say in it.
  [[nodiscard]] std::optional<double> expected_cost(double epsilon, std::int64_t longest = kAll) const;
  /// Certifies thresholds by the third part of the sample. Fills the profile's evidence; `exit` stays null if no
  /// threshold could be certified, and `reason` says why. Once.
  void certify(const Budget& budget, CalibrationProfile& profile, std::int64_t longest = kAll);

 private:
  struct Fitted;
  const ExitSample& sample_;
  const BudgetOptions& options_;
  std::unique_ptr<Fitted> fitted_;
};

/// Both in turn, for the whole of options.budget.
void calibrate_exit(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes,
                    CalibrationProfile& profile);

}  // namespace llmcache
