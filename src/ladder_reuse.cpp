#include "ladder_reuse.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "execute/engine.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"
#include "refresh/ladder_calibration.h"

namespace llmcache {
namespace {

constexpr std::size_t kTypicalDraws = 64;    // outputs that the typical distance is taken from
constexpr std::size_t kLeastDraws = 40;      // fewer certify nothing
constexpr double kWarmUp = 0.2;              // of the sample, which fills the bank before anything counts
constexpr std::size_t kMostRequests = 1000;  // of the sample: each runs several times
constexpr std::size_t kGiveUpAfter = 200;    // sequences without a match
constexpr double kWorthIt = 0.9;             // part of the token-layers that a choice may compute at most

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

std::optional<ReuseChoice> LadderReuse::calibrate(const std::vector<Batch>& sample) {
  const Budget& budget = options_.budget;
  ReuseChoice choice;
  choice.mechanism = ladder_->name();
  choice.format = options_.format;
  std::optional<OutputError> error;  // made when first needed: most traffic has nothing in common
  // A decoder answers with its last token; an encoder has no use for one alone.
  const Output output = profile_.head_tokenwise && profile_.causal ? Output::kLastToken : Output::kAll;
  const auto& limits = ladder_->limits();
  std::vector<LadderDraw> draws;
  std::size_t seen = 0;
  bool any_match = false;
  ladder_->clear();
  const std::size_t requests = std::min(sample.size(), kMostRequests);
  for (std::size_t i = 0; i < requests; ++i) {
    const Batch& batch = sample[i];
    if (batch.tokens == 0) continue;
    const auto rows = static_cast<std::size_t>(batch.rows);
    const auto warm = static_cast<double>(i) >= kWarmUp * static_cast<double>(requests);
    // By setting: distance and error of each row.
    std::vector<std::vector<std::optional<double>>> distances;
    std::vector<c10::IValue> results;
    std::vector<std::vector<double>> computed;
    if (warm && !error) {
      choice.typical_distance = typical_distance(sample);
      if (budget.metric == BudgetMetric::kRelativeError && !(choice.typical_distance > 0)) break;
      error.emplace(budget.metric, options_.scores, per_token_, choice.typical_distance);
    }
    for (std::size_t s = 0; warm && s < ladder_->settings(); ++s) {
      const auto matches = ladder_->find(batch, "", s);
      distances.push_back(matches->distance);
      auto& result = results.emplace_back();
      auto& part = computed.emplace_back(rows, 1.0);
      std::vector<char> reused(rows);
      bool any = false;
      for (std::size_t row = 0; row < rows; ++row) any = (reused[row] = matches->distance[row].has_value()) || any;
      if (!any) continue;
      ForwardReport report;
      result = ladder_->run(batch, *matches, reused, s, "", output, false, report);
      for (std::size_t row = 0; row < rows; ++row) {
        ForwardReport one;
        one.sequences = {report.sequences[row]};
        part[row] = one.computed_fraction();
      }
    }
    ForwardReport report;
    const auto nothing = ladder_->find(batch, "", 0);
    any_match = any_match || std::any_of(nothing->distance.begin(), nothing->distance.end(),
                                         [](const auto& distance) { return distance.has_value(); });
    const auto full = ladder_->run(batch, *nothing, std::vector<char>(rows), 0, "", output, true, report);
    seen += rows;
    if (!any_match && seen > kGiveUpAfter) break;
    if (!warm) continue;
    for (std::size_t row = 0; row < rows; ++row) {
      if (batch.spans[row].tokens == 0) continue;
      const auto want = first_output(full, batch, static_cast<std::int64_t>(row));
      LadderDraw& draw = draws.emplace_back();
      for (std::size_t s = 0; s < ladder_->settings(); ++s) {
        const auto distance = distances[s][row];
        const double loss =
            distance ? (*error)(first_output(results[s], batch, static_cast<std::int64_t>(row)), want) : 0;
        for (const double limit : limits) {
          const bool used = distance && *distance <= limit;
          draw.errors.push_back(used ? loss : 0);
          draw.computed.push_back(used ? computed[s][row] : 1);
        }
      }
    }
  }
  ladder_->clear();
  if (!any_match || draws.size() < kLeastDraws) return std::nullopt;
  const bool binary =
      budget.metric == BudgetMetric::kTokenAgreement || (budget.metric == BudgetMetric::kDecision && !per_token_);
  const LadderChoice best = choose_setting(draws, budget, binary);
  if (best.setting < 0 || best.computed > kWorthIt) return std::nullopt;
  const auto setting = static_cast<std::size_t>(best.setting) / limits.size();
  choice.setting = ladder_->describe(setting);
  choice.limit = limits[static_cast<std::size_t>(best.setting) % limits.size()];
  choice.fitted = static_cast<std::int64_t>(best.ordered);
  choice.certified = static_cast<std::int64_t>(best.certified);
  choice.error = best.error;
  choice.bound = best.bound;
  choice.computed = best.computed;
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
                                            ForwardReport& report) {
  const auto rules = this->rules();
  if (rules == nullptr) return std::nullopt;
  const auto matches = ladder_->find(batch, tenant, rules->setting);
  const auto rows = static_cast<std::size_t>(batch.rows);
  std::vector<char> reused(rows);
  std::vector<std::int64_t> audited;
  std::vector<RiskGate::Decision> decisions(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    if (batch.spans[row].tokens == 0) continue;
    const bool could = matches->distance[row] && *matches->distance[row] <= rules->limit;
    if (rules->gate == nullptr) {
      reused[row] = could;
      continue;
    }
    decisions[row] = rules->gate->next(could);
    if (!could) continue;
    if (decisions[row].audit) audited.push_back(static_cast<std::int64_t>(row));
    reused[row] = decisions[row].reuse || decisions[row].audit;
  }
  auto result = ladder_->run(batch, *matches, reused, rules->setting, tenant, output, true, report);
  for (std::size_t row = 0; row < rows; ++row) {
    const bool answers = report.sequences[row].source == Source::kPartial && !decisions[row].audit;
    served_ += answers ? 1 : 0;
  }
  if (audited.empty()) return result;
  // Audited rows are computed in full too, which is what they are answered with.
  const Batch part = batch.select(audited);
  ForwardReport own;
  const auto nothing = ladder_->find(part, tenant, rules->setting);
  const auto full =
      ladder_->run(part, *nothing, std::vector<char>(audited.size()), rules->setting, tenant, output, true, own);
  for (std::size_t i = 0; i < audited.size(); ++i) {
    const auto row = static_cast<std::size_t>(audited[i]);
    SequenceReport& told = report.sequences[row];
    told.drift =
        rules->error(first_output(result, batch, audited[i]), first_output(full, part, static_cast<std::int64_t>(i)));
    rules->gate->record(decisions[row], told.drift);
    const double drift = told.drift;
    told = own.sequences[i];
    told.shadowed = true;
    told.drift = drift;
  }
  const auto exact = tensors_of(full);
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

void LadderReuse::fill(Stats& stats) const {
  const auto c = ladder_->counters();
  stats.entries += c.entries;
  stats.insertions += c.insertions;
  stats.evictions += c.evictions;
  stats.rejected += c.rejected;
  stats.bytes += c.bytes;
  stats.peak_bytes += c.peak_bytes;
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
