// Audits of answers within an error budget: which are asked for, and how they are told.
#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "execute/batch.h"
#include "reuse/background_jobs.h"
#include "reuse/budget/supervision.h"

namespace llmcache {

/// Error of an answer against the full computation of the same row, 0 to 1.
using ErrorFunction = std::function<double(const at::Tensor& answer, const at::Tensor& full)>;

/// What a calibration allows one mechanism, in force, with what supervises it. Thread-safe.
struct SupervisedPolicy {
  SupervisedPolicy(ErrorFunction error_, AuditFailures& failures, const std::vector<RiskGate::Settings>& gates)
      : error(std::move(error_)), supervision(failures, gates) {}

  const ErrorFunction error;
  Supervision supervision;  ///< without thresholds: nothing is supervised
};

/// An answer that was, or would have been, reused and is to be compared with the full computation.
struct PendingAudit {
  AskedAudit asked;
  at::Tensor answer;
};

/// The largest error of the audits of a row; `full`: what it gives in full. Tells the supervision of each.
double record(SupervisedPolicy& policy, const std::vector<PendingAudit>& audits, const at::Tensor& full,
              AuditPlace place);
/// Tells the supervision that the audits of a row came to nothing.
void fail(SupervisedPolicy& policy, const std::vector<PendingAudit>& audits, AuditPlace place,
          const std::exception_ptr& thrown) noexcept;

/// Puts the audits of a row in the queue. `compute` gives what it gives in full; it must not use what the cache has
/// kept. Whatever becomes of it, it is told to the supervision.
void audit_later(const std::shared_ptr<SupervisedPolicy>& policy, const Batch& batch, std::int64_t row,
                 std::vector<PendingAudit> audits, BackgroundJobs& jobs,
                 std::function<at::Tensor(const Batch& row)> compute) noexcept;

}  // namespace llmcache
