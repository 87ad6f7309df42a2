#include "refresh/exit_calibration.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
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

/// Of each direction the `kPairs` most similar others: int64 [n, kPairs].
at::Tensor neighbours_of(const at::Tensor& directions) {
  std::vector<at::Tensor> found;
  for (std::int64_t begin = 0; begin < directions.size(0); begin += kSearchRows) {
    const auto rows = std::min(kSearchRows, directions.size(0) - begin);
    auto similar = at::mm(directions.narrow(0, begin, rows), directions.t());
    similar.narrow(1, begin, rows).fill_diagonal_(-2.0);
    found.push_back(std::get<1>(similar.topk(kPairs, 1)));
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
  const auto near = neighbours_of(layer.directions);
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
  double layers_run = 0;      ///< mean
};

Served serve(const Met& met, const std::vector<double>& thresholds) {
  const std::size_t layers = met.expected.size();
  const std::size_t n = met.expected[0].size();
  Served served{std::vector<double>(n, 0), std::vector<double>(layers, 0), 0};
  for (std::size_t i = 0; i < n; ++i) {
    std::size_t l = 0;
    while (l < layers && !(met.expected[l][i] <= thresholds[l])) ++l;
    served.layers_run += static_cast<double>(l) / static_cast<double>(n);
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
std::vector<double> thresholds_at(int level, double slope, std::size_t layers) {
  const double base = kSafest * std::pow(1 / kSafest, static_cast<double>(level) / (kLevels - 1));
  std::vector<double> thresholds;
  for (std::size_t l = 0; l < layers; ++l) {
    thresholds.push_back(base * (1 - slope * static_cast<double>(l) / static_cast<double>(layers)));
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
  // What an entry takes in the banks: its states and lengths, its output and its decision.
  std::int64_t entry = sample.outputs.size(1) * 4 + 8;
  std::int64_t fixed = 0;
  for (const at::Tensor& states : sample.states) {
    fixed += states.size(1) * 4 * (1 + 2 * sample.outputs.size(1)) + 4096;
    if (!model->cache_free) entry += (states.size(1) + 1) * 4;
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
  const std::size_t layers = model->layers.size();
  double best = static_cast<double>(layers) + 1;
  double slope = 0;
  for (const double tried : {0.0, 0.4, 0.8}) {
    double run = static_cast<double>(layers);
    for (int level = 0; level < kLevels; ++level) {
      const auto served = serve(tuning, thresholds_at(level, tried, layers));
      if (mean(served.error) > 0.8 * budget.epsilon) break;
      run = served.layers_run;
    }
    if (run < best) {
      best = run;
      slope = tried;
    }
  }
  std::vector<std::vector<double>> errors;
  for (int level = 0; level < kLevels; ++level) {
    errors.push_back(serve(certified, thresholds_at(level, slope, layers)).error);
  }
  profile.typical_distance = model->typical_distance;
  profile.fitted = model->outputs.size(0);
  profile.certified = certifying.size(0);
  double epsilon = budget.epsilon;
  for (int safer = 0; safer <= kSaferLevels; ++safer, epsilon /= 2) {
    const auto level = choose_level(errors, epsilon, budget.delta, kind);
    if (level < 0) break;
    const auto thresholds = thresholds_at(static_cast<int>(level), slope, layers);
    model->thresholds.push_back(thresholds);
    if (safer > 0) continue;
    const auto served = serve(certified, thresholds);
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
  if (model->cache_free) {
    model->outputs = model->outputs.narrow(0, 0, 0);
    model->decisions = model->decisions.narrow(0, 0, 0);
  }
  profile.bytes = model->bytes();
  profile.exit = std::move(model);
}

}  // namespace llmcache
