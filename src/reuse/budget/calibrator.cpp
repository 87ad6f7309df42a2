#include "reuse/budget/calibrator.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "caller_failed.h"
#include "execute/engine.h"
#include "execute/run_model.h"
#include "llmcache/error.h"
#include "refresh/risk_bound.h"
#include "refresh/sample_need.h"

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

Calibrator::Calibrator(std::unique_ptr<TunableStrategy> strategy, const WrappedModel& wrapped,
                       const BudgetOptions& options, std::size_t most_remembered, ByteGauge& gauge,
                       const ProgressFunction& progress)
    : strategy_(std::move(strategy)),
      wrapped_(wrapped),
      options_(options),
      first_output_(wrapped.output),
      most_remembered_(std::min(most_remembered, kRemembered)),
      held_(gauge),
      progress_(progress) {}

void Calibrator::check_size() const {
  const std::size_t ordering = sequences_of(sample_.subspan(warm_up_, explored_ - warm_up_));
  const std::size_t certifying = sequences_of(sample_.subspan(explored_));
  if (std::min(ordering, certifying) >= kLeastDraws) return;
  throw Error(ErrorCode::kInvalidInput,
              fmt::format("calibration of {} has {} sequences in {} requests, of which {} would put settings in order "
                          "and {} certify; at least {} are needed for each, so at least {} sequences in requests of "
                          "like size, and some thousands to certify an error of 0.01",
                          strategy_->name(), sequences_of(sample_), sample_.size(), ordering, certifying, kLeastDraws,
                          std::llround(std::ceil(static_cast<double>(kLeastDraws) / (kExplored - kWarmUp)))));
}

bool Calibrator::binary() const {
  const auto metric = options_.budget.metric;
  return metric == BudgetMetric::kTokenAgreement || (metric == BudgetMetric::kDecision && !first_output_.per_token());
}

/// A run of the private strategy. Keeps count of what is held.
c10::IValue Calibrator::run(const Batch& batch, const TunableStrategy::Matches& matches,
                            const std::vector<char>& reused, std::size_t setting, bool keep, ForwardReport& report) {
  static const std::string kNobody;
  DeferredWrites writes;
  auto result = run_model([&] {
    return strategy_->run({batch, matches, reused, setting, kNobody, asked_for(), keep ? &writes : nullptr}, report);
  });
  writes.commit();
  held_.set(strategy_->counters().bytes + remembered_);
  return result;
}

/// Of outputs spread over the sample, as many as may be remembered.
double Calibrator::typical_distance() const {
  std::vector<at::Tensor> outputs;
  std::size_t bytes = 0;
  const std::size_t step = std::max<std::size_t>(1, sample_.size() / kTypicalDraws);
  for (std::size_t i = 0; i < sample_.size() && outputs.size() < kTypicalDraws; i += step) {
    const Batch& batch = sample_[i];
    ForwardReport report;
    const auto plan = batch.full_plan(wrapped_.layers());
    if (plan.sequences.empty()) continue;
    const auto result = run_model([&] { return execute_packed(*wrapped_.model, batch, plan, {}, nullptr, report); });
    const auto output = first_output_(result, batch, plan.sequences[0].row);
    bytes += output.nbytes();
    if (bytes > most_remembered_ && outputs.size() > 1) break;
    outputs.push_back(output.clone());
  }
  const double distance = OutputError::typical_distance(outputs, first_output_.per_token());
  return std::isfinite(distance) ? distance : 0;
}

/// Computes rows in full. Those in `kept` stay in the bank.
std::vector<at::Tensor> Calibrator::compute(const Batch& batch, const std::vector<char>& kept) {
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
    const auto nothing = strategy_->find(part, "", 0);
    const auto result = run(part, *nothing, std::vector<char>(rows.size()), 0, keep != 0, report);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      outputs[static_cast<std::size_t>(rows[i])] = first_output_(result, part, static_cast<std::int64_t>(i));
    }
  }
  return outputs;
}

/// A decoder answers with its last token; an encoder has no use for one alone.
Output Calibrator::asked_for() const {
  return wrapped_.profile.head_tokenwise && wrapped_.profile.causal ? Output::kLastToken : Output::kAll;
}

