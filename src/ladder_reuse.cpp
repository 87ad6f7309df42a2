#include "ladder_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "execute/engine.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"
#include "refresh/ladder_calibration.h"
#include "refresh/risk_bound.h"

namespace llmcache {
namespace {

constexpr std::size_t kTypicalDraws = 64;    // outputs that the typical distance is taken from
constexpr std::size_t kLeastDraws = 20;      // fewer certify nothing
constexpr double kWarmUp = 0.2;              // of the sample, which fills the bank before anything counts
constexpr double kExplored = 0.5;            // of the sample, on which settings are put in order; the rest certifies
constexpr std::size_t kMostRequests = 1000;  // of the sample: each runs several times
constexpr std::size_t kGiveUpAfter = 200;    // sequences without a match
constexpr double kWorthIt = 0.9;             // part of the token-layers that a choice may compute at most
constexpr std::size_t kRemembered = std::size_t{256} << 20;  // bytes of full outputs

/// Token-layers of a row that were computed, of all.
double computed_by(const ForwardReport& report, std::size_t row) {
  ForwardReport one;
  one.sequences = {report.sequences[row]};
  return one.computed_fraction();
}

/// P-value of a mean error of epsilon or more.
double test_of(const std::vector<double>& errors, double epsilon, double delta, bool binary) {
  if (!binary) return betting_p_value(errors, epsilon, delta);
  return binomial_cdf(std::llround(std::accumulate(errors.begin(), errors.end(), 0.0)),
                      static_cast<std::int64_t>(errors.size()), epsilon);
}

}  // namespace

LadderReuse::LadderReuse(std::unique_ptr<ReuseLadder> ladder, const Model& model, const OutputSpec& output,
                         const ModelProfile& profile, const BudgetOptions& options)
    : ladder_(std::move(ladder)),
      model_(model),
      output_(output),
      profile_(profile),
      options_(options),
      per_token_(output.leaves.at(0).tokens >= 0) {}

std::shared_ptr<LadderReuse::Rules> LadderReuse::rules() const {
  const std::lock_guard lock(mutex_);
  return rules_;
}

bool LadderReuse::ready() const { return rules() != nullptr; }

/// The first tensor of a row's output, batch dimension 1, cut to the tokens that were asked for.
at::Tensor LadderReuse::first_output(const c10::IValue& result, const Batch& batch, std::int64_t row) const {
  const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
  const auto leaf = tensors_of(result).at(0);
  const TokenDims& dims = output_.leaves[0];
  auto own = leaf.narrow(dims.batch, row, 1);
  if (per_token_ && own.size(dims.tokens) == batch.width) own = own.narrow(dims.tokens, span.first, span.tokens);
  return own;
}

/// Of outputs spread over the sample.
double LadderReuse::typical_distance(const std::vector<Batch>& sample) const {
  std::vector<at::Tensor> outputs;
  const std::size_t step = std::max<std::size_t>(1, sample.size() / kTypicalDraws);
  for (std::size_t i = 0; i < sample.size() && outputs.size() < kTypicalDraws; i += step) {
    ForwardReport report;
    const auto plan = sample[i].full_plan(static_cast<std::int32_t>(model_.layers()));
    if (plan.sequences.empty()) continue;
    const auto result = execute_packed(model_, sample[i].inputs, plan, {}, nullptr, report);
    outputs.push_back(first_output(result, sample[i], plan.sequences[0].row).clone());
  }
  return OutputError::typical_distance(outputs, per_token_);
}

/// Computes rows in full. Those in `kept` stay in the bank.
std::vector<at::Tensor> LadderReuse::compute(const Batch& batch, const std::vector<char>& kept) {
  std::vector<at::Tensor> outputs(static_cast<std::size_t>(batch.rows));
  for (const char keep : {1, 0}) {
    std::vector<std::int64_t> rows;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const auto i = static_cast<std::size_t>(row);
      if (kept[i] == keep && batch.spans[i].tokens > 0) rows.push_back(row);
    }
    if (rows.empty()) continue;
    const Batch part = batch.select(rows);
    ForwardReport report;
    const auto nothing = ladder_->find(part, "", 0);
    const auto result =
        ladder_->run(part, *nothing, std::vector<char>(rows.size()), 0, "", asked_for(), keep != 0, report);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      outputs[static_cast<std::size_t>(rows[i])] = first_output(result, part, static_cast<std::int64_t>(i));
    }
  }
  return outputs;
}

