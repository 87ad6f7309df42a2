// Means and percentiles of measured values.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace llmcache::bench {

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

/// NaN where there is no whole.
double ratio(std::int64_t part, std::int64_t whole);

/// NaN for no values.
double mean(const std::vector<double>& values);

/// The p-th percentile, 0 <= p <= 100, linear between neighbours (as NumPy's default); NaN for no
/// values or if one of them is NaN.
double percentile(std::vector<double> values, double p);

inline double median(std::vector<double> values) { return percentile(std::move(values), 50); }

/// Mean and tail of one quantity.
struct Summary {
  double mean = 0;
  double p50 = 0;
  double p95 = 0;
  double p99 = 0;
  double max = 0;
};
Summary summarize(const std::vector<double>& values);

/// An interval with its ends; NaN where it was not measured.
struct Interval {
  double low = 0;
  double high = 0;
};

/// 95 % interval of a rate of which `successes` of `trials` were seen (Wilson's score interval, 1927).
/// [NaN, NaN] for no trials.
Interval wilson(std::int64_t successes, std::int64_t trials);

/// A rate with its 95 % interval (Wilson); NaN where nothing was counted.
struct Rate {
  double rate = 0;
  Interval ci95;
  std::int64_t of = 0;  ///< cases that the rate is over
};

/// Rank of each value, the smallest has 1; equal values share the mean of their ranks.
std::vector<double> average_ranks(const std::vector<double>& values);

/// Spearman's rank correlation: Pearson's of the average ranks. NaN for fewer than two pairs, if
/// either side is constant, or if a value is NaN. Both must have the same length.
double spearman(const std::vector<double>& x, const std::vector<double>& y);

}  // namespace llmcache::bench
