// Statistics of measured values: percentiles, intervals, and the metrics of quality with how far caching moved them.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace llmcache::bench {

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

/// NaN where there is no whole.
double ratio(std::int64_t part, std::int64_t whole);

/// NaN for no values.
double mean(const std::vector<double>& values);

/// The p-th percentile, 0 <= p <= 100, linear between neighbours (as NumPy's default); NaN for no values or if one of
/// them is NaN.
double percentile(std::vector<double> values, double p);

inline double median(std::vector<double> values) { return percentile(std::move(values), 50); }

/// Mean and tail of one quantity.
struct Summary {
  double mean = kNotMeasured, p50 = kNotMeasured, p95 = kNotMeasured, p99 = kNotMeasured, max = kNotMeasured;
};
Summary summarize(const std::vector<double>& values);

/// An interval with its ends; NaN where it was not measured.
struct Interval {
  double low = kNotMeasured, high = kNotMeasured;
};

/// 95 % interval of a rate of which `successes` of `trials` were seen (Wilson's score interval, 1927). NaN for no
/// trials.
Interval wilson(std::int64_t successes, std::int64_t trials);

/// A rate, or a mean of errors, with its 95 % interval; NaN where nothing was counted.
struct Rate {
  double rate = kNotMeasured;
  Interval ci95 = {};
  std::int64_t of = 0;  ///< cases that the rate is over
};

/// Rank of each value, the smallest has 1; equal values share the mean of their ranks.
std::vector<double> average_ranks(const std::vector<double>& values);

/// Spearman's rank correlation: Pearson's of the average ranks. NaN for fewer than two pairs, if either side is
/// constant, or if a value is NaN. Both must have the same length.
double spearman(const std::vector<double>& x, const std::vector<double>& y);

enum class Metric {
  kAccuracy,               ///< share of sequences whose class the probe names right
  kChoiceAccuracy,         ///< share of requests whose right choice has the largest
                           ///< summed log-likelihood
  kChoiceAccuracyPerByte,  ///< the same, of sums divided by the choices' lengths
                           ///< in bytes
  kPerplexity,             ///< exp(negative log-likelihood a token)
  kAnswerNll,              ///< negative log-likelihood of the gold answers, nats a token
  kSpearman,               ///< rank correlation of predicted and gold similarity
  kF1,                     ///< mean F1 of the words of answers that are found in a passage
  kExactMatch,             ///< share of these answers that are a gold answer
};

/// "accuracy", "choice_accuracy" and so on.
const char* to_string(Metric metric) noexcept;

/// What one request contributes. Accuracies and exact match: number right, number scored. F1: F1, 1. Perplexity and
/// answer NLL: negative log-likelihood, tokens. Spearman: predicted, gold.
struct Sample {
  double value = 0;
  double weight = 0;
};

/// The metric over all samples; NaN for none.
double metric_value(Metric metric, const std::vector<Sample>& samples);

/// A metric with caching, without, and the difference, in the metric's own unit.
struct Comparison {
  std::string metric;
  double value = kNotMeasured, baseline = kNotMeasured, change = kNotMeasured;
  Interval ci95 = {};  ///< of the change
};

/// `baseline` has the samples of the same requests, in the same order, without caching; or is empty: then only the
/// value is measured. The interval is a paired percentile bootstrap (Efron and Tibshirani 1993, chapter 13): 1,000
/// times as many requests are drawn with replacement, the same for both sides. The seed is fixed: equal samples give
/// equal intervals.
Comparison compare(Metric metric, const std::vector<Sample>& samples, const std::vector<Sample>& baseline);

}  // namespace llmcache::bench
