#include "reuse/early_exit/early_exit.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "execute/engine.h"
#include "llmcache/error.h"

namespace llmcache {
namespace {

std::string why_unavailable(const WrappedModel& wrapped, const BudgetOptions& options) {
  const auto& leaves = wrapped.output.leaves;
  if (wrapped.profile.granularity == Granularity::kWholeLayers) {
    return "it runs whole layers only; its profile says why";
  }
  if (wrapped.inputs.has_source()) return "its output follows from a source, which the banks of exits do not know";
  if (leaves.size() != 1 || leaves[0].tokens >= 0 || leaves[0].batch != 0) {
    return "its output is not one pooled vector a sequence, [batch, values]";
  }
  if (options.early_exit == EarlyExit::kOff) return "BudgetOptions.early_exit is off";
  if (options.budget.metric == BudgetMetric::kTokenAgreement) {
    return "its output is a pooled one, and the metric of the budget is for tokens; choose decision or relative";
  }
  return {};
}

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorCode::kInvalidOptions, "the calibration profile does not fit this cache: " + why);
}

}  // namespace

ExitReuse::ExitReuse(const WrappedModel& wrapped, const BudgetOptions& options, AuditFailures& failures)
    : wrapped_(wrapped),
      options_(options),
      failures_(failures),
      unavailable_(why_unavailable(wrapped, options)),
      exits_(static_cast<std::size_t>(wrapped.layers())) {}

void ExitReuse::check_fits(const CalibrationProfile& profile, std::size_t capacity_bytes) const {
  if (!profile.exit) return;
  if (!unavailable_.empty()) refuse("it has early exits, and there are none, because " + unavailable_);
  if (profile.early_exit != options_.early_exit) {
    refuse(fmt::format("its early exit is {}, BudgetOptions.early_exit is {}", to_string(profile.early_exit),
                       to_string(options_.early_exit)));
  }
  const ExitModel& exit = *profile.exit;
  const auto fits = [&](const ExitLayer& layer) {
    return !layer.used() || layer.centre.size(0) == wrapped_.profile.hidden;
  };
  if (exit.layers.size() != exits_.size() || !std::all_of(exit.layers.begin(), exit.layers.end(), fits)) {
    refuse("its banks are for another number of layers or another padded length");
  }
  if (exit.bytes() > capacity_bytes) {
    refuse(
        fmt::format("its banks take {} bytes, and {} are there for them (Options.capacity_bytes, "
                    "BudgetOptions.capacity_share)",
                    exit.bytes(), capacity_bytes));
  }
  const bool decides = exit.metric == BudgetMetric::kDecision && exit.outputs.size(0) > 0;
  const auto device = wrapped_.model->device();
  if (decides && !at::equal(decisions_of(exit.outputs.to(device), options_.scores), exit.decisions.to(device))) {
    refuse("BudgetOptions.scores decides otherwise than when it was made");
  }
}

std::shared_ptr<ExitPolicy> ExitReuse::make_policy(const CalibrationProfile& profile) const {
  if (!profile.exit) return nullptr;
  std::vector<RiskGate::Settings> gates;
  for (std::size_t index = 0; options_.audit_rate > 0 && index < profile.exit->thresholds.size(); ++index) {
    RiskGate::Settings& settings = gates.emplace_back();
    settings.epsilon = profile.exit_epsilon();
    settings.audit_rate = options_.audit_rate;
    settings.closed_audit_rate = std::max(options_.audit_rate, 0.25);
    settings.seed = options_.seed + index;
  }
  return std::make_shared<ExitPolicy>(profile.exit->to(wrapped_.model->device()), options_.scores, profile.exit_below,
                                      failures_, gates);
}

void ExitReuse::install(std::shared_ptr<ExitPolicy> policy) {
  const std::lock_guard lock(mutex_);
  policy_ = std::move(policy);
}

std::shared_ptr<ExitPolicy> ExitReuse::policy() const {
  const std::lock_guard lock(mutex_);
  return policy_;
}

PassResult ExitReuse::run(const std::shared_ptr<ExitPolicy>& policy, const Batch& batch, DeferredWrites& writes,
                          BackgroundJobs* jobs) {
  const Plan plan = batch.full_plan(wrapped_.layers());
  ExitPass pass(*policy, plan.sequences.size(), jobs != nullptr);
  PassResult done;
  done.rows.resize(static_cast<std::size_t>(batch.rows));
  // If it throws nothing is served by reuse, and the gates are never told of the audits that they asked for.
  done.value = execute_packed(*wrapped_.model, batch, plan, {}, nullptr, done.report, &pass);
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const ExitPass::Sequence& sequence = pass.sequences()[i];
    const auto row = static_cast<std::size_t>(plan.sequences[i].row);
    if (sequence.left < 0) {
      done.report.sequences[row].miss = MissReason::kOverBudget;
      continue;
    }
    writes.add([this, left = sequence.left] { ++exits_[static_cast<std::size_t>(left)]; });
    done.rows[row] = {sequence.answer.to(wrapped_.profile.dtype).unsqueeze(0)};
    SequenceReport& report = done.report.sequences[row];
    report.source = Source::kEarlyExit;
    report.resumed_layer = sequence.left;
    report.expected_error = sequence.expected;
  }
  // There is an answer: whatever becomes of the audits, it is served.
  pass.close();
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const ExitPass::Sequence& sequence = pass.sequences()[i];
    const std::int64_t row = plan.sequences[i].row;
    if (sequence.audits.empty()) continue;
    if (sequence.left >= 0) {
      audit_later(policy, batch, row, sequence.audits, *jobs, [this](const Batch& one) { return compute(one); });
      continue;
    }
    SequenceReport& report = done.report.sequences[static_cast<std::size_t>(row)];
    try {  // the row was computed in full
      const auto& span = batch.spans[static_cast<std::size_t>(row)];
      const auto full = row_of(done.value, wrapped_.output, row, span.first, span.tokens, batch.padded_length)[0];
      report.error = record(*policy, sequence.audits, full, AuditPlace::kWithinCall);
      report.audited = true;
    } catch (...) {
      fail(*policy, sequence.audits, AuditPlace::kWithinCall, std::current_exception());
    }
  }
  return done;
}

/// The whole output of a batch of one row.
at::Tensor ExitReuse::compute(const Batch& row) const {
  wrapped_.model->check_unchanged();
  ForwardReport report;
  const auto result = execute_packed(*wrapped_.model, row, row.full_plan(wrapped_.layers()), {}, nullptr, report);
  const RowSpan& span = row.spans[0];
  return row_of(result, wrapped_.output, 0, span.first, span.tokens, row.padded_length)[0];
}

void ExitReuse::add_to(Stats& stats) const {
  BudgetStats& budget = *stats.budget;
  for (const auto& exits : exits_) {
    budget.exits_by_layer.push_back(exits);
    budget.early_exits += exits;
  }
  const auto policy = this->policy();
  if (policy == nullptr) return;
  budget.bytes = policy->exit.bytes();
  const auto entries = static_cast<std::uint64_t>(policy->exit.outputs.size(0));
  stats.entries += entries;
  stats.banks.push_back({.name = "early exits", .entries = entries, .bytes = budget.bytes});
}

}  // namespace llmcache
