// Fidelity::kBudget on a wrapped model: early exits, or reuse of token states, as a calibration allows them, and their
// supervision.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bank/memory.h"
#include "byte_gauge.h"
#include "execute/batch.h"
#include "ladder_reuse.h"
#include "llmcache/options.h"
#include "llmcache/refresh/calibration.h"
#include "llmcache/report.h"
#include "model/probe.h"
#include "supervision.h"

namespace llmcache {

class BackgroundAudits;
struct ExitRules;
struct Trial;

/// Thread-safe.
class BudgetReuse {
 public:
  /// `total`: the account that what this holds is part of; null: of none.
  BudgetReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output, const ModelProfile& profile,
              const Options& options, std::size_t capacity_bytes, MemoryAccount* total = nullptr);
  ~BudgetReuse();

  /// Runs a sample; requests are given one by one until there is none. What `sample` throws passes through. Throws
  /// Error(kNotAvailable) with the reason if this model has nothing to reuse within the budget, Error(kInvalidInput)
  /// for an empty sample and for what is no request, Error(kModelFailed) with what the model raised.
  [[nodiscard]] CalibrationSample run_sample(const std::function<std::optional<Inputs>()>& sample) const;
  /// Fits and certifies, and goes by the result from then on. One at a time; others wait. Throws Error as
  /// calibrate_exit() and LadderCalibrator::calibrate(), Error(kInvalidOptions) for a sample of another model, and
  /// Error(kNotAvailable) with what was thrown nested for all else; what was in use stays then.
  CalibrationProfile calibrate(const CalibrationSample& sample);
  /// Goes by `profile` from here on; token states that were kept are dropped. Throws Error(kInvalidOptions) if it was
  /// made for another model, budget or decision; what was in use stays then.
  void use(CalibrationProfile profile);
  /// The profile in use; unset if there is none.
  [[nodiscard]] std::optional<CalibrationProfile> profile() const;
  /// True if a profile is in use that reuses anything.
  [[nodiscard]] bool ready() const { return rules() != nullptr || (ladder_ && ladder_->ready()); }

  struct Answer {
    c10::IValue computed;  ///< the result for the whole batch; None if no row needed it
    bool cut = false;      ///< it has only the tokens that were asked for
    /// By row: the tensors of a result that did not come out of that, batch dimension 1. Empty: it did.
    std::vector<std::vector<at::Tensor>> rows;
  };
  /// `batch` can be packed and has a real token. Fills `report`. Unset if there is no profile to go by. What is
  /// computed is the call's own, until `kept` is committed. Throws what the model and BudgetOptions::scores throw: the
  /// caller then answers without reuse. An audit that fails does not throw where there is an exact answer all the same:
  /// of rows that stayed for it, theirs. Audited rows that were answered with states of others need a second run; if
  /// that fails it throws.
  std::optional<Answer> run(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report,
                            KeptLater& kept);
  /// True if requests for these outputs go through run().
  [[nodiscard]] bool serves(Output output) const noexcept { return !profile_.causal || output != Output::kNewTokens; }

  /// Goes by no profile any more, and forgets token states: those of other weights.
  void forget();
  /// Forgets token states. Calibrated banks stay.
  void clear();
  void fill(Stats& stats) const;

 private:
  [[nodiscard]] std::shared_ptr<ExitRules> rules() const;
  void check_available() const;
  std::optional<Answer> run_exits(const Batch& batch, ForwardReport& report, KeptLater& kept);
  void reserve_exits(std::size_t bytes);
  void audit_now(ExitRules& rules, const Batch& batch, std::int64_t row, const std::vector<Trial>& trials,
                 const c10::IValue& computed, SequenceReport& report) const;
  void audit_later(const std::shared_ptr<ExitRules>& rules, const Batch& batch, std::int64_t row,
                   const std::vector<Trial>& trials);
  /// Computes `sequence`, a batch of one row, in full, and tells the gates.
  void audit(ExitRules& rules, const Batch& sequence, const std::vector<Trial>& trials) const;
  void make_ladder();
  [[nodiscard]] Batch check_sample(const Inputs& given) const;
  [[nodiscard]] CalibrationProfile fit(const CalibrationSample& sample) const;
  void check_fits(const CalibrationProfile& profile) const;

  const Model& model_;
  const InputSpec& inputs_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const BudgetOptions options_;
  const std::size_t capacity_bytes_;
  MemoryAccount account_;       ///< what is in use: banks of early exits, or what the ladder holds
  std::size_t exit_bytes_ = 0;  ///< reserved for the banks of early exits; guarded by use_mutex_
  std::string no_exits_;        ///< why there are no early exits; empty: there can be
  std::string no_ladder_;       ///< why token states are not reused; empty: they can be
  AuditFailures failures_;
  std::unique_ptr<LadderReuse> ladder_;  ///< null: token states are not reused
  mutable ByteGauge calibrating_;        ///< what a calibration that is running holds
  std::mutex calibrate_mutex_;           ///< one calibrate() at a time
  std::mutex use_mutex_;                 ///< one use() at a time
  mutable std::mutex mutex_;
  std::optional<CalibrationProfile> calibration_;  ///< guarded by mutex_
  std::shared_ptr<ExitRules> rules_;               ///< guarded by mutex_; null: nothing is reused
  std::vector<std::atomic<std::uint64_t>> exits_;  ///< by layer
  std::unique_ptr<BackgroundAudits> audits_;       ///< null: audits are made within the call. Uses all above
};

}  // namespace llmcache
