#include "refresh/exit_calibration.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "llmcache/error.h"
#include "refresh/candidate_choice.h"
#include "refresh/ridge.h"
#include "refresh/risk_bound.h"
#include "refresh/sample_need.h"

namespace llmcache {

/// What a part of the sample would meet in front of each layer.
struct Met {
  std::vector<std::vector<double>> expected;  ///< [layer][sequence]
  std::vector<std::vector<double>> error;
};

namespace {

constexpr double kFittedShare = 0.5;  // banks and translator
constexpr double kGateShare = 0.2;    // gates; the rest certifies
constexpr double kPenalty = 1e-2;     // of ridge regressions, in units of an input's variance
constexpr int kLevels = 160;          // thresholds tried, evenly on a logarithmic scale
constexpr double kSafest = 1e-4;
constexpr int kSaferLevels = 3;  // kept below the certified one, each for half the error

std::span<const float> floats_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

at::Tensor weights_of(const at::Tensor& x, const at::Tensor& y, double penalty) {
  const auto inputs = x.to(at::kCPU).contiguous();
  const auto outputs = y.to(at::kCPU).contiguous();
  const auto fitted = RidgeModel::fit(floats_of(inputs), floats_of(outputs), inputs.size(1), outputs.size(1), penalty);
  return at::tensor(fitted.weights).view({inputs.size(1), outputs.size(1)}).to(x.device());
}

ExitLayer fit_layer(const at::Tensor& states, const at::Tensor& outputs, bool cache_free) {
  ExitLayer layer;
  layer.centre = states.mean(0);
  const auto centred = states - layer.centre;
  layer.translator = weights_of(centred, outputs - outputs.mean(0), kPenalty);
  if (cache_free) return layer;
  layer.keep(centred);
  return layer;
}

double typical_distance(const at::Tensor& outputs) {
  // Each output and the one half the sample further: as many pairs of different sequences as there are sequences.
  return (outputs - outputs.roll(outputs.size(0) / 2, 0)).norm(2, 1).mean().item<double>();
}

struct Served {
  std::vector<double> error;  ///< one a sequence
  std::vector<double> left;   ///< share of the sequences that leave in front of each layer
  std::vector<double> run;    ///< part of the layers that each sequence runs through
};

Served serve(const Met& met, const std::vector<double>& thresholds) {
  const std::size_t layers = met.expected.size();
  const std::size_t n = met.expected[0].size();
  Served served{std::vector<double>(n, 0), std::vector<double>(layers, 0), std::vector<double>(n, 1)};
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t l = 0; l < layers; ++l) {
      if (!(met.expected[l][i] <= thresholds[l])) continue;
      served.left[l] += 1 / static_cast<double>(n);
      served.error[i] = met.error[l][i];
      served.run[i] = static_cast<double>(l) / static_cast<double>(layers);
      break;
    }
  }
  return served;
}

double mean_error(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) /
         static_cast<double>(std::max<std::size_t>(1, values.size()));
}

/// The thresholds of a level: the same error expected in front of every layer, or less of it the less there is to save.
std::vector<double> thresholds_at(int level, double slope, const std::vector<char>& chosen) {
  const double base = kSafest * std::pow(1 / kSafest, static_cast<double>(level) / (kLevels - 1));
  std::vector<double> thresholds;
  for (std::size_t l = 0; l < chosen.size(); ++l) {
    const double own = base * (1 - slope * static_cast<double>(l) / static_cast<double>(chosen.size()));
    thresholds.push_back(chosen[l] ? own : -1);
  }
  return thresholds;
}

Met meet(const ExitModel& model, const ExitSample& sample, const at::Tensor& which, const ScoreFunction& scores) {
  constexpr std::int64_t kRows = 256;
  Met met;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    auto& expected = met.expected.emplace_back();
    auto& error = met.error.emplace_back();
    for (std::int64_t begin = 0; begin < which.size(0); begin += kRows) {
      const auto rows = which.narrow(0, begin, std::min(kRows, which.size(0) - begin));
      const auto proposal = model.propose(l, sample.states[l].index_select(0, rows), scores);
      const auto errors = model.errors(proposal.answers, sample.outputs.index_select(0, rows), scores);
      expected.insert(expected.end(), proposal.expected.begin(), proposal.expected.end());
      error.insert(error.end(), errors.begin(), errors.end());
    }
  }
  return met;
}

/// Layers that sequences may leave in front of, and how thresholds fall from layer to layer.
struct Shape {
  std::vector<char> chosen;
  double slope = 0;
  [[nodiscard]] bool any() const {
    return std::any_of(chosen.begin(), chosen.end(), [](char one) { return one != 0; });
  }
};

