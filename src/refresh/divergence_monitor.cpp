#include "refresh/divergence_monitor.h"

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
  between("audit_rate", audit_rate, 0, 1, "0 to 1");
  between("tolerance.cosine", tolerance.cosine, 0, 2, "0 to 2");
  between("tolerance.relative", tolerance.relative, 0, kInfinity, "0 or more");
  between("raise", raise, 0, 1, "0 to 1");
  between("lower", lower, 0, 1, "0 to 1");
  between("flush_below", flush_below, 0, std::numeric_limits<double>::max(), "0 or more");
  if (clean_audits < 1) refuse("clean_audits", 0, "1 or more");
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
  if (options_.audit_rate <= 0) return false;
  const std::lock_guard lock(mutex_);
  return static_cast<double>(generator_() >> 11) * 0x1p-53 < options_.audit_rate;
}

bool DivergenceMonitor::record(std::size_t bank, const OutputDifference& difference) {
  const std::lock_guard lock(mutex_);
  Layer& layer = layers_.at(bank);
  ++layer.audits;
  layer.decision_changes += difference.decision_changed ? 1 : 0;
  layer.cosine_sum += difference.cosine;
  layer.cosine_max = std::max(layer.cosine_max, difference.cosine);
  layer.relative_sum += difference.relative;
  layer.relative_max = std::max(layer.relative_max, difference.relative);
  const bool good = difference.cosine <= options_.tolerance.cosine &&
                    difference.relative <= options_.tolerance.relative && !difference.decision_changed;
  if (!good) {
    layer.tau += options_.raise * std::max(1 - layer.tau, 0.0);
    layer.clean = 0;
  } else if (++layer.clean >= options_.clean_audits) {
    layer.tau -= options_.lower * (layer.tau - layer.configured);
    layer.clean = 0;
  }
  return good;
}

void DivergenceMonitor::add_to(std::size_t bank, LayerStats& stats) const {
  const std::lock_guard lock(mutex_);
  const Layer& layer = layers_.at(bank);
  stats.tau = layer.tau;
  stats.audits = layer.audits;
  stats.decision_changes = layer.decision_changes;
  const double n = std::max<double>(1, static_cast<double>(layer.audits));
  stats.cosine_error_mean = layer.cosine_sum / n;
  stats.cosine_error_max = layer.cosine_max;
  stats.relative_error_mean = layer.relative_sum / n;
  stats.relative_error_max = layer.relative_max;
}

}  // namespace llmcache