/// A decoder answers with its last token; an encoder has no use for one alone.
Output LadderReuse::asked_for() const {
  return profile_.head_tokenwise && profile_.causal ? Output::kLastToken : Output::kAll;
}

std::vector<LadderDraw> LadderReuse::explore(std::span<const Batch> sample, std::size_t warm_up,
                                             const OutputError& error) {
  const auto& limits = ladder_->limits();
  std::vector<LadderDraw> draws;
  std::size_t seen = 0;
  bool any_match = false;
  for (std::size_t i = 0; i < sample.size(); ++i) {
    const Batch& batch = sample[i];
    if (batch.tokens == 0) continue;
    const auto rows = static_cast<std::size_t>(batch.rows);
    // Rows that a cache would reuse something for are not in its bank either.
    std::vector<char> kept(rows, 1);
    const auto known = ladder_->find(batch, "", 0);
    for (std::size_t row = 0; row < rows; ++row) {
      any_match = any_match || known->distance[row];
      kept[row] = !known->distance[row] || *known->distance[row] >= ladder_->kept_from();
    }
    seen += rows;
    if (!any_match && seen > kGiveUpAfter) return {};
    const bool counts = i >= warm_up;
    std::vector<std::vector<std::optional<double>>> distances;
    std::vector<std::vector<at::Tensor>> outputs;
    std::vector<std::vector<double>> computed;
    for (std::size_t s = 0; counts && s < ladder_->settings(); ++s) {
      const auto matches = ladder_->find(batch, "", s);
      distances.push_back(matches->distance);
      auto& own = outputs.emplace_back(rows);
      auto& part = computed.emplace_back(rows, 1.0);
      std::vector<char> reused(rows);
      bool any = false;
      for (std::size_t row = 0; row < rows; ++row) any = (reused[row] = matches->distance[row].has_value()) || any;
      if (!any) continue;
      ForwardReport report;
      const auto result = ladder_->run(batch, *matches, reused, s, "", asked_for(), false, report);
      for (std::size_t row = 0; row < rows; ++row) {
        part[row] = computed_by(report, row);
        if (reused[row]) own[row] = first_output(result, batch, static_cast<std::int64_t>(row));
      }
    }
    const auto full = compute(batch, kept);
    if (!counts) continue;
    for (std::size_t row = 0; row < rows; ++row) {
      if (!full[row].defined()) continue;
      LadderDraw& draw = draws.emplace_back();
      for (std::size_t s = 0; s < ladder_->settings(); ++s) {
        const double loss = distances[s][row] ? error(outputs[s][row], full[row]) : 0;
        for (const double limit : limits) {
          const bool used = distances[s][row] && *distances[s][row] <= limit;
          draw.errors.push_back(used ? loss : 0);
          draw.computed.push_back(used ? computed[s][row] : 1);
        }
      }
    }
  }
  return any_match ? draws : std::vector<LadderDraw>{};
}

LadderReuse::Trial LadderReuse::try_out(std::span<const Batch> sample, std::size_t warm_up, std::size_t setting,
                                        double limit, const OutputError& error, FullOutputs& known) {
  Trial trial;
  ladder_->clear();
  for (std::size_t i = 0; i < sample.size(); ++i) {
    const Batch& batch = sample[i];
    if (batch.tokens == 0) continue;
    const auto rows = static_cast<std::size_t>(batch.rows);
    const auto matches = ladder_->find(batch, "", setting);
    std::vector<char> reused(rows);
    bool any = false;
    for (std::size_t row = 0; row < rows; ++row) {
      reused[row] = matches->distance[row] && *matches->distance[row] <= limit;
      any = any || reused[row];
    }
    ForwardReport report;
    const auto result = ladder_->run(batch, *matches, reused, setting, "", asked_for(), true, report);
    if (i < warm_up) continue;
    std::vector<at::Tensor> full;
    if (any) {
      auto& remembered = known.outputs[i];
      full = remembered.empty() ? compute(batch, std::vector<char>(rows, 0)) : remembered;
      if (remembered.empty() && known.bytes < kRemembered) {
        remembered = full;
        for (const at::Tensor& one : full) known.bytes += one.defined() ? one.nbytes() : 0;
      }
    }
    for (std::size_t row = 0; row < rows; ++row) {
      if (batch.spans[row].tokens == 0) continue;
      const auto got = static_cast<std::int64_t>(row);
      trial.errors.push_back(reused[row] ? error(first_output(result, batch, got), full[row]) : 0);
      trial.computed += reused[row] ? computed_by(report, row) : 1;
    }
  }
  trial.computed /= static_cast<double>(std::max<std::size_t>(1, trial.errors.size()));
  return trial;
}

