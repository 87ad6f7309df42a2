// Approximate states within an error budget: serves by the setting of a ReuseLadder that a calibration chose, and
// watches over it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "background_audits.h"
#include "byte_gauge.h"
#include "first_output.h"
#include "llmcache/refresh/calibration.h"
#include "model/probe.h"
#include "refresh/output_error.h"
#include "reuse_ladder.h"
#include "supervision.h"

namespace llmcache {

/// Thread-safe.
class LadderReuse {
 public:
  /// Makes another ladder of the same kind, with an empty bank of its own; called from any thread.
  using MakeLadder = std::function<std::unique_ptr<ReuseLadder>()>;

  /// `ladder` serves; `fresh` makes those that calibrations work on. References must outlive it.
  LadderReuse(std::unique_ptr<ReuseLadder> ladder, MakeLadder fresh, const Model& model, const OutputSpec& output,
              const ModelProfile& profile, const BudgetOptions& options, AuditFailures& failures);

  /// Chooses on a ladder of its own (LadderCalibrator): nothing that serves is read or changed, and nothing that serves
  /// changes the result.
  [[nodiscard]] std::optional<ReuseChoice> calibrate(const std::vector<Batch>& sample, std::size_t most_remembered,
                                                     ByteGauge& gauge) const;

  /// Serves by `choice` from here on; unset: nothing is reused. What was kept so far is dropped. Throws
  /// Error(kInvalidOptions) if this version of the library or this model has no such setting; nothing has changed then.
  void use(const std::optional<ReuseChoice>& choice);

  /// Runs a batch that can be packed and has a real token. Fills `report`. Unset if nothing may be reused. Audited rows
  /// are computed in full within the call, and answered so; or with `audits`, which must not outlive this, afterwards.
  /// What is computed is the call's own, until `kept` is committed.
  /// Throws what the model throws, also in an audit within the call; nothing counts as served then.
  std::optional<c10::IValue> run(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report,
                                 BackgroundAudits* audits, KeptLater& kept);

  [[nodiscard]] bool ready() const;
  void clear() { ladder_->clear(); }
  void fill(Stats& stats) const;

 private:
  struct Rules {
    Rules(std::size_t setting_, double limit_, OutputError error_, AuditFailures& failures,
          const std::vector<RiskGate::Settings>& gates)
        : setting(setting_), limit(limit_), error(std::move(error_)), supervision(failures, gates) {}

    const std::size_t setting;
    const double limit;
    const OutputError error;
    Supervision supervision;  ///< without levels: not supervised
  };
  struct Chosen;
  /// Rows of an answer with what they give in full.
  struct Audited {
    c10::IValue full;
    std::vector<std::optional<double>> errors;  ///< unset: could not be compared
    ForwardReport report;
  };
  [[nodiscard]] static Chosen choose(Rules& rules, const Batch& batch, const ReuseLadder::Matches& matches);
  void audit_later(const std::shared_ptr<Rules>& rules, const Batch& batch, const Chosen& chosen,
                   const c10::IValue& result, const std::string& tenant, Output output, BackgroundAudits& queue);
  c10::IValue audit_now(Rules& rules, const Batch& batch, const Chosen& chosen, const c10::IValue& result,
                        const std::string& tenant, Output output, ForwardReport& report, KeptLater& kept);
  Audited audit(Rules& rules, const Batch& rows, const std::vector<AskedAudit>& audits,
                const std::vector<at::Tensor>& answers, const std::string& tenant, Output output, KeptLater* kept);
  static void fail(Rules& rules, const std::vector<AskedAudit>& audits, AuditPlace place);
  [[nodiscard]] std::shared_ptr<Rules> rules() const;

  const std::unique_ptr<ReuseLadder> ladder_;
  const MakeLadder fresh_;
  const Model& model_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const BudgetOptions options_;
  const FirstOutput first_output_;
  AuditFailures& failures_;
  mutable std::mutex mutex_;
  std::shared_ptr<Rules> rules_;  ///< guarded by mutex_; null: nothing is reused
  std::atomic<std::uint64_t> served_{0};
};

}  // namespace llmcache