/// Milliseconds that looking for answers for `rows` sequences in front of a layer takes.
double look_ms(const ExitModel& model, std::size_t layer, const ExitSample& sample, std::int64_t rows,
               const ScoreFunction& scores) {
  constexpr int kTimes = 7;
  std::vector<double> times;
  for (int i = 0; i < kTimes; ++i) {
    const auto start = std::chrono::steady_clock::now();
    static_cast<void>(model.propose(layer, sample.states[layer].narrow(0, i * rows, rows), scores));
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    times.push_back(ms.count());
  }
  std::nth_element(times.begin(), times.begin() + kTimes / 2, times.end());
  return times[kTimes / 2];
}

/// What passes take by which sequences leave where.
class PassTime {
 public:
  PassTime(const ExitModel& model, const ExitSample& sample, const BudgetOptions& options)
      : layers_(sample.layer_times),
        rows_(std::max(1.0, sample.batch_rows)),
        audited_(options.background_audit ? 0 : options.audit_rate) {
    const auto many = std::clamp<std::int64_t>(std::llround(rows_), 1, sample.outputs.size(0) / 8);
    for (std::size_t l = 0; l < model.layers.size(); ++l) {
      looks_.push_back(PartTime::from(look_ms(model, l, sample, 1, options.scores),
                                      look_ms(model, l, sample, many, options.scores), static_cast<double>(many)));
    }
  }

  /// Milliseconds a sequence; `left`: share of the sequences that leave in front of each layer.
  [[nodiscard]] double ms(const std::vector<double>& left, const std::vector<char>& looked_at) const {
    double running = 1;
    double total = 0;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (looked_at[l]) total += part(looks_[l], running);
      running -= left[l];
      total += part(layers_[l], running + audited_ * (1 - running));
    }
    return total;
  }

 private:
  /// Of a batch in which each sequence runs with the probability `share`.
  [[nodiscard]] double part(const PartTime& time, double share) const {
    const double any = 1 - std::pow(std::clamp(1 - share, 0.0, 1.0), rows_);
    return time.pass_ms * any / rows_ + time.sequence_ms * share;
  }

  std::vector<PartTime> layers_;
  std::vector<PartTime> looks_;
  double rows_;
  double audited_;
};

/// Adds layer after layer as long as that saves time at errors somewhat below the budget: each look costs time too.
Shape choose_shape(const ExitModel& model, const Met& tuning, const ExitSample& sample, const BudgetOptions& options) {
  constexpr int kStep = 4;  // of the levels each such one is tried
  constexpr double kWorthTrying = 0.99;
  const std::size_t layers = model.layers.size();
  const PassTime time(model, sample, options);
  Shape best{std::vector<char>(layers), 0};
  double best_ms = time.ms(std::vector<double>(layers), best.chosen);
  const bool given = !options.exit_layers.empty();
  for (const std::int64_t layer : options.exit_layers) best.chosen[static_cast<std::size_t>(layer)] = 1;
  while (true) {
    Shape next;
    double next_ms = given ? std::numeric_limits<double>::infinity() : best_ms * kWorthTrying;
    for (std::size_t l = 0; l < layers; ++l) {
      if (best.chosen[l] && !given) continue;
      Shape tried = best;
      if (!given) tried.chosen[l] = 1;
      for (const double slope : {0.0, 0.4, 0.8}) {
        tried.slope = slope;
        for (int level = 0; level < kLevels; level += kStep) {
          const auto served = serve(tuning, thresholds_at(level, slope, tried.chosen));
          if (mean_error(served.error) > kChoiceMargin * options.budget.epsilon) break;
          const double ms = time.ms(served.left, tried.chosen);
          if (ms >= next_ms) continue;
          next_ms = ms;
          next = tried;
        }
      }
    }
    if (next.chosen.empty()) return best;
    best = std::move(next);
    best_ms = next_ms;
    if (given) return best;
  }
}

void fit_gates(ExitModel& model, const ExitSample& sample, const at::Tensor& which, const ScoreFunction& scores) {
  const auto full = sample.outputs.index_select(0, which);
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const auto described = model.describe(l, sample.states[l].index_select(0, which), scores);
    model.layers[l].gate = LogisticModel::fit(described.features, model.errors(described.answers, full, scores),
                                              static_cast<std::int64_t>(model.features()));
  }
}

