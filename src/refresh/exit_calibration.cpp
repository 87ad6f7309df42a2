#include "refresh/exit_calibration.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "llmcache/error.h"
#include "refresh/ladder_calibration.h"
#include "refresh/ridge.h"
#include "refresh/risk_bound.h"

namespace llmcache {
namespace {

constexpr double kFittedShare = 0.5;       // banks and translators
constexpr double kGateShare = 0.2;         // gates; the rest certifies
constexpr std::int64_t kPairs = 3;         // neighbours of each entry that the translator is fitted on
constexpr std::int64_t kSearchRows = 512;  // of the bank compared with the whole of it at once
constexpr double kPenalty = 1e-2;          // of ridge regressions, in units of an input's variance
constexpr int kLevels = 160;               // thresholds tried, evenly on a logarithmic scale
constexpr double kSafest = 1e-4;
constexpr int kSaferLevels = 3;  // kept below the certified one, each for half the error

std::span<const float> values_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
}

at::Tensor weights_of(const at::Tensor& x, const at::Tensor& y, double penalty) {
  const auto inputs = x.to(at::kCPU).contiguous();
  const auto outputs = y.to(at::kCPU).contiguous();
  const auto fitted = RidgeModel::fit(values_of(inputs), values_of(outputs), inputs.size(1), outputs.size(1), penalty);
  return at::tensor(fitted.weights).view({inputs.size(1), outputs.size(1)}).to(x.device());
}

/// Of each entry the `kPairs` most similar others: int64 [n, kPairs].
at::Tensor neighbours_of(const ExitLayer& layer) {
  std::vector<at::Tensor> found;
  const auto entries = layer.directions.size(0);
  for (std::int64_t begin = 0; begin < entries; begin += kSearchRows) {
    const auto rows = std::min(kSearchRows, entries - begin);
    auto [similarity, numbers] = layer.nearest(layer.directions.narrow(0, begin, rows), kPairs + 1);
    // Itself, wherever it came out, goes last.
    const auto own = numbers.eq(at::arange(begin, begin + rows, numbers.options()).unsqueeze(1));
    const auto order = similarity.masked_fill(own, -2.0).argsort(1, true);
    found.push_back(numbers.gather(1, order).narrow(1, 0, kPairs));
  }
  return at::cat(found);
}

ExitLayer fit_layer(const at::Tensor& states, const at::Tensor& outputs, bool cache_free) {
  ExitLayer layer;
  layer.centre = states.mean(0);
  const auto centred = states - layer.centre;
  layer.regressor = weights_of(centred, outputs - outputs.mean(0), kPenalty);
  if (cache_free) return layer;
  layer.lengths = centred.norm(2, 1).clamp_min(1e-12);
  layer.directions = centred / layer.lengths.unsqueeze(1);
  layer.index();
  const auto near = neighbours_of(layer);
  std::vector<at::Tensor> from;
  std::vector<at::Tensor> to;
  for (std::int64_t k = 0; k < kPairs; ++k) {
    from.push_back(centred - centred.index_select(0, near.select(1, k)));
    to.push_back(outputs - outputs.index_select(0, near.select(1, k)));
  }
  layer.translator = weights_of(at::cat(from), at::cat(to), kPairs * kPenalty);
  return layer;
}

double typical_distance(const at::Tensor& outputs) {
  // Each output and the one half the sample further: as many pairs of different sequences as there are sequences.
  return (outputs - outputs.roll(outputs.size(0) / 2, 0)).norm(2, 1).mean().item<double>();
}

/// What a part of the sample would meet in front of each layer.
struct Met {
  std::vector<std::vector<double>> expected;  ///< [layer][sequence]
  std::vector<std::vector<double>> error;
};

struct Served {
  std::vector<double> error;  ///< one a sequence
  std::vector<double> left;   ///< sequences that leave in front of each layer
  double ms = 0;              ///< of layers, mean
};

Served serve(const Met& met, const std::vector<double>& thresholds, const std::vector<double>& layer_ms) {
  const std::size_t layers = met.expected.size();
  const std::size_t n = met.expected[0].size();
  Served served{std::vector<double>(n, 0), std::vector<double>(layers, 0), 0};
  for (std::size_t i = 0; i < n; ++i) {
    std::size_t l = 0;
    for (; l < layers && !(met.expected[l][i] <= thresholds[l]); ++l) served.ms += layer_ms[l] / static_cast<double>(n);
    if (l == layers) continue;
    served.left[l] += 1;
    served.error[i] = met.error[l][i];
  }
  return served;
}

double mean(const std::vector<double>& values) {
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
};

/// Milliseconds, a sequence, that looking for an answer in front of a layer takes where `rows` come together.
double proposal_ms(const ExitModel& model, std::size_t layer, const ExitSample& sample, double rows,
                   const ScoreFunction& scores) {
  constexpr int kTimes = 5;
  const auto n = std::clamp<std::int64_t>(std::llround(rows), 1, sample.outputs.size(0));
  std::vector<double> times;
  for (int i = 0; i < kTimes; ++i) {
    const auto start = std::chrono::steady_clock::now();
    static_cast<void>(model.propose(layer, sample.states[layer].narrow(0, 0, n), scores));
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    times.push_back(ms.count());
  }
  std::nth_element(times.begin(), times.begin() + kTimes / 2, times.end());
  return times[kTimes / 2] / static_cast<double>(n);
}

/// Adds layer after layer as long as that saves time at errors somewhat below the budget: each look costs time too.
Shape choose_shape(const ExitModel& model, const Met& tuning, const ExitSample& sample, const BudgetOptions& options) {
  constexpr int kStep = 4;         // of the levels each such one is tried
  constexpr double kMargin = 0.8;  // of the budget: a choice looks better on the data that it was made on
  constexpr double kWorthIt = 0.99;
  const std::size_t layers = model.layers.size();
  Shape best{std::vector<char>(layers), 0};
  double best_ms = std::accumulate(sample.layer_ms.begin(), sample.layer_ms.end(), 0.0);
  std::vector<double> look_ms;
  for (std::size_t l = 0; l < layers; ++l) {
    look_ms.push_back(proposal_ms(model, l, sample, sample.batch_rows, options.scores));
  }
  const bool given = !options.exit_layers.empty();
  for (const std::int64_t layer : options.exit_layers) best.chosen[static_cast<std::size_t>(layer)] = 1;
  while (true) {
    Shape next;
    double next_ms = given ? std::numeric_limits<double>::infinity() : best_ms * kWorthIt;
    for (std::size_t l = 0; l < layers; ++l) {
      if (best.chosen[l] && !given) continue;
      Shape tried = best;
      if (!given) tried.chosen[l] = 1;
      double looks = 0;
      for (std::size_t k = 0; k < layers; ++k) looks += tried.chosen[k] ? look_ms[k] : 0;
      for (const double slope : {0.0, 0.4, 0.8}) {
        tried.slope = slope;
        for (int level = 0; level < kLevels; level += kStep) {
          const auto served = serve(tuning, thresholds_at(level, slope, tried.chosen), sample.layer_ms);
          if (mean(served.error) > kMargin * options.budget.epsilon) break;
          if (served.ms + looks >= next_ms) continue;
          next_ms = served.ms + looks;
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

}  // namespace

void calibrate_exit(const ExitSample& sample, const BudgetOptions& options, std::size_t capacity_bytes,
                    CalibrationProfile& profile) {
  const auto n = sample.outputs.size(0);
  auto fitted = static_cast<std::int64_t>(kFittedShare * static_cast<double>(n));
  auto gated = static_cast<std::int64_t>(kGateShare * static_cast<double>(n));
  if (gated < ExitModel::kLeastEntries || fitted < 2 * ExitModel::kLeastEntries) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("calibration has {} different sequences; at least {} are needed to fit anything, and some "
                            "thousands to certify an error of 0.01",
                            n, static_cast<std::int64_t>(std::ceil(ExitModel::kLeastEntries / kGateShare))));
  }
  // Row numbers are shuffled by hand: std::shuffle may differ between standard libraries.
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::mt19937_64 generator(options.seed);
  for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[generator() % (i + 1)]);
  const auto rows = at::tensor(order, at::kLong).to(sample.outputs.device());

  auto model = std::make_shared<ExitModel>();
  model->metric = options.budget.metric;
  model->cache_free = options.early_exit == EarlyExit::kCacheFree;
  const auto certifying = rows.narrow(0, fitted + gated, n - fitted - gated);
  // What an entry takes in the banks: its states and lengths, what they are searched by, its output and its decision.
  std::int64_t entry = sample.outputs.size(1) * 4 + 8;
  std::int64_t fixed = 0;
  for (const at::Tensor& states : sample.states) {
    const auto axes = model->cache_free ? 0 : ExitLayer::axes_for(states.size(1));
    fixed += states.size(1) * 4 * (1 + axes + 2 * sample.outputs.size(1)) + 4096;
    if (!model->cache_free) entry += (states.size(1) + 1 + axes) * 4;
  }
  const auto room = (static_cast<std::int64_t>(capacity_bytes) - fixed) / entry;
  if (room < fitted + gated) {
    // The bank keeps as much as there is room for; what it leaves out only trains the gates.
    fitted = std::min(fitted, std::max<std::int64_t>(room, 0));
    if (fitted < 2 * ExitModel::kLeastEntries) {
      throw Error(
          ErrorCode::kInvalidOptions,
          fmt::format("the capacity leaves {} bytes for the banks of early exits, which need at least {}; raise "
                      "Options.capacity_bytes or BudgetOptions.capacity_share",
                      capacity_bytes, fixed + 2 * ExitModel::kLeastEntries * entry));
    }
  }
  const auto gating = rows.narrow(0, n - certifying.size(0) - gated, gated);
  const auto first = rows.narrow(0, 0, fitted);
  fit_banks(*model, sample, first, options.scores);
  fit_gates(*model, sample, gating, options.scores);
  const auto tuning = meet(*model, sample, gating, options.scores);
  if (room >= fitted + gated) fit_banks(*model, sample, rows.narrow(0, 0, fitted + gated), options.scores);
  const auto certified = meet(*model, sample, certifying, options.scores);

  const Budget& budget = options.budget;
  const auto kind = budget.metric == BudgetMetric::kRelativeError ? LossKind::kReal : LossKind::kBinary;
  const Shape shape = choose_shape(*model, tuning, sample, options);
  if (std::none_of(shape.chosen.begin(), shape.chosen.end(), [](char one) { return one != 0; })) return;
  const auto at_level = [&](int level) { return thresholds_at(level, shape.slope, shape.chosen); };
  std::vector<std::vector<double>> errors;
  for (int level = 0; level < kLevels; ++level) {
    errors.push_back(serve(certified, at_level(level), sample.layer_ms).error);
  }
  profile.typical_distance = model->typical_distance;
  profile.fitted = model->outputs.size(0);
  profile.certified = certifying.size(0);
  double epsilon = budget.epsilon;
  for (int safer = 0; safer <= kSaferLevels; ++safer, epsilon /= 2) {
    const auto level = choose_level(errors, epsilon, budget.delta, kind);
    if (level < 0) break;
    const auto thresholds = at_level(static_cast<int>(level));
    model->thresholds.push_back(thresholds);
    if (safer > 0) continue;
    const auto served = serve(certified, thresholds, sample.layer_ms);
    const double left = std::accumulate(served.left.begin(), served.left.end(), 0.0);
    if (left == 0) return;  // nothing to gain
    profile.certified_error = mean(served.error);
    profile.error_bound = upper_bound(served.error, budget.delta, kind == LossKind::kBinary);
    profile.expected_share = left / static_cast<double>(profile.certified);
    for (const double share : served.left) {
      profile.expected_exits.push_back(share / static_cast<double>(profile.certified));
    }
  }
  if (model->thresholds.empty()) return;
  for (std::size_t l = 0; l < shape.chosen.size(); ++l) {
    if (!shape.chosen[l]) model->layers[l] = {};
  }
  if (model->cache_free) {
    model->outputs = model->outputs.narrow(0, 0, 0);
    model->decisions = model->decisions.narrow(0, 0, 0);
  }
  profile.bytes = model->bytes();
  profile.exit = std::move(model);
}

}  // namespace llmcache