std::optional<ReuseChoice> LadderReuse::calibrate(const std::vector<Batch>& sample) {
  const Budget& budget = options_.budget;
  ReuseChoice choice;
  choice.mechanism = ladder_->name();
  choice.format = options_.format;
  const std::span all(sample.data(), std::min(sample.size(), kMostRequests));
  const auto part = [&](double share) { return static_cast<std::size_t>(share * static_cast<double>(all.size())); };
  choice.typical_distance = typical_distance(sample);
  if (budget.metric == BudgetMetric::kRelativeError && !(choice.typical_distance > 0)) return std::nullopt;
  const OutputError error(budget.metric, options_.scores, per_token_, choice.typical_distance);
  ladder_->clear();
  const auto draws = explore(all.first(part(kExplored)), part(kWarmUp), error);
  const auto& limits = ladder_->limits();
  const bool binary =
      budget.metric == BudgetMetric::kTokenAgreement || (budget.metric == BudgetMetric::kDecision && !per_token_);
  bool found = false;
  FullOutputs known;
  // Served as a cache would serve it, from the safest setting on, up to the first that cannot be certified.
  for (const std::size_t rung :
       draws.size() < kLeastDraws ? std::vector<std::size_t>{} : choose_rungs(draws, budget.epsilon)) {
    const std::size_t warm_up = part(kWarmUp);
    const auto tried = all.subspan(part(kExplored) - warm_up);
    const Trial trial = try_out(tried, warm_up, rung / limits.size(), limits[rung % limits.size()], error, known);
    const double p_value = test_of(trial.errors, budget.epsilon, budget.delta, binary);
    if (trial.errors.size() < kLeastDraws || !(p_value <= budget.delta)) break;
    if (trial.computed > std::min(kWorthIt, choice.computed)) continue;  // served, it may compute more than explored
    found = true;
    choice.setting = ladder_->describe(rung / limits.size());
    choice.limit = limits[rung % limits.size()];
    choice.fitted = static_cast<std::int64_t>(draws.size());
    choice.certified = static_cast<std::int64_t>(trial.errors.size());
    choice.error =
        std::accumulate(trial.errors.begin(), trial.errors.end(), 0.0) / static_cast<double>(trial.errors.size());
    choice.bound = upper_bound(trial.errors, budget.delta, binary);
    choice.computed = trial.computed;
  }
  ladder_->clear();
  if (!found) return std::nullopt;
  return choice;
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
    rules = std::make_shared<Rules>(
        setting, choice->limit,
        OutputError(options_.budget.metric, options_.scores, per_token_, choice->typical_distance), nullptr);
    if (options_.audit_rate > 0) {
      RiskGate::Settings watch;
      watch.epsilon = options_.budget.epsilon;
      watch.audit_rate = options_.audit_rate;
      watch.seed = options_.seed;
      rules->gate = std::make_unique<RiskGate>(watch);
    }
  }
  const std::lock_guard lock(mutex_);
  rules_ = std::move(rules);
}

