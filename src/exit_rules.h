// Rules of a calibration of early exits in force, with the gates that supervise them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "refresh/exit_model.h"
#include "refresh/sequential_test.h"

namespace llmcache {

/// A calibrated model, and one gate for each level of its thresholds. Thread-safe.
struct ExitRules {
  ExitModel exit;
  ScoreFunction scores;
  std::vector<std::unique_ptr<RiskGate>> gates;  ///< by level; empty: nothing is supervised

  /// The most liberal level whose gate is open; the number of levels if all are closed.
  [[nodiscard]] std::size_t level() const;
};

/// An answer that was, or would have been, reused and is to be compared with the full computation.
struct Trial {
  std::size_t level = 0;
  RiskGate::Decision decision;
  at::Tensor answer;  ///< [values]
};

/// Tells the gates of `rules` what the trials of a sequence came to; `full`: its output [values]. Returns the largest
/// error.
double record(ExitRules& rules, const std::vector<Trial>& trials, const at::Tensor& full);

}  // namespace llmcache
