// Approximate states within an error budget: serves by the setting of a TunableStrategy that a calibration chose.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/refresh/calibration.h"
#include "model/wrapped_model.h"
#include "reuse/answers.h"
#include "reuse/budget/audits.h"
#include "reuse/budget/first_output.h"
#include "reuse/budget/tunable_strategy.h"

namespace llmcache {

/// A calibrated choice in force. Thread-safe.
struct StatePolicy : SupervisedPolicy {
  StatePolicy(std::size_t setting_, const ReuseChoice& choice, ErrorFunction error_, AuditFailures& failures,
              const std::vector<RiskGate::Settings>& gates)
      : SupervisedPolicy(std::move(error_), failures, gates),
        setting(setting_),
        match_threshold(choice.match_threshold),
        least_tokens(choice.least_tokens) {}

  const std::size_t setting;
  const double match_threshold;
  const std::int64_t least_tokens;  ///< ReuseChoice::least_tokens

  /// True if a sequence of so many tokens is one that it was certified for.
  [[nodiscard]] bool owns(std::int64_t tokens) const noexcept { return tokens >= least_tokens; }
};

/// Thread-safe.
class StateReuse {
 public:
  /// References must outlive it.
  StateReuse(std::unique_ptr<TunableStrategy> strategy, const WrappedModel& wrapped, const BudgetOptions& options,
             AuditFailures& failures)
      : strategy_(std::move(strategy)),
        wrapped_(wrapped),
        options_(options),
        first_output_(wrapped.output),
        failures_(failures) {}

  [[nodiscard]] const TunableStrategy& strategy() const noexcept { return *strategy_; }
  /// Makes the policy of a choice, for install(). Throws Error(kInvalidOptions) if this version of the library or this
  /// model has no such setting.
  [[nodiscard]] std::shared_ptr<StatePolicy> make_policy(const ReuseChoice& choice) const;
  /// What was kept so far is dropped: what was certified began with an empty bank, and so does what serves.
  void install(std::shared_ptr<StatePolicy> policy);
  [[nodiscard]] std::shared_ptr<StatePolicy> policy() const;

  /// Runs a batch that can be packed and has a real token. Audited rows are computed in full within the call, and
  /// answered so; or with `jobs` afterwards. Throws what the model throws, also in an audit within the call; nothing
  /// counts as served then.
  [[nodiscard]] PassResult run(const std::shared_ptr<StatePolicy>& policy, const Batch& batch,
                               const RequestOptions& request, DeferredWrites& writes, BackgroundJobs* jobs);
  void clear() { strategy_->clear(); }
  void each_bank(const BankVisitor& visit) { strategy_->each_bank(visit); }
  [[nodiscard]] std::unique_ptr<SnapshotPart> snapshot_part() { return strategy_->snapshot_part(); }
  void add_to(Stats& stats) const;

 private:
  /// What is done with the rows of a batch.
  struct Decisions {
    std::vector<char> reused;           ///< by row
    std::vector<std::int64_t> audited;  ///< rows
    std::vector<AskedAudit> audits;     ///< of these
  };
  [[nodiscard]] static Decisions decide(StatePolicy& policy, const Batch& batch,
                                        const TunableStrategy::Matches& matches);
  static void tell_misses(const TunableStrategy::Matches& matches, std::vector<SequenceReport>& sequences);
  [[nodiscard]] c10::IValue compute(std::size_t setting, const Batch& rows, const std::string& tenant, Output output,
                                    DeferredWrites* writes, ForwardReport& report);
  [[nodiscard]] at::Tensor audited_part(const c10::IValue& result, const Batch& batch, std::int64_t row) const;
  void audit_in_background(const std::shared_ptr<StatePolicy>& policy, const Batch& batch, const Decisions& decisions,
                           const RequestOptions& request, const c10::IValue& result, BackgroundJobs& jobs);
  void audit_now(StatePolicy& policy, const Batch& batch, const Decisions& decisions, const RequestOptions& request,
                 PassResult& answer, DeferredWrites& writes);

  const std::unique_ptr<TunableStrategy> strategy_;
  const WrappedModel& wrapped_;
  const BudgetOptions& options_;
  const FirstOutput first_output_;
  AuditFailures& failures_;
  mutable std::mutex mutex_;
  std::shared_ptr<StatePolicy> policy_;  ///< guarded by mutex_; null: nothing is reused
  std::atomic<std::uint64_t> served_{0};
};

}  // namespace llmcache
