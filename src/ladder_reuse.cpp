#include "ladder_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "ladder_calibrator.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"

namespace llmcache {

LadderReuse::LadderReuse(std::unique_ptr<ReuseLadder> ladder, MakeLadder fresh, const Model& model,
                         const OutputSpec& output, const ModelProfile& profile, const BudgetOptions& options,
                         AuditFailures& failures)
    : ladder_(std::move(ladder)),
      fresh_(std::move(fresh)),
      model_(model),
      output_(output),
      profile_(profile),
      options_(options),
      first_output_(output),
      failures_(failures) {}

std::shared_ptr<LadderReuse::Rules> LadderReuse::rules() const {
  const std::lock_guard lock(mutex_);
  return rules_;
}

bool LadderReuse::ready() const { return rules() != nullptr; }

std::optional<ReuseChoice> LadderReuse::calibrate(const std::vector<Batch>& sample, std::size_t most_remembered,
                                                  ByteGauge& gauge) const {
  return LadderCalibrator(fresh_(), model_, output_, profile_, options_, most_remembered, gauge).calibrate(sample);
}

void LadderReuse::use(const std::optional<ReuseChoice>& choice) {
  std::shared_ptr<Rules> rules;
  if (choice) {
    std::size_t setting = 0;
    while (setting < ladder_->settings() && ladder_->describe(setting) != choice->setting) ++setting;
    if (choice->mechanism != ladder_->name() || setting == ladder_->settings()) {
      throw Error(ErrorCode::kInvalidOptions,
                  fmt::format("the calibration profile does not fit this cache: it chose {} with '{}', which there is "
                              "none of for this model and version; calibrate again",
                              choice->mechanism, choice->setting));
    }
    if (choice->format != options_.format) {
      throw Error(
          ErrorCode::kInvalidOptions,
          fmt::format("the calibration profile does not fit this cache: it was made with states held as {}, and "
                      "BudgetOptions.format is {}",
                      to_string(choice->format), to_string(options_.format)));
    }
    std::vector<RiskGate::Settings> gates;
    if (options_.audit_rate > 0) {
      RiskGate::Settings& watch = gates.emplace_back();
      watch.epsilon = options_.budget.epsilon;
      watch.audit_rate = options_.audit_rate;
      watch.seed = options_.seed;
    }
    rules = std::make_shared<Rules>(
        setting, choice->limit,
        OutputError(options_.budget.metric, options_.scores, first_output_.per_token(), choice->typical_distance),
        failures_, gates);
  }
  {
    const std::lock_guard lock(mutex_);
    rules_ = std::move(rules);
  }
  // What was certified began with an empty bank, and so does what serves. A request that still runs by the old rules
  // may add to it: states that it did not approximate, which are kept by any rules.
  ladder_->clear();
}

/// What is done with the rows of a batch.
struct LadderReuse::Chosen {
  std::vector<char> reused;           ///< by row
  std::vector<std::int64_t> audited;  ///< rows
  std::vector<AskedAudit> audits;     ///< of these
};

LadderReuse::Chosen LadderReuse::choose(Rules& rules, const Batch& batch, const ReuseLadder::Matches& matches) {
  Chosen chosen;
  chosen.reused.resize(static_cast<std::size_t>(batch.rows));
  for (std::size_t row = 0; row < chosen.reused.size(); ++row) {
    if (batch.spans[row].tokens == 0) continue;
    const bool could = matches.distance[row] && *matches.distance[row] <= rules.limit;
    if (rules.supervision.levels() == 0) {
      chosen.reused[row] = could;
      continue;
    }
    const auto decision = rules.supervision.next(0, could);
    if (!could) continue;
    if (decision.audit) {
      chosen.audited.push_back(static_cast<std::int64_t>(row));
      chosen.audits.push_back({0, decision});
    }
    chosen.reused[row] = decision.reuse || decision.audit;
  }
  return chosen;
}

std::optional<c10::IValue> LadderReuse::run(const Batch& batch, const std::string& tenant, Output output,
                                            ForwardReport& report, BackgroundAudits* audits, KeptLater& kept) {
  const auto rules = this->rules();
  if (rules == nullptr) return std::nullopt;
  const auto matches = ladder_->find(batch, tenant, rules->setting);
  const Chosen chosen = choose(*rules, batch, *matches);
  // If it throws nothing is served by reuse, and the gate is never told of the audits that it asked for.
  auto result = ladder_->run_for(batch, *matches, chosen.reused, rules->setting, tenant, output, &kept, report);
  if (!chosen.audited.empty()) {
    // What a closed gate watches is never served.
    const bool later = audits != nullptr &&
                       std::ranges::all_of(chosen.audits, [](const AskedAudit& audit) { return audit.decision.reuse; });
    if (later) {
      audit_later(rules, batch, chosen, result, tenant, output, *audits);
    } else {
      result = audit_now(*rules, batch, chosen, result, tenant, output, report, kept);
    }
  }
  const auto served = std::ranges::count(report.sequences, Source::kPartial, &SequenceReport::source);
  kept.add([this, served] { served_ += static_cast<std::uint64_t>(served); });
  return result;
}

/// Puts the comparison in the queue. The answer is served whatever becomes of that.
void LadderReuse::audit_later(const std::shared_ptr<Rules>& rules, const Batch& batch, const Chosen& chosen,
                              const c10::IValue& result, const std::string& tenant, Output output,
                              BackgroundAudits& queue) {
  try {
    std::vector<at::Tensor> answers;
    const Batch part = batch.select(chosen.audited);
    std::size_t bytes = part.input_bytes();
    for (const std::int64_t row : chosen.audited) {
      // Of a decoder's only the last token is compared. A copy: the result is the caller's.
      const auto answer = first_output_(result, batch, row);
      const bool last = first_output_.per_token() && options_.budget.metric == BudgetMetric::kTokenAgreement;
      answers.push_back((last ? answer.narrow(1, answer.size(1) - 1, 1) : answer).clone());
      bytes += answers.back().nbytes();
    }
    const auto job = [this, rules, part, audits = chosen.audits, answers, tenant, output] {
      // Nothing is kept: the cache may have been emptied since.
      audit(*rules, part, audits, answers, tenant, output, nullptr);
    };
    if (queue.add(job, bytes)) {
      rules->supervision.queued();
    } else {
      for (const AskedAudit& audit : chosen.audits) rules->supervision.drop({audit});
    }
  } catch (...) {
    fail(*rules, chosen.audits, AuditPlace::kInBackground);
  }
}

/// Answers the audited rows by the full computation. Throws if that fails: the caller then answers all rows without
/// reuse. If only the comparison fails the full computation is the answer all the same.
c10::IValue LadderReuse::audit_now(Rules& rules, const Batch& batch, const Chosen& chosen, const c10::IValue& result,
                                   const std::string& tenant, Output output, ForwardReport& report, KeptLater& kept) {
  std::vector<at::Tensor> answers;
  for (const std::int64_t row : chosen.audited) answers.push_back(first_output_(result, batch, row));
  const Audited told = audit(rules, batch.select(chosen.audited), chosen.audits, answers, tenant, output, &kept);
  for (std::size_t i = 0; i < chosen.audited.size(); ++i) {
    SequenceReport& row = report.sequences[static_cast<std::size_t>(chosen.audited[i])];
    row = told.report.sequences[i];
    row.shadowed = told.errors[i].has_value();
    row.drift = told.errors[i].value_or(0);
  }
  const auto exact = tensors_of(told.full);
  std::size_t leaf = 0;
  return map_tensors(result, [&](const at::Tensor& tensor) {
    const int dim = output_.leaves[leaf].batch;
    auto patched = tensor.clone();
    for (std::size_t i = 0; i < chosen.audited.size(); ++i) {
      patched.narrow(dim, chosen.audited[i], 1).copy_(exact[leaf].narrow(dim, static_cast<std::int64_t>(i), 1));
    }
    ++leaf;
    return patched;
  });
}

/// Computes rows in full, compares them with their answers, and tells the supervision of each. Within a call what was
/// computed is kept. Throws, all of them counted as failed, if they cannot be computed.
LadderReuse::Audited LadderReuse::audit(Rules& rules, const Batch& rows, const std::vector<AskedAudit>& audits,
                                        const std::vector<at::Tensor>& answers, const std::string& tenant,
                                        Output output, KeptLater* kept) {
  const AuditPlace place = kept != nullptr ? AuditPlace::kWithinCall : AuditPlace::kInBackground;
  Audited audited;
  try {
    if (place == AuditPlace::kInBackground) model_.check_unchanged();
    const auto nothing = ladder_->find(rows, tenant, rules.setting);
    audited.full = ladder_->run_for(rows, *nothing, std::vector<char>(answers.size()), rules.setting, tenant, output,
                                    kept, audited.report);
  } catch (...) {
    fail(rules, audits, place);
    throw;
  }
  for (std::size_t i = 0; i < answers.size(); ++i) {
    auto& error = audited.errors.emplace_back();
    try {
      error = rules.error(answers[i], first_output_(audited.full, rows, static_cast<std::int64_t>(i)));
      rules.supervision.record(audits[i], *error, place);
    } catch (...) {
      fail(rules, {audits[i]}, place);
    }
  }
  return audited;
}

/// Called while what ended them is being handled.
void LadderReuse::fail(Rules& rules, const std::vector<AskedAudit>& audits, AuditPlace place) {
  for (const AskedAudit& audit : audits) rules.supervision.fail({audit}, place, std::current_exception());
}

void LadderReuse::fill(Stats& stats) const {
  const auto c = ladder_->counters();
  stats.entries += c.entries;
  stats.insertions += c.insertions;
  stats.evictions += c.evictions;
  stats.rejected += c.rejected;
  const auto rules = this->rules();
  if (rules == nullptr) return;
  BudgetStats& budget = *stats.budget;
  (profile_.causal ? budget.segment_reuses : budget.token_reuses) = served_;
  budget.calibrated = true;
  budget.levels = 1;
  if (rules->supervision.levels() == 0) return;
  const auto gate = rules->supervision.counters();
  budget.level = gate.open ? 0 : 1;
  budget.audits = gate.audits;
  budget.audit_errors = gate.losses;
  budget.closings = gate.closings;
  budget.reopenings = gate.reopenings;
}

}  // namespace llmcache