bool Calibrator::explore(const std::vector<Batch>& sample) {
  sample_ = std::span(sample).first(std::min(sample.size(), kMostRequests));
  warm_up_ = part_of(sample_, kWarmUp);
  explored_ = part_of(sample_, kExplored);
  check_size();
  if (options_.budget.metric == BudgetMetric::kRelativeError) {
    typical_distance_ = typical_distance();
    if (!(typical_distance_ > 0)) {
      reason_ = "the outputs of different requests do not differ";
      return false;
    }
  }
  error_ = std::make_unique<OutputError>(options_.budget.metric, options_.scores, first_output_.per_token(),
                                         typical_distance_);
  std::size_t seen = 0;
  bool any_match = false;
  for (std::size_t i = 0; i < explored_; ++i) {
    const Batch& batch = sample_[i];
    if (batch.tokens == 0) continue;
    tell(progress_, "calibration: comparing settings", static_cast<std::int64_t>(i),
         static_cast<std::int64_t>(explored_));
    const auto rows = static_cast<std::size_t>(batch.rows);
    // Rows that a cache would reuse something for are not in its bank either.
    std::vector<char> kept(rows, 1);
    const auto known = strategy_->find(batch, "", 0);
    for (std::size_t row = 0; row < rows; ++row) {
      any_match = any_match || known->distance[row];
      kept[row] = !known->distance[row] || *known->distance[row] >= strategy_->kept_from();
    }
    seen += rows;
    if (!any_match && seen > kGiveUpAfter) break;
    explore_request(batch, kept, i >= warm_up_);
  }
  if (any_match && draws_.size() >= kLeastDraws) return true;
  reason_ = fmt::format("no request of the sample shares enough with one before it ({})", strategy_->name());
  return false;
}

/// Runs a request with each setting, then in full. `counts`: adds what came of it to draws_.
void Calibrator::explore_request(const Batch& batch, const std::vector<char>& kept, bool counts) {
  const auto rows = static_cast<std::size_t>(batch.rows);
  struct Ran {
    std::vector<std::optional<double>> distances;
    std::vector<at::Tensor> outputs;
    std::vector<double> computed;
  };
  std::vector<Ran> settings;
  for (std::size_t s = 0; counts && s < strategy_->settings(); ++s) {
    const auto matches = strategy_->find(batch, "", s);
    Ran& ran =
        settings.emplace_back(Ran{matches->distance, std::vector<at::Tensor>(rows), std::vector<double>(rows, 1)});
    std::vector<char> reused(rows);
    bool any = false;
    for (std::size_t row = 0; row < rows; ++row) any = (reused[row] = matches->distance[row].has_value()) || any;
    if (!any) continue;
    ForwardReport report;
    const auto result = run(batch, *matches, reused, s, false, report);
    for (std::size_t row = 0; row < rows; ++row) {
      ran.computed[row] = computed_by(report, row);
      if (reused[row]) ran.outputs[row] = first_output_(result, batch, static_cast<std::int64_t>(row));
    }
  }
  const auto full = compute(batch, kept);
  for (std::size_t row = 0; counts && row < rows; ++row) {
    if (!full[row].defined()) continue;
    CandidateDraw& draw = draws_.emplace_back();
    draw.tokens = batch.spans[row].tokens;
    for (const Ran& ran : settings) {
      const double loss = ran.distances[row] ? (*error_)(ran.outputs[row], full[row]) : 0;
      for (const double threshold : strategy_->match_thresholds()) {
        const bool used = ran.distances[row] && *ran.distances[row] <= threshold;
        draw.errors.push_back(used ? loss : 0);
        draw.computed.push_back(used ? ran.computed[row] : 1);
      }
    }
  }
}

/// The draws as they are if shorter sequences are left alone.
std::vector<CandidateDraw> Calibrator::draws_from(std::int64_t least_tokens) const {
  auto draws = draws_;
  for (CandidateDraw& draw : draws) {
    if (draw.tokens >= least_tokens) continue;
    std::fill(draw.errors.begin(), draw.errors.end(), 0.0);
    std::fill(draw.computed.begin(), draw.computed.end(), 1.0);
  }
  return draws;
}

std::optional<double> Calibrator::expected_cost(double epsilon, std::int64_t least_tokens) const {
  const auto draws = draws_from(least_tokens);
  const auto candidates = choose_candidates(draws, epsilon);
  if (candidates.empty()) return std::nullopt;
  double computed = 0;
  double tokens = 0;
  for (const CandidateDraw& draw : draws) {
    if (draw.tokens < least_tokens) continue;
    computed += static_cast<double>(draw.tokens) * draw.computed[candidates.back()];
    tokens += static_cast<double>(draw.tokens);
  }
  if (tokens == 0) return std::nullopt;
  return computed / tokens;
}

double Calibrator::token_share(std::int64_t least_tokens) const {
  double own = 0;
  double all = 0;
  for (const CandidateDraw& draw : draws_) {
    all += static_cast<double>(draw.tokens);
    own += draw.tokens >= least_tokens ? static_cast<double>(draw.tokens) : 0;
  }
  return all == 0 ? 0 : own / all;
}

std::int64_t Calibrator::longest() const {
  std::int64_t longest = 0;
  for (const CandidateDraw& draw : draws_) longest = std::max(longest, draw.tokens);
  return longest;
}

