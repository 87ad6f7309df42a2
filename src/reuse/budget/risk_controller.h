// Fidelity::kBudget: which approximate mechanism serves a request, as a calibration allows it, and that they keep to
// the budget together.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bank/memory.h"
#include "llmcache/options.h"
#include "llmcache/refresh/calibration.h"
#include "reuse/budget/byte_gauge.h"
#include "reuse/budget/state_reuse.h"
#include "reuse/early_exit/early_exit.h"
#include "reuse/strategy.h"

namespace llmcache {

class Calibrator;

/// Holds early exit, and reuse of token states (encoders) or of segments (decoders), as far as the model has them. With
/// both in force the longer sequences reuse states and the shorter ones leave early. A mechanism serves the sequences
/// that it was certified for, and no others. Thread-safe.
class RiskController final : public ReuseStrategy {
 public:
  /// `wrapped` must outlive it. `total`: the account that what this holds is part of; null: of none.
  RiskController(const WrappedModel& wrapped, const Options& options, std::size_t capacity_bytes,
                 MemoryAccount* total = nullptr);
  ~RiskController() override;

  std::string name() const override { return "budget"; }
  bool accepts(const Call& call) const override;
  /// Throws what the model and BudgetOptions::scores throw.
  void serve(const Call& call, Answers& answers) override;
  /// Forgets token states. Calibrated banks stay.
  void clear() override;
  void each_bank(const BankVisitor& visit) override;
  /// Goes by no profile any more.
  void weights_changed() override;
  void add_to(Stats& stats) const override;
  void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) override;
  bool cuts_output(const Call& call) const override;
  bool refuses_output(const Call& call) const override;
  bool exact() const override { return false; }

  /// Runs a sample; requests are given one by one until there is none. What `sample` throws passes through. Throws
  /// Error(kNotAvailable) with the reason if this model has nothing to reuse within the budget, Error(kInvalidInput)
  /// for an empty sample and for what is no request, Error(kModelFailed) with what the model raised.
  /// `total`: batches that will come, 0 if that is not known.
  [[nodiscard]] CalibrationSample run_sample(const std::function<std::optional<Inputs>()>& sample,
                                             std::size_t total) const;
  /// Fits and certifies, and goes by the result from then on. One at a time; others wait. Throws Error as
  /// ExitCalibration and Calibrator do, Error(kInvalidOptions) for a sample of another model, and Error(kNotAvailable)
  /// with what was thrown nested for all else; what was in use stays then.
  CalibrationProfile calibrate(const CalibrationSample& sample);
  /// Goes by `profile` from here on; token states that were kept are dropped. Throws Error(kInvalidOptions) if it was
  /// made for another model, budget or decision; what was in use stays then.
  void use(CalibrationProfile profile);
  /// The profile in use; unset if there is none.
  [[nodiscard]] std::optional<CalibrationProfile> profile() const;
  [[nodiscard]] bool has_profile() const;
  /// Bytes that it can still take.
  [[nodiscard]] std::size_t room() const noexcept { return account_.left(); }

 private:
  [[nodiscard]] bool takes_output(const Call& call) const;
  [[nodiscard]] bool serves(const Call& call) const;
  void make_states();
  void check_available() const;
  [[nodiscard]] Batch check_sample(const Inputs& given) const;
  [[nodiscard]] CalibrationProfile fit(const CalibrationSample& sample) const;
  void fit_both(const CalibrationSample& sample, Calibrator& states, CalibrationProfile& profile) const;
  void fit_exits(const CalibrationSample& sample, CalibrationProfile& profile) const;
  static void take_states(const ReuseChoice& choice, CalibrationProfile& profile);
  void check_fits(const CalibrationProfile& profile) const;
  void reserve_exits(std::size_t bytes);
  void add_supervision(BudgetStats& stats) const;
  void supervise(std::vector<std::shared_ptr<const SupervisedPolicy>> policies) noexcept;

  const WrappedModel& wrapped_;
  const BudgetOptions options_;
  const ProgressFunction progress_;
  const std::size_t capacity_bytes_;
  MemoryAccount account_;       ///< what is in use: banks of early exits, and token states
  std::size_t exit_bytes_ = 0;  ///< reserved for the banks of early exits; guarded by use_mutex_
  std::string no_states_;       ///< why token states are not reused; empty: they can be
  AuditFailures failures_;
  ExitReuse exits_;
  std::unique_ptr<StateReuse> states_;  ///< null: token states are not reused
  mutable ByteGauge calibrating_;       ///< what a calibration that is running holds
  std::mutex calibrate_mutex_;          ///< one calibrate() at a time
  std::mutex use_mutex_;                ///< one use() at a time
  mutable std::mutex mutex_;
  std::optional<CalibrationProfile> calibration_;                    ///< guarded by mutex_, as are the next two
  std::vector<std::shared_ptr<const SupervisedPolicy>> supervised_;  ///< in force
  RiskGate::Counters retired_;                                       ///< of those that were
  std::unique_ptr<BackgroundJobs> audits_;  ///< null: audits are made within the call. Uses all above
};

}  // namespace llmcache