std::optional<c10::IValue> LadderReuse::run(const Batch& batch, const std::string& tenant, Output output,
                                            ForwardReport& report, BackgroundAudits* audits, KeptLater& kept) {
  const auto rules = this->rules();
  if (rules == nullptr) return std::nullopt;
  const auto matches = ladder_->find(batch, tenant, rules->setting);
  const auto rows = static_cast<std::size_t>(batch.rows);
  std::vector<char> reused(rows);
  std::vector<std::int64_t> audited;
  std::vector<RiskGate::Decision> decisions;  // of these
  for (std::size_t row = 0; row < rows; ++row) {
    if (batch.spans[row].tokens == 0) continue;
    const bool could = matches->distance[row] && *matches->distance[row] <= rules->limit;
    if (rules->gate == nullptr) {
      reused[row] = could;
      continue;
    }
    const auto decision = rules->gate->next(could);
    if (!could) continue;
    if (decision.audit) {
      audited.push_back(static_cast<std::int64_t>(row));
      decisions.push_back(decision);
    }
    reused[row] = decision.reuse || decision.audit;
  }
  auto result = ladder_->run_for(batch, *matches, reused, rules->setting, tenant, output, &kept, report);
  const auto count = [&] {
    const auto served = std::ranges::count(report.sequences, Source::kPartial, &SequenceReport::source);
    kept.add([this, served] { served_ += static_cast<std::uint64_t>(served); });
  };
  if (audited.empty()) {
    count();
    return result;
  }
  std::vector<at::Tensor> answers;
  for (const std::int64_t row : audited) answers.push_back(first_output(result, batch, row));
  const Batch part = batch.select(audited);
  // What a closed gate watches is never served.
  if (audits != nullptr && std::ranges::all_of(decisions, &RiskGate::Decision::reuse)) {
    count();
    std::size_t bytes = 0;
    for (at::Tensor& answer : answers) {
      // Of a decoder's only the last token is compared. A copy: the result is the caller's.
      const bool last = per_token_ && options_.budget.metric == BudgetMetric::kTokenAgreement;
      answer = (last ? answer.narrow(1, answer.size(1) - 1, 1) : answer).clone();
      bytes += answer.nbytes();
    }
    audits->add(
        [this, rules, part, decisions, answers, tenant, output] {
          model_.check_unchanged();
          // Nothing is kept: the cache may have been emptied since.
          audit(*rules, part, decisions, answers, tenant, output, nullptr);
        },
        bytes);
    return result;
  }
  const Audited told = audit(*rules, part, decisions, answers, tenant, output, &kept);
  for (std::size_t i = 0; i < audited.size(); ++i) {
    SequenceReport& row = report.sequences[static_cast<std::size_t>(audited[i])];
    row = told.report.sequences[i];
    row.shadowed = true;
    row.drift = told.errors[i];
  }
  count();
  const auto exact = tensors_of(told.full);
  std::size_t leaf = 0;
  return map_tensors(result, [&](const at::Tensor& tensor) {
    const int dim = output_.leaves[leaf].batch;
    auto patched = tensor.clone();
    for (std::size_t i = 0; i < audited.size(); ++i) {
      patched.narrow(dim, audited[i], 1).copy_(exact[leaf].narrow(dim, static_cast<std::int64_t>(i), 1));
    }
    ++leaf;
    return patched;
  });
}

LadderReuse::Audited LadderReuse::audit(const Rules& rules, const Batch& rows,
                                        const std::vector<RiskGate::Decision>& decisions,
                                        const std::vector<at::Tensor>& answers, const std::string& tenant,
                                        Output output, KeptLater* kept) {
  Audited audited;
  const auto nothing = ladder_->find(rows, tenant, rules.setting);
  audited.full = ladder_->run_for(rows, *nothing, std::vector<char>(answers.size()), rules.setting, tenant, output,
                                  kept, audited.report);
  for (std::size_t i = 0; i < answers.size(); ++i) {
    audited.errors.push_back(rules.error(answers[i], first_output(audited.full, rows, static_cast<std::int64_t>(i))));
    rules.gate->record(decisions[i], audited.errors.back());
  }
  return audited;
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
  if (rules->gate == nullptr) return;
  const auto gate = rules->gate->counters();
  budget.level = gate.open ? 0 : 1;
  budget.audits = gate.audits;
  budget.audit_errors = gate.losses;
  budget.closings = gate.closings;
  budget.reopenings = gate.reopenings;
}

}  // namespace llmcache
