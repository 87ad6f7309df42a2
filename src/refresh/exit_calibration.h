// Fits an ExitModel on computed sequences, and certifies the thresholds of its gates.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
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
  double batch_rows = 1;  ///< mean number of sequences that came together
};

/// What CalibrationProfile says: banks and translator from the first part of the sample, gates from the second, which
/// then joins the banks, thresholds from the third. Fills the profile's evidence; `exit` stays null if no threshold
/// could be certified. `capacity_bytes` limits the banks. Throws Error(kInvalidInput) if the sample is too small to fit
/// anything.
void calibrate_exit(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes,
                    CalibrationProfile& profile);

}  // namespace llmcache
