// Means and percentiles of measured values.
#pragma once

#include <utility>
#include <vector>

namespace llmcache::bench {

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

}  // namespace llmcache::bench
