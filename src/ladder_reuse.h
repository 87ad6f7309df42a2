// Approximate states within an error budget: calibrates a ReuseLadder on a sample of the traffic, serves by the chosen
// setting, and watches over it.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "background_audits.h"
#include "llmcache/refresh/calibration.h"
#include "model/probe.h"
#include "refresh/ladder_calibration.h"
#include "refresh/output_error.h"
#include "refresh/sequential_test.h"
#include "reuse_ladder.h"

namespace llmcache {

/// Thread-safe.
class LadderReuse {
 public:
  LadderReuse(std::unique_ptr<ReuseLadder> ladder, const Model& model, const OutputSpec& output,
              const ModelProfile& profile, const BudgetOptions& options);

  [[nodiscard]] const ReuseLadder& ladder() const { return *ladder_; }

  /// Runs the first half of the sample with each setting and in full, and chooses a few settings by their errors
  /// (choose_rungs). Serves the second half with each of these as run() would, what it reuses in full too, from the
  /// safest on: fixed-sequence testing (Learn then Test, arXiv 2110.01052, section 2, the order learnt on other data).
  /// Of those that pass, the last one computes least. Empties the bank before and after. Unset if nothing of the sample
  /// is ever known from requests before, or nothing can be certified.
  std::optional<ReuseChoice> calibrate(const std::vector<Batch>& sample);

  /// Serves by `choice` from here on; unset: nothing is reused. Throws Error(kInvalidOptions) if this version of the
  /// library or this model has no such setting.
  void use(const std::optional<ReuseChoice>& choice);

  /// Runs a batch that can be packed and has a real token. Fills `report`. Unset if nothing may be reused. Audited rows
  /// are computed in full within the call, and answered so; or with `audits`, which must not outlive this, afterwards.
  /// What is computed is the call's own, until `kept` is committed.
  std::optional<c10::IValue> run(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report,
                                 BackgroundAudits* audits, KeptLater& kept);

  [[nodiscard]] bool ready() const;
  void clear() { ladder_->clear(); }
  void fill(Stats& stats) const;

 private:
  struct Rules {
    std::size_t setting = 0;
    double limit = 0;
    OutputError error;
    std::unique_ptr<RiskGate> gate;  ///< null: not supervised
  };
  /// What serving by one setting led to.
  struct Trial {
    std::vector<double> errors;  ///< one a sequence
    double computed = 0;         ///< part of the token-layers, mean
  };
  /// By request: what its rows give in full; empty: not known.
  struct FullOutputs {
    std::map<std::size_t, std::vector<at::Tensor>> outputs;
    std::size_t bytes = 0;
  };
  std::vector<at::Tensor> compute(const Batch& batch, const std::vector<char>& kept);
  std::vector<LadderDraw> explore(std::span<const Batch> sample, std::size_t warm_up, const OutputError& error);
  Trial try_out(std::span<const Batch> sample, std::size_t warm_up, std::size_t setting, double limit,
                const OutputError& error, FullOutputs& known);
  /// Rows of an answer with what they give in full, of which the gate is told.
  struct Audited {
    c10::IValue full;
    std::vector<double> errors;
    ForwardReport report;
  };
  Audited audit(const Rules& rules, const Batch& rows, const std::vector<RiskGate::Decision>& decisions,
                const std::vector<at::Tensor>& answers, const std::string& tenant, Output output, KeptLater* kept);
  [[nodiscard]] Output asked_for() const;
  [[nodiscard]] std::shared_ptr<Rules> rules() const;
  [[nodiscard]] at::Tensor first_output(const c10::IValue& result, const Batch& batch, std::int64_t row) const;
  [[nodiscard]] double typical_distance(const std::vector<Batch>& sample) const;

  const std::unique_ptr<ReuseLadder> ladder_;
  const Model& model_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const BudgetOptions options_;
  const bool per_token_;
  mutable std::mutex mutex_;
  std::shared_ptr<Rules> rules_;  ///< guarded by mutex_; null: nothing is reused
  std::atomic<std::uint64_t> served_{0};
};

}  // namespace llmcache
