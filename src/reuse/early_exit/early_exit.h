// Early exit within an error budget: sequences leave in front of a layer where a calibrated gate expects that an answer
// made of those of their nearest neighbours is near enough.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "llmcache/refresh/calibration.h"
#include "model/wrapped_model.h"
#include "reuse/answers.h"
#include "reuse/early_exit/exit_pass.h"

namespace llmcache {

/// Thread-safe.
class ExitReuse {
 public:
  /// References must outlive it.
  ExitReuse(const WrappedModel& wrapped, const BudgetOptions& options, AuditFailures& failures);

  /// Why there are no early exits for this model and these options; empty: there can be.
  [[nodiscard]] const std::string& unavailable() const noexcept { return unavailable_; }
  /// Throws Error(kInvalidOptions) that says why the early exits of a profile are not for this cache.
  void check_fits(const CalibrationProfile& profile, std::size_t capacity_bytes) const;
  /// Makes the policy of a profile, for install(); null if it has none.
  [[nodiscard]] std::shared_ptr<ExitPolicy> make_policy(const CalibrationProfile& profile) const;
  void install(std::shared_ptr<ExitPolicy> policy);
  [[nodiscard]] std::shared_ptr<ExitPolicy> policy() const;

  /// Runs a batch that can be packed and has a real token. Audits of rows that have left are made in the background, by
  /// `jobs`; without, audited rows stay. One that fails does not throw: the row has an answer all the same.
  [[nodiscard]] PassResult run(const std::shared_ptr<ExitPolicy>& policy, const Batch& batch, DeferredWrites& writes,
                               BackgroundJobs* jobs);
  void add_to(Stats& stats) const;

 private:
  [[nodiscard]] at::Tensor compute(const Batch& row) const;

  const WrappedModel& wrapped_;
  const BudgetOptions& options_;
  AuditFailures& failures_;
  std::string unavailable_;
  mutable std::mutex mutex_;
  std::shared_ptr<ExitPolicy> policy_;             ///< guarded by mutex_; null: nothing is reused
  std::vector<std::atomic<std::uint64_t>> exits_;  ///< by layer
};

}  // namespace llmcache
