#include "reuse/budget/state_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "llmcache/error.h"
#include "model/tensors_of.h"
#include "refresh/output_error.h"
#include "reuse/strategy.h"

namespace llmcache {

std::shared_ptr<StatePolicy> StateReuse::make_policy(const ReuseChoice& choice) const {
  std::size_t setting = 0;
  while (setting < strategy_->settings() && strategy_->describe(setting) != choice.setting) ++setting;
  if (choice.mechanism != strategy_->name() || setting == strategy_->settings()) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("the calibration profile does not fit this cache: it chose {} with '{}', which there is "
                            "none of for this model and version; calibrate again",
                            choice.mechanism, choice.setting));
  }
  if (choice.format != options_.format) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("the calibration profile does not fit this cache: it was made with states held as {}, and "
                            "BudgetOptions.format is {}",
                            to_string(choice.format), to_string(options_.format)));
  }
  std::vector<RiskGate::Settings> gates;
  if (options_.audit_rate > 0) {
    RiskGate::Settings& watch = gates.emplace_back();
    watch.epsilon = choice.epsilon > 0 ? choice.epsilon : options_.budget.epsilon;
    watch.audit_rate = options_.audit_rate;
    watch.seed = options_.seed;
  }
  const OutputError error(options_.budget.metric, options_.scores, first_output_.per_token(), choice.typical_distance);
  return std::make_shared<StatePolicy>(setting, choice, error, failures_, gates);
}

void StateReuse::install(std::shared_ptr<StatePolicy> policy) {
  {
    const std::lock_guard lock(mutex_);
    policy_ = std::move(policy);
  }
  // A request that still runs by the old policy may add to it: states that it did not approximate, which are kept by
  // any policy.
  strategy_->clear();
}

std::shared_ptr<StatePolicy> StateReuse::policy() const {
  const std::lock_guard lock(mutex_);
  return policy_;
}

StateReuse::Decisions StateReuse::decide(StatePolicy& policy, const Batch& batch,
                                         const TunableStrategy::Matches& matches) {
  Decisions decisions;
  decisions.reused.resize(static_cast<std::size_t>(batch.rows));
  for (std::size_t row = 0; row < decisions.reused.size(); ++row) {
    if (batch.spans[row].tokens == 0) continue;
    const bool could = matches.distance[row] && *matches.distance[row] <= policy.match_threshold;
    if (policy.supervision.thresholds() == 0) {
      decisions.reused[row] = could;
      continue;
    }
    const auto decision = policy.supervision.next(0, could);
    if (!could) continue;
    if (decision.audit) {
      decisions.audited.push_back(static_cast<std::int64_t>(row));
      decisions.audits.push_back({0, decision});
    }
    decisions.reused[row] = decision.reuse || decision.audit;
  }
  return decisions;
}

PassResult StateReuse::run(const std::shared_ptr<StatePolicy>& policy, const Batch& batch,
                           const RequestOptions& request, DeferredWrites& writes, BackgroundJobs* jobs) {
  const auto matches = strategy_->find(batch, request.tenant, policy->setting);
  const Decisions decisions = decide(*policy, batch, *matches);
  PassResult done;
  done.cut = wrapped_.profile.causal && wrapped_.profile.head_tokenwise;
  // If it throws nothing is served by reuse, and the gate is never told of the audits that it asked for.
  done.value = strategy_->run(
      {batch, *matches, decisions.reused, policy->setting, request.tenant, request.output, &writes}, done.report);
  tell_misses(*matches, done.report.sequences);
  // What a closed gate watches is never served.
  const bool later = jobs != nullptr && std::ranges::all_of(decisions.audits, [](const AskedAudit& audit) {
                       return audit.decision.reuse;
                     });
  if (later) {
    audit_in_background(policy, batch, decisions, request, done.value, *jobs);
  } else if (!decisions.audited.empty()) {
    audit_now(*policy, batch, decisions, request, done, writes);
  }
  const auto served = std::ranges::count(done.report.sequences, Source::kPartial, &SequenceReport::source);
  writes.add([this, served] { served_ += static_cast<std::uint64_t>(served); });
  return done;
}

/// Why rows that are known in part were not approximated.
void StateReuse::tell_misses(const TunableStrategy::Matches& matches, std::vector<SequenceReport>& sequences) {
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    if (sequences[row].source == Source::kPartial) continue;
    if (matches.distance[row]) {
      sequences[row].miss = MissReason::kOverBudget;
    } else if (row < matches.not_worth.size() && matches.not_worth[row] != 0) {
      sequences[row].miss = MissReason::kNotWorth;
    }
  }
}

