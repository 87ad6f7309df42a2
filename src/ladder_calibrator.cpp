#include "ladder_calibrator.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "execute/engine.h"
#include "execute/run_model.h"
#include "llmcache/error.h"
#include "refresh/risk_bound.h"

namespace llmcache {
namespace {

constexpr std::size_t kTypicalDraws = 64;  // outputs that the typical distance is taken from
constexpr std::size_t kLeastDraws = 20;    // fewer certify nothing
constexpr double kWarmUp = 0.2;            // of the sample, which fills the bank before anything counts
constexpr double kExplored = 0.5;          // of the sample, on which settings are put in order; the rest certifies
constexpr std::size_t kGiveUpAfter = 200;  // sequences without a match
constexpr double kWorthIt = 0.9;           // part of the token-layers that a choice may compute at most
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

std::size_t part_of(std::span<const Batch> requests, double share) {
  return static_cast<std::size_t>(share * static_cast<double>(requests.size()));
}

std::size_t sequences_of(std::span<const Batch> requests) {
  std::size_t sequences = 0;
  for (const Batch& batch : requests) {
    sequences += static_cast<std::size_t>(
        std::count_if(batch.spans.begin(), batch.spans.end(), [](const RowSpan& span) { return span.tokens > 0; }));
  }
  return sequences;
}

}  // namespace

LadderCalibrator::LadderCalibrator(std::unique_ptr<ReuseLadder> ladder, const Model& model, const OutputSpec& output,
                                   const ModelProfile& profile, const BudgetOptions& options,
                                   std::size_t most_remembered, ByteGauge& gauge)
    : ladder_(std::move(ladder)),
      model_(model),
      profile_(profile),
      options_(options),
      first_output_(output),
      most_remembered_(std::min(most_remembered, kRemembered)),
      held_(gauge) {}

void LadderCalibrator::check_size(std::span<const Batch> sample) const {
  const std::size_t warm_up = part_of(sample, kWarmUp);
  const std::size_t explored = part_of(sample, kExplored);
  const std::size_t ordering = sequences_of(sample.subspan(warm_up, explored - warm_up));
  const std::size_t certifying = sequences_of(sample.subspan(explored));
  if (std::min(ordering, certifying) >= kLeastDraws) return;
  throw Error(ErrorCode::kInvalidInput,
              fmt::format("calibration of {} has {} sequences in {} requests, of which {} would put settings in order "
                          "and {} certify; at least {} are needed for each, so at least {} sequences in requests of "
                          "like size, and some thousands to certify an error of 0.01",
                          ladder_->name(), sequences_of(sample), sample.size(), ordering, certifying, kLeastDraws,
                          std::llround(std::ceil(static_cast<double>(kLeastDraws) / (kExplored - kWarmUp)))));
}

/// A run of the private ladder. Keeps count of what is held.
c10::IValue LadderCalibrator::run(const Batch& batch, const ReuseLadder::Matches& matches,
                                  const std::vector<char>& reused, std::size_t setting, bool keep,
                                  ForwardReport& report) {
  auto result = run_model([&] { return ladder_->run(batch, matches, reused, setting, "", asked_for(), keep, report); });
  held_.set(ladder_->counters().bytes + remembered_);
  return result;
}

/// Of outputs spread over the sample, as many as may be remembered.
double LadderCalibrator::typical_distance(std::span<const Batch> sample) const {
  std::vector<at::Tensor> outputs;
  std::size_t bytes = 0;
  const std::size_t step = std::max<std::size_t>(1, sample.size() / kTypicalDraws);
  for (std::size_t i = 0; i < sample.size() && outputs.size() < kTypicalDraws; i += step) {
    ForwardReport report;
    const auto plan = sample[i].full_plan(static_cast<std::int32_t>(model_.layers()));
    if (plan.sequences.empty()) continue;
    const auto result = run_model([&] { return execute_packed(model_, sample[i].inputs, plan, {}, nullptr, report); });
    const auto output = first_output_(result, sample[i], plan.sequences[0].row);
    bytes += output.nbytes();
    if (bytes > most_remembered_ && outputs.size() > 1) break;
    outputs.push_back(output.clone());
  }
  const double distance = OutputError::typical_distance(outputs, first_output_.per_token());
  return std::isfinite(distance) ? distance : 0;
}

/// Computes rows in full. Those in `kept` stay in the bank.
std::vector<at::Tensor> LadderCalibrator::compute(const Batch& batch, const std::vector<char>& kept) {
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
    const auto result = run(part, *nothing, std::vector<char>(rows.size()), 0, keep != 0, report);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      outputs[static_cast<std::size_t>(rows[i])] = first_output_(result, part, static_cast<std::int64_t>(i));
    }
  }
  return outputs;
}

