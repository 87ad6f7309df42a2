#include "refresh/divergence_monitor.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "llmcache/error.h"

namespace llmcache {

void RefreshOptions::validate() const {
  const auto refuse = [](const char* field, double value, const char* expected) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("RefreshOptions.{} is {}; {} is expected", field, value, expected));
  };
  const auto between = [&](const char* field, double value, double low, double high, const char* expected) {
    if (!(value >= low && value <= high)) refuse(field, value, expected);
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  between("shadow_rate", shadow_rate, 0, 1, "0 to 1");
  between("tolerance.cosine", tolerance.cosine, 0, 2, "0 to 2");
  between("tolerance.relative", tolerance.relative, 0, kInfinity, "0 or more");
  between("raise", raise, 0, 1, "0 to 1");
  between("lower", lower, 0, 1, "0 to 1");
  between("flush_below", flush_below, 0, std::numeric_limits<double>::max(), "0 or more");
  if (clean_checks < 1) refuse("clean_checks", 0, "1 or more");
}

Drift drift_between(const std::vector<at::Tensor>& served, const std::vector<at::Tensor>& full,
                    const DecisionFunction& decision) {
  double product = 0;
  double served_square = 0;
  double full_square = 0;
  double difference = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    const auto a = served.at(i).to(at::kDouble).flatten();
    const auto b = full[i].to(at::kDouble).flatten();
    product += a.dot(b).item<double>();
    served_square += a.dot(a).item<double>();
    full_square += b.dot(b).item<double>();
    difference += (a - b).square().sum().item<double>();
  }
  Drift drift;
  if (difference != 0) {
    drift.cosine = 1 - product / std::sqrt(served_square * full_square);
    drift.relative = std::sqrt(difference / full_square);
    // A zero output has no direction, and what is not finite is no answer.
    if (!std::isfinite(drift.cosine)) drift.cosine = 2;
    if (!std::isfinite(drift.relative)) drift.relative = std::numeric_limits<double>::infinity();
  }
  if (decision && !full.empty()) drift.decision_changed = decision(served.at(0)) != decision(full[0]);
  return drift;
}

DivergenceMonitor::DivergenceMonitor(RefreshOptions options, std::vector<double> taus)
    : options_(std::move(options)), generator_(options_.seed) {
  for (const double tau : taus) {
    Layer& layer = layers_.emplace_back();
    layer.configured = tau;
    layer.tau = tau;
  }
}

double DivergenceMonitor::tau(std::size_t bank) const {
  const std::lock_guard lock(mutex_);
  return layers_.at(bank).tau;
}

bool DivergenceMonitor::choose() {
  if (options_.shadow_rate <= 0) return false;
  const std::lock_guard lock(mutex_);
  return static_cast<double>(generator_() >> 11) * 0x1p-53 < options_.shadow_rate;
}

bool DivergenceMonitor::record(std::size_t bank, const Drift& drift) {
  const std::lock_guard lock(mutex_);
  Layer& layer = layers_.at(bank);
  ++layer.checks;
  layer.decision_changes += drift.decision_changed ? 1 : 0;
  layer.cosine_sum += drift.cosine;
  layer.cosine_max = std::max(layer.cosine_max, drift.cosine);
  layer.relative_sum += drift.relative;
  layer.relative_max = std::max(layer.relative_max, drift.relative);
  const bool good = drift.cosine <= options_.tolerance.cosine && drift.relative <= options_.tolerance.relative &&
                    !drift.decision_changed;
  if (!good) {
    layer.tau += options_.raise * std::max(1 - layer.tau, 0.0);
    layer.clean = 0;
  } else if (++layer.clean >= options_.clean_checks) {
    layer.tau -= options_.lower * (layer.tau - layer.configured);
    layer.clean = 0;
  }
  return good;
}

void DivergenceMonitor::fill(std::size_t bank, LayerStats& stats) const {
  const std::lock_guard lock(mutex_);
  const Layer& layer = layers_.at(bank);
  stats.tau = layer.tau;
  stats.checks = layer.checks;
  stats.decision_changes = layer.decision_changes;
  const double n = std::max<double>(1, static_cast<double>(layer.checks));
  stats.cosine_drift_mean = layer.cosine_sum / n;
  stats.cosine_drift_max = layer.cosine_max;
  stats.relative_drift_mean = layer.relative_sum / n;
  stats.relative_drift_max = layer.relative_max;
}

}  // namespace llmcache