void fit_banks(ExitModel& model, const ExitSample& sample, const at::Tensor& which, const ScoreFunction& scores) {
  model.outputs = sample.outputs.index_select(0, which);
  model.mean_output = model.outputs.mean(0);
  model.typical_distance = typical_distance(model.outputs);
  model.decisions = model.outputs.size(1) > 1 || scores ? decisions_of(model.outputs, scores)
                                                        : at::zeros({which.size(0)}, which.options());
  model.layers.resize(sample.states.size());
  for (std::size_t l = 0; l < sample.states.size(); ++l) {
    auto gate = std::move(model.layers[l].gate);
    model.layers[l] = fit_layer(sample.states[l].index_select(0, which), model.outputs, model.cache_free);
    model.layers[l].gate = std::move(gate);
  }
}

/// Entries that the banks have room for. Throws Error(kInvalidOptions) if that is too few.
std::int64_t room_for_entries(const ExitSample& sample, bool cache_free, std::size_t capacity_bytes) {
  // What an entry takes in the banks: its states and lengths, what they are searched by, its output and its decision.
  std::int64_t entry = sample.outputs.size(1) * 4 + 8;
  std::int64_t fixed = 0;
  for (const at::Tensor& states : sample.states) {
    const auto axes = cache_free ? 0 : ExitLayer::axes_for(states.size(1));
    fixed += states.size(1) * 4 * (1 + axes + sample.outputs.size(1)) + 4096;
    if (!cache_free) entry += (states.size(1) + 1 + axes) * 4;
  }
  const auto room = (static_cast<std::int64_t>(capacity_bytes) - fixed) / entry;
  if (room >= 2 * ExitModel::kLeastEntries) return room;
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("the capacity leaves {} bytes for the banks of early exits, which need at least {}; raise "
                          "Options.capacity_bytes or BudgetOptions.capacity_share",
                          capacity_bytes, fixed + 2 * ExitModel::kLeastEntries * entry));
}

}  // namespace

PartTime PartTime::from(double alone_ms, double together_ms, double rows) {
  if (rows < 2) return {alone_ms, 0};
  const double more = std::clamp((together_ms - alone_ms) / (rows - 1), 0.0, together_ms / rows);
  return {std::max(0.0, together_ms - rows * more), more};
}

/// What certifies nothing: the fitted model, and what the parts of the sample would meet.
struct ExitCalibration::Fitted {
  std::shared_ptr<ExitModel> model = std::make_shared<ExitModel>();
  Met tuning, certifying;
  at::Tensor tuning_rows, certifying_rows;  ///< numbers in the sample

  /// Sequences of `longest` tokens or more never leave.
  [[nodiscard]] static Met limited(Met met, const at::Tensor& rows, const ExitSample& sample, std::int64_t longest) {
    if (longest == kAll || sample.tokens.empty()) return met;
    const auto numbers = rows.cpu();
    for (std::int64_t i = 0; i < numbers.numel(); ++i) {
      const auto number = static_cast<std::size_t>(numbers.const_data_ptr<std::int64_t>()[i]);
      if (sample.tokens[number] < longest) continue;
      for (auto& layer : met.expected) layer[static_cast<std::size_t>(i)] = std::numeric_limits<double>::infinity();
    }
    return met;
  }
};

ExitCalibration::ExitCalibration(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes)
    : sample_(sample), options_(options), fitted_(std::make_unique<Fitted>()) {
  const auto n = sample.outputs.size(0);
  auto fitted = static_cast<std::int64_t>(kFittedShare * static_cast<double>(n));
  auto gated = static_cast<std::int64_t>(kGateShare * static_cast<double>(n));
  if (gated < ExitModel::kLeastEntries || fitted < 2 * ExitModel::kLeastEntries) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("calibration has {} different sequences; at least {} are needed to fit anything, and some "
                            "thousands to certify an error of 0.01",
                            n, static_cast<std::int64_t>(std::ceil(ExitModel::kLeastEntries / kGateShare))));
  }
  // In the order of the traffic: what is certified came after all that was fitted, as what is served will.
  const auto rows = at::arange(n, sample.outputs.options().dtype(at::kLong));
  ExitModel& model = *fitted_->model;
  model.metric = options.budget.metric;
  model.cache_free = options.early_exit == EarlyExit::kCacheFree;
  fitted_->certifying_rows = rows.narrow(0, fitted + gated, n - fitted - gated);
  const std::int64_t room = room_for_entries(sample, model.cache_free, capacity_bytes);
  fitted_->tuning_rows = rows.narrow(0, fitted, gated);
  const bool all_fit = room >= fitted + gated;
  // The bank keeps as much as there is room for; what it leaves out only trains the gates.
  if (!all_fit) fitted = std::min(fitted, room);
  fit_banks(model, sample, rows.narrow(0, 0, fitted), options.scores);
  fit_gates(model, sample, fitted_->tuning_rows, options.scores);
  fitted_->tuning = meet(model, sample, fitted_->tuning_rows, options.scores);
  if (all_fit) fit_banks(model, sample, rows.narrow(0, 0, fitted + gated), options.scores);
  fitted_->certifying = meet(model, sample, fitted_->certifying_rows, options.scores);
}