/// A decoder answers with its last token; an encoder has no use for one alone.
Output LadderCalibrator::asked_for() const {
  return profile_.head_tokenwise && profile_.causal ? Output::kLastToken : Output::kAll;
}

std::vector<LadderDraw> LadderCalibrator::explore(std::span<const Batch> sample, std::size_t warm_up,
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
      const auto result = run(batch, *matches, reused, s, false, report);
      for (std::size_t row = 0; row < rows; ++row) {
        part[row] = computed_by(report, row);
        if (reused[row]) own[row] = first_output_(result, batch, static_cast<std::int64_t>(row));
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

/// What the rows of a request give in full; remembered for the next trial as long as there is room.
std::vector<at::Tensor> LadderCalibrator::full_outputs(std::size_t request, const Batch& batch) {
  const auto known = full_.find(request);
  if (known != full_.end()) return known->second;
  auto full = compute(batch, std::vector<char>(static_cast<std::size_t>(batch.rows), 0));
  std::size_t bytes = 0;
  for (const at::Tensor& one : full) bytes += one.defined() ? one.nbytes() : 0;
  if (bytes > most_remembered_ - remembered_) return full;
  for (at::Tensor& one : full) one = one.defined() ? one.clone() : one;  // a view would hold the whole result
  remembered_ += bytes;
  full_.emplace(request, full);
  return full;
}

/// Serves the sample as a cache would. `sample` is the same at every call.
LadderCalibrator::Trial LadderCalibrator::try_out(std::span<const Batch> sample, std::size_t warm_up,
                                                  std::size_t setting, double limit, const OutputError& error) {
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
    const auto result = run(batch, *matches, reused, setting, true, report);
    if (i < warm_up) continue;
    const auto full = any ? full_outputs(i, batch) : std::vector<at::Tensor>{};
    for (std::size_t row = 0; row < rows; ++row) {
      if (batch.spans[row].tokens == 0) continue;
      const auto got = static_cast<std::int64_t>(row);
      trial.errors.push_back(reused[row] ? error(first_output_(result, batch, got), full[row]) : 0);
      trial.computed += reused[row] ? computed_by(report, row) : 1;
    }
  }
  trial.computed /= static_cast<double>(std::max<std::size_t>(1, trial.errors.size()));
  return trial;
}

std::optional<ReuseChoice> LadderCalibrator::calibrate(const std::vector<Batch>& sample) {
  const Budget& budget = options_.budget;
  ReuseChoice choice;
  choice.mechanism = ladder_->name();
  choice.format = options_.format;
  const auto all = std::span(sample).first(std::min(sample.size(), kMostRequests));
  check_size(all);
  const bool per_token = first_output_.per_token();
  if (budget.metric == BudgetMetric::kRelativeError) {
    choice.typical_distance = typical_distance(all);
    if (!(choice.typical_distance > 0)) return std::nullopt;
  }
  const OutputError error(budget.metric, options_.scores, per_token, choice.typical_distance);
  const std::size_t warm_up = part_of(all, kWarmUp);
  const std::size_t explored = part_of(all, kExplored);
  const auto draws = explore(all.first(explored), warm_up, error);
  if (draws.size() < kLeastDraws) return std::nullopt;
  const auto& limits = ladder_->limits();
  const bool binary =
      budget.metric == BudgetMetric::kTokenAgreement || (budget.metric == BudgetMetric::kDecision && !per_token);
  bool found = false;
  // Served as a cache would serve it, from the safest setting on, up to the first that cannot be certified.
  for (const std::size_t rung : choose_rungs(draws, budget.epsilon)) {
    const double limit = limits[rung % limits.size()];
    const Trial trial = try_out(all.subspan(explored - warm_up), warm_up, rung / limits.size(), limit, error);
    const double p_value = test_of(trial.errors, budget.epsilon, budget.delta, binary);
    if (trial.errors.size() < kLeastDraws || !(p_value <= budget.delta)) break;
    if (trial.computed > std::min(kWorthIt, choice.computed)) continue;  // served, it may compute more than explored
    found = true;
    choice.setting = ladder_->describe(rung / limits.size());
    choice.limit = limit;
    choice.fitted = static_cast<std::int64_t>(draws.size());
    choice.certified = static_cast<std::int64_t>(trial.errors.size());
    choice.error =
        std::accumulate(trial.errors.begin(), trial.errors.end(), 0.0) / static_cast<double>(trial.errors.size());
    choice.bound = upper_bound(trial.errors, budget.delta, binary);
    choice.computed = trial.computed;
  }
  if (!found) return std::nullopt;
  return choice;
}

}  // namespace llmcache
