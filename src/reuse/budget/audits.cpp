#include "reuse/budget/audits.h"

#include <algorithm>

namespace llmcache {
namespace {

std::vector<AskedAudit> asked_audits(const std::vector<PendingAudit>& audits) {
  std::vector<AskedAudit> asked;
  for (const PendingAudit& audit : audits) asked.push_back(audit.asked);
  return asked;
}

}  // namespace

double record(SupervisedPolicy& policy, const std::vector<PendingAudit>& audits, const at::Tensor& full,
              AuditPlace place) {
  std::vector<double> errors;  // of all, before any is told: an audit counts as made or as failed, never as both
  for (const PendingAudit& audit : audits) errors.push_back(policy.error(audit.answer, full));
  for (std::size_t i = 0; i < audits.size(); ++i) policy.supervision.record(audits[i].asked, errors[i], place);
  return errors.empty() ? 0 : *std::max_element(errors.begin(), errors.end());
}

void fail(SupervisedPolicy& policy, const std::vector<PendingAudit>& audits, AuditPlace place,
          const std::exception_ptr& thrown) noexcept {
  policy.supervision.fail(asked_audits(audits), place, thrown);
}

void audit_later(const std::shared_ptr<SupervisedPolicy>& policy, const Batch& batch, std::int64_t row,
                 std::vector<PendingAudit> audits, BackgroundJobs& jobs,
                 std::function<at::Tensor(const Batch& row)> compute) noexcept {
  const auto own = std::make_shared<const std::vector<PendingAudit>>(std::move(audits));
  try {
    const Batch one = batch.select({row});
    std::size_t bytes = one.input_bytes();
    for (const PendingAudit& audit : *own) bytes += audit.answer.nbytes();
    const auto job = [policy, one, own, compute = std::move(compute)] {
      try {
        record(*policy, *own, compute(one), AuditPlace::kInBackground);
      } catch (...) {
        fail(*policy, *own, AuditPlace::kInBackground, std::current_exception());
      }
    };
    if (jobs.add(job, bytes)) {
      policy->supervision.queued();
    } else {
      policy->supervision.drop(asked_audits(*own));
    }
  } catch (...) {
    fail(*policy, *own, AuditPlace::kInBackground, std::current_exception());
  }
}

}  // namespace llmcache
