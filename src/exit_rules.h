// Rules of a calibration of early exits in force, with what supervises them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <exception>
#include <utility>
#include <vector>

#include "refresh/exit_model.h"
#include "supervision.h"

namespace llmcache {

/// A calibrated model, and what supervises each level of its thresholds. Thread-safe.
struct ExitRules {
  ExitRules(ExitModel exit_, ScoreFunction scores_, AuditFailures& failures,
            const std::vector<RiskGate::Settings>& gates)
      : exit(std::move(exit_)), scores(std::move(scores_)), supervision(failures, gates) {}

  const ExitModel exit;
  const ScoreFunction scores;
  Supervision supervision;  ///< without levels: nothing is supervised
};

/// An answer that was, or would have been, reused and is to be compared with the full computation.
struct Trial {
  AskedAudit audit;
  at::Tensor answer;  ///< [values]
};

/// The largest error of the trials of a sequence; `full`: its output [values]. Tells the supervision of each.
double record(ExitRules& rules, const std::vector<Trial>& trials, const at::Tensor& full, AuditPlace place);

/// Tells the supervision that the trials of a sequence came to nothing.
void fail(ExitRules& rules, const std::vector<Trial>& trials, AuditPlace place, const std::exception_ptr& thrown);

/// The same of trials that found no room in the queue.
void drop(ExitRules& rules, const std::vector<Trial>& trials);

}  // namespace llmcache