ExitCalibration::~ExitCalibration() = default;

std::optional<double> ExitCalibration::expected_cost(double epsilon, std::int64_t longest) const {
  const Met tuning = Fitted::limited(fitted_->tuning, fitted_->tuning_rows, sample_, longest);
  BudgetOptions options = options_;
  options.budget.epsilon = epsilon;
  const Shape shape = choose_shape(*fitted_->model, tuning, sample_, options);
  if (!shape.any()) return std::nullopt;
  // Of the tokens of those that may leave.
  const std::size_t n = tuning.expected[0].size();
  const auto numbers = fitted_->tuning_rows.cpu();
  std::vector<double> weights(n, 1);
  for (std::size_t i = 0; i < n && !sample_.tokens.empty(); ++i) {
    const auto tokens = sample_.tokens[static_cast<std::size_t>(numbers.const_data_ptr<std::int64_t>()[i])];
    weights[i] = longest == kAll || tokens < longest ? static_cast<double>(tokens) : 0;
  }
  const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (all == 0) return std::nullopt;
  double cost = 1;
  for (int level = 0; level < kLevels; ++level) {
    const auto served = serve(tuning, thresholds_at(level, shape.slope, shape.chosen));
    if (mean_error(served.error) > kChoiceMargin * epsilon) break;
    cost = std::inner_product(weights.begin(), weights.end(), served.run.begin(), 0.0) / all;
  }
  return cost;
}

void ExitCalibration::certify(const Budget& budget, CalibrationProfile& profile, std::int64_t longest) {
  ExitModel& model = *fitted_->model;
  const auto kind = budget.metric == BudgetMetric::kRelativeError ? LossKind::kReal : LossKind::kBinary;
  BudgetOptions options = options_;
  options.budget = budget;
  const Met tuning = Fitted::limited(fitted_->tuning, fitted_->tuning_rows, sample_, longest);
  const Shape shape = choose_shape(model, tuning, sample_, options);
  if (!shape.any()) {
    profile.reason =
        "looking for an answer in front of a layer costs more time than leaving there saves, at errors that "
        "the budget allows";
    return;
  }
  const Met met = Fitted::limited(fitted_->certifying, fitted_->certifying_rows, sample_, longest);
  const auto at_level = [&](int level) { return thresholds_at(level, shape.slope, shape.chosen); };
  std::vector<std::vector<double>> errors;
  for (int level = 0; level < kLevels; ++level) errors.push_back(serve(met, at_level(level)).error);
  profile.typical_distance = model.typical_distance;
  profile.fitted = model.outputs.size(0);
  profile.certified = fitted_->certifying_rows.size(0);
  const auto uncertified = [&](std::int64_t level) {
    return level + 1 < kLevels ? why_not_certified(errors[static_cast<std::size_t>(level + 1)], budget, kind,
                                                   1 - kFittedShare - kGateShare)
                               : std::string("no sequence of the sample that certifies would leave early");
  };
  double epsilon = budget.epsilon;
  for (int safer = 0; safer <= kSaferLevels; ++safer, epsilon /= 2) {
    const auto level = choose_level(errors, epsilon, budget.delta, kind);
    if (safer == 0) profile.reason = uncertified(level);
    if (level < 0) break;
    const auto thresholds = at_level(static_cast<int>(level));
    model.thresholds.push_back(thresholds);
    if (safer > 0) continue;
    const auto served = serve(met, thresholds);
    profile.expected_share = std::accumulate(served.left.begin(), served.left.end(), 0.0);
    if (profile.expected_share == 0) return;  // nothing to gain
    profile.certified_error = mean_error(served.error);
    profile.error_bound = upper_bound(served.error, budget.delta, kind == LossKind::kBinary);
    profile.expected_exits = served.left;
  }
  if (model.thresholds.empty()) return;
  for (std::size_t l = 0; l < shape.chosen.size(); ++l) {
    if (!shape.chosen[l]) model.layers[l] = {};
  }
  if (model.cache_free) {
    model.outputs = model.outputs.narrow(0, 0, 0);
    model.decisions = model.decisions.narrow(0, 0, 0);
  }
  profile.reason.clear();
  profile.bytes = model.bytes();
  profile.exit = fitted_->model;
}

void calibrate_exit(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes,
                    CalibrationProfile& profile) {
  ExitCalibration(sample, options, capacity_bytes).certify(options.budget, profile);
}

}  // namespace llmcache
