#include "quality_metric.h"

#include <array>
#include <cmath>
#include <random>
#include <utility>

namespace llmcache::bench {
namespace {

/// By Metric.
constexpr std::array kNames = {"accuracy",   "choice_accuracy", "choice_accuracy_per_byte",
                               "perplexity", "answer_nll",      "spearman",
                               "f1",         "exact_match"};
constexpr int kResamples = 1000;
constexpr std::uint64_t kSeed = 0;

}  // namespace

const char* to_string(Metric metric) noexcept { return kNames[static_cast<std::size_t>(metric)]; }

double metric_value(Metric metric, const std::vector<Sample>& samples) {
  if (metric == Metric::kSpearman) {
    std::vector<double> predicted;
    std::vector<double> gold;
    for (const Sample& sample : samples) {
      predicted.push_back(sample.value);
      gold.push_back(sample.weight);
    }
    return spearman(predicted, gold);
  }
  double value = 0;
  double weight = 0;
  for (const Sample& sample : samples) {
    value += sample.value;
    weight += sample.weight;
  }
  if (weight == 0) return kNotMeasured;
  return metric == Metric::kPerplexity ? std::exp(value / weight) : value / weight;
}

Comparison compare(Metric metric, const std::vector<Sample>& samples, const std::vector<Sample>& baseline) {
  Comparison result{.value = metric_value(metric, samples),
                    .baseline = kNotMeasured,
                    .change = kNotMeasured,
                    .ci95 = {kNotMeasured, kNotMeasured}};
  if (baseline.size() != samples.size() || samples.empty()) return result;
  result.baseline = metric_value(metric, baseline);
  result.change = result.value - result.baseline;
  std::mt19937_64 generator(kSeed);
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
