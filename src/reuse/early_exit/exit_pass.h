// A pass in which sequences leave early.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "execute/engine_hook.h"
#include "refresh/exit_model.h"
#include "reuse/budget/audits.h"

namespace llmcache {

/// A calibration of early exits in force. Thread-safe.
struct ExitPolicy : SupervisedPolicy {
  ExitPolicy(ExitModel exit_, ScoreFunction scores_, std::int64_t below_, AuditFailures& failures,
             const std::vector<RiskGate::Settings>& gates);

  /// True if a sequence of so many tokens is one that it was certified for.
  [[nodiscard]] bool owns(std::int64_t tokens) const noexcept { return below == 0 || tokens < below; }

  const ExitModel exit;
  const ScoreFunction scores;
  const std::int64_t below;  ///< CalibrationProfile::exit_below
};

/// Lets sequences leave where `policy` allows it, and asks the gates what to do with them. What BudgetOptions::scores
/// throws ends the pass.
class ExitPass final : public EngineHook {
 public:
  struct Sequence {
    std::int32_t left = -1;  ///< in front of this layer
    at::Tensor answer;       ///< [values]; of a sequence that left
    double expected = 0;     ///< its error, by the gate
    bool stays = false;      ///< it is computed in full whatever could be reused
    std::size_t tried = 0;   ///< threshold indexes that have proposed something, from the most liberal one on
    std::vector<PendingAudit> audits;
  };

  /// `background`: audited sequences leave all the same. `policy` must outlive it.
  ExitPass(ExitPolicy& policy, std::size_t sequences, bool background);

  bool watches(std::int32_t layer) const override;
  std::vector<std::size_t> at_layer(std::int32_t layer, const std::vector<at::Tensor>& states) override;
  /// Tells the gates of the sequences that they had no proposal for. Once, behind a pass that did not fail.
  void close();

  [[nodiscard]] const std::vector<Sequence>& sequences() const noexcept { return sequences_; }

 private:
  /// Thresholds whose gates are told: the one that serves, and the closed ones before it.
  [[nodiscard]] std::size_t watched() const;
  bool leaves(Sequence& sequence, std::size_t l, double expected, const at::Tensor& answer);

  ExitPolicy& policy_;
  const bool background_;
  const std::size_t threshold_index_;
  std::vector<Sequence> sequences_;
};

}  // namespace llmcache