/// What the rows of a request give in full; remembered for the next trial as long as there is room.
std::vector<at::Tensor> Calibrator::full_outputs(std::size_t request, const Batch& batch) {
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

/// Serves the certifying part as a cache would, warmed up with what came before.
Calibrator::TrialRun Calibrator::try_out(std::size_t setting, double match_threshold, std::int64_t least_tokens) {
  TrialRun trial;
  double all_tokens = 0;
  strategy_->clear();
  const std::size_t first = explored_ - warm_up_;
  for (std::size_t i = first; i < sample_.size(); ++i) {
    tell(progress_, "calibration: certifying a setting", static_cast<std::int64_t>(i - first),
         static_cast<std::int64_t>(sample_.size() - first));
    std::vector<std::int64_t> own;  // rows
    for (std::int64_t row = 0; row < sample_[i].rows; ++row) {
      const std::int64_t tokens = sample_[i].spans[static_cast<std::size_t>(row)].tokens;
      if (tokens >= std::max<std::int64_t>(least_tokens, 1)) {
        own.push_back(row);
      } else if (tokens > 0 && i >= explored_) {
        trial.errors.push_back(0);
        trial.computed += static_cast<double>(tokens);
        all_tokens += static_cast<double>(tokens);
      }
    }
    if (own.empty()) continue;
    const bool all = static_cast<std::int64_t>(own.size()) == sample_[i].rows;
    const Batch part = all ? sample_[i] : sample_[i].select(own);
    const auto rows = static_cast<std::size_t>(part.rows);
    const auto matches = strategy_->find(part, "", setting);
    std::vector<char> reused(rows);
    bool any = false;
    for (std::size_t row = 0; row < rows; ++row) {
      reused[row] = matches->distance[row] && *matches->distance[row] <= match_threshold;
      any = any || reused[row];
    }
    ForwardReport report;
    const auto result = run(part, *matches, reused, setting, true, report);
    if (i < explored_) continue;
    const auto full = any ? full_outputs(i, part) : std::vector<at::Tensor>{};
    for (std::size_t row = 0; row < rows; ++row) {
      const auto got = static_cast<std::int64_t>(row);
      trial.errors.push_back(reused[row] ? (*error_)(first_output_(result, part, got), full[row]) : 0);
      const auto tokens = static_cast<double>(part.spans[row].tokens);
      trial.computed += tokens * (reused[row] ? computed_by(report, row) : 1);
      all_tokens += tokens;
    }
  }
  trial.computed /= std::max(1.0, all_tokens);
  return trial;
}

std::optional<ReuseChoice> Calibrator::certify(const Budget& budget, std::int64_t least_tokens) {
  full_.clear();  // of other rows, maybe
  remembered_ = 0;
  const auto draws = draws_from(least_tokens);
  const auto& thresholds = strategy_->match_thresholds();
  std::optional<ReuseChoice> best;
  reason_ =
      fmt::format("no setting of {} computes less at an error below epsilon = {:g}", strategy_->name(), budget.epsilon);
  // Served as a cache would serve it, from the safest candidate on, up to the first that cannot be certified.
  for (const std::size_t candidate : choose_candidates(draws, budget.epsilon)) {
    const std::size_t setting = candidate / thresholds.size();
    const double threshold = thresholds[candidate % thresholds.size()];
    const TrialRun trial = try_out(setting, threshold, least_tokens);
    const double p_value = test_of(trial.errors, budget.epsilon, budget.delta, binary());
    if (trial.errors.size() < kLeastDraws || !(p_value <= budget.delta)) {
      reason_ = why_not_certified(trial.errors, budget, binary() ? LossKind::kBinary : LossKind::kReal, 1 - kExplored);
      break;
    }
    if (trial.computed > std::min(kWorthIt, best ? best->computed : 1.0)) {  // it may compute more than explored
      reason_ = fmt::format("{} computes {:.0f} % of the token-layers of the sample, which saves too little",
                            strategy_->name(), 100 * trial.computed);
      continue;
    }
    best.emplace();
    best->mechanism = strategy_->name();
    best->format = options_.format;
    best->setting = strategy_->describe(setting);
    best->match_threshold = threshold;
    best->least_tokens = least_tokens;
    best->fitted = static_cast<std::int64_t>(draws.size());
    best->certified = static_cast<std::int64_t>(trial.errors.size());
    best->error =
        std::accumulate(trial.errors.begin(), trial.errors.end(), 0.0) / static_cast<double>(trial.errors.size());
    best->bound = upper_bound(trial.errors, budget.delta, binary());
    best->computed = trial.computed;
    best->typical_distance = typical_distance_;
  }
  return best;
}

}  // namespace llmcache
