#include "statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

namespace llmcache::bench {
namespace {

bool any_nan(const std::vector<double>& values) {
  return std::ranges::any_of(values, [](double v) { return std::isnan(v); });
}

}  // namespace

double ratio(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? kNotMeasured : static_cast<double>(part) / static_cast<double>(whole);
}

double mean(const std::vector<double>& values) {
  if (values.empty()) return kNotMeasured;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double percentile(std::vector<double> values, double p) {
  if (values.empty() || any_nan(values)) return kNotMeasured;
  std::ranges::sort(values);
  const double place = std::clamp(p, 0.0, 100.0) / 100.0 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const double part = place - static_cast<double>(below);
  return part == 0 ? values[below] : values[below] + part * (values[below + 1] - values[below]);
}

Summary summarize(const std::vector<double>& values) {
  const auto at = [&](double p) { return percentile(values, p); };
  return {.mean = mean(values), .p50 = at(50), .p95 = at(95), .p99 = at(99), .max = at(100)};
}

Interval wilson(std::int64_t successes, std::int64_t trials) {
  if (trials <= 0) return {};
  constexpr double kZ = 1.959963984540054;  // 97.5 % of the normal distribution lies below
  const auto n = static_cast<double>(trials);
  const double p = static_cast<double>(successes) / n;
  const double shrunk = 1 + kZ * kZ / n;
  const double centre = (p + kZ * kZ / (2 * n)) / shrunk;
  const double half = kZ / shrunk * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n));
  // Exact at the ends, where rounding would leave 1e-17.
  return {successes == 0 ? 0 : std::max(0.0, centre - half), successes == trials ? 1 : std::min(1.0, centre + half)};
}

std::vector<double> average_ranks(const std::vector<double>& values) {
  std::vector<double> sorted = values;
  std::ranges::sort(sorted);
  std::vector<double> ranks;
  for (const double value : values) {
    const auto [first, last] = std::equal_range(sorted.begin(), sorted.end(), value);
    ranks.push_back(static_cast<double>((first - sorted.begin()) + 1 + (last - sorted.begin())) / 2);
  }
  return ranks;
}

double spearman(const std::vector<double>& x, const std::vector<double>& y) {
  if (x.size() < 2 || any_nan(x) || any_nan(y)) return kNotMeasured;
  const auto rx = average_ranks(x);
  const auto ry = average_ranks(y);
  const double middle = (static_cast<double>(x.size()) + 1) / 2;
  const auto product = [middle](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0, std::plus<>(),
                              [middle](double one, double other) { return (one - middle) * (other - middle); });
  };
  const double xx = product(rx, rx);
  const double yy = product(ry, ry);
  return xx == 0 || yy == 0 ? kNotMeasured : product(rx, ry) / std::sqrt(xx * yy);
}

const char* to_string(Metric metric) noexcept {
  constexpr std::array kNames = {"accuracy",   "choice_accuracy", "choice_accuracy_per_byte",
                                 "perplexity", "answer_nll",      "spearman",
                                 "f1",         "exact_match"};
  return kNames[static_cast<std::size_t>(metric)];
}

double metric_value(Metric metric, const std::vector<Sample>& samples) {
  std::vector<double> values, weights;
  for (const Sample& sample : samples) {
    values.push_back(sample.value);
    weights.push_back(sample.weight);
  }
  if (metric == Metric::kSpearman) return spearman(values, weights);
  const double weight = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (weight == 0) return kNotMeasured;
  const double value = std::accumulate(values.begin(), values.end(), 0.0) / weight;
  return metric == Metric::kPerplexity ? std::exp(value) : value;
}

Comparison compare(Metric metric, const std::vector<Sample>& samples, const std::vector<Sample>& baseline) {
  constexpr int kResamples = 1000;
  Comparison result{.metric = to_string(metric), .value = metric_value(metric, samples)};
  if (baseline.size() != samples.size() || samples.empty()) return result;
  result.baseline = metric_value(metric, baseline);
  result.change = result.value - result.baseline;
  std::mt19937_64 generator(0);
  std::vector<double> changes;
  std::vector<Sample> drawn(samples.size());
  std::vector<Sample> drawn_baseline(samples.size());
  for (int i = 0; i < kResamples; ++i) {
    for (std::size_t j = 0; j < samples.size(); ++j) {
      const std::size_t pick = generator() % samples.size();  // 2^64 is so large that no remainder is favoured visibly
      drawn[j] = samples[pick];
      drawn_baseline[j] = baseline[pick];
    }
    changes.push_back(metric_value(metric, drawn) - metric_value(metric, drawn_baseline));
  }
  std::erase_if(changes, [](double v) { return std::isnan(v); });  // a draw without spread has no rank correlation
  result.ci95 = {percentile(changes, 2.5), percentile(changes, 97.5)};
  return result;
}

}  // namespace llmcache::bench