/// Rows without approximation; kept when `writes` are taken, null: not.
c10::IValue StateReuse::compute(std::size_t setting, const Batch& rows, const std::string& tenant, Output output,
                                DeferredWrites* writes, ForwardReport& report) {
  const auto known = strategy_->find(rows, tenant, setting);
  const std::vector<char> reused(static_cast<std::size_t>(rows.rows));
  return strategy_->run({rows, *known, reused, setting, tenant, output, writes}, report);
}

/// What is compared of a row: of a decoder's tokens the last one alone, where only that counts.
at::Tensor StateReuse::audited_part(const c10::IValue& result, const Batch& batch, std::int64_t row) const {
  const auto answer = first_output_(result, batch, row);
  const bool last = first_output_.per_token() && options_.budget.metric == BudgetMetric::kTokenAgreement;
  return last ? answer.narrow(1, answer.size(1) - 1, 1) : answer;
}

/// The answers are served whatever becomes of it.
void StateReuse::audit_in_background(const std::shared_ptr<StatePolicy>& policy, const Batch& batch,
                                     const Decisions& decisions, const RequestOptions& request,
                                     const c10::IValue& result, BackgroundJobs& jobs) {
  for (std::size_t i = 0; i < decisions.audited.size(); ++i) {
    const std::int64_t row = decisions.audited[i];
    std::vector<PendingAudit> audits{{decisions.audits[i], {}}};
    try {
      audits[0].answer = audited_part(result, batch, row).clone();  // the result is the caller's
      // Nothing is kept: the cache may have been emptied since.
      const auto full = [this, setting = policy->setting, tenant = request.tenant,
                         output = request.output](const Batch& one) {
        wrapped_.model->check_unchanged();
        ForwardReport report;
        return audited_part(compute(setting, one, tenant, output, nullptr, report), one, 0);
      };
      audit_later(policy, batch, row, audits, jobs, full);
    } catch (...) {
      fail(*policy, audits, AuditPlace::kInBackground, std::current_exception());
    }
  }
}

/// Answers the audited rows by the full computation. Throws, all of them counted as failed, if that fails: the caller
/// then answers all rows without reuse. If only the comparison fails the full computation is the answer all the same.
void StateReuse::audit_now(StatePolicy& policy, const Batch& batch, const Decisions& decisions,
                           const RequestOptions& request, PassResult& answer, DeferredWrites& writes) {
  const Batch part = batch.select(decisions.audited);
  ForwardReport report;
  c10::IValue full;
  try {
    full = compute(policy.setting, part, request.tenant, request.output, &writes, report);
  } catch (...) {
    for (const AskedAudit& audit : decisions.audits) {
      policy.supervision.fail({audit}, AuditPlace::kWithinCall, std::current_exception());
    }
    throw;
  }
  const auto tensors = tensors_of(full);
  answer.rows.resize(static_cast<std::size_t>(batch.rows));
  for (std::size_t i = 0; i < decisions.audited.size(); ++i) {
    const auto row = static_cast<std::size_t>(decisions.audited[i]);
    const auto own = static_cast<std::int64_t>(i);
    SequenceReport& sequence = answer.report.sequences[row];
    sequence = report.sequences[i];
    const std::vector<PendingAudit> audits{
        {decisions.audits[i], audited_part(answer.value, batch, decisions.audited[i])}};
    try {
      sequence.error = record(policy, audits, audited_part(full, part, own), AuditPlace::kWithinCall);
      sequence.audited = true;
    } catch (...) {
      fail(policy, audits, AuditPlace::kWithinCall, std::current_exception());
    }
    const RowSpan& span = batch.spans[row];
    answer.rows[row] = answer.cut ? row_of(full, wrapped_.output, own, 0, 0, -1)
                                  : row_of(full, wrapped_.output, own, span.first, span.tokens, batch.padded_length);
  }
}

void StateReuse::add_to(Stats& stats) const {
  add(stats, wrapped_.profile.causal ? "segments" : "token states", strategy_->counters());
  BudgetStats& budget = *stats.budget;
  (wrapped_.profile.causal ? budget.segment_reuses : budget.token_reuses) = served_;
}

}  // namespace llmcache
