#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace llmcache::bench {

double ratio(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? kNotMeasured : static_cast<double>(part) / static_cast<double>(whole);
}

double mean(const std::vector<double>& values) {
  if (values.empty()) return kNotMeasured;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double percentile(std::vector<double> values, double p) {
  const bool undefined = std::any_of(values.begin(), values.end(), [](double v) { return std::isnan(v); });
  if (values.empty() || undefined) return kNotMeasured;
  std::sort(values.begin(), values.end());
  const double place = std::clamp(p, 0.0, 100.0) / 100.0 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const double part = place - static_cast<double>(below);
  if (part == 0) return values[below];
  return values[below] + part * (values[below + 1] - values[below]);
}

Summary summarize(const std::vector<double>& values) {
  return {.mean = mean(values),
          .p50 = percentile(values, 50),
          .p95 = percentile(values, 95),
          .p99 = percentile(values, 99),
          .max = percentile(values, 100)};
}

Interval wilson(std::int64_t successes, std::int64_t trials) {
  if (trials <= 0) return {kNotMeasured, kNotMeasured};
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
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (std::size_t first = 0; first < order.size();) {
    std::size_t last = first + 1;
    while (last < order.size() && values[order[last]] == values[order[first]]) ++last;
    const double rank = static_cast<double>(first + 1 + last) / 2;
    for (; first < last; ++first) ranks[order[first]] = rank;
  }
  return ranks;
}

double spearman(const std::vector<double>& x, const std::vector<double>& y) {
  const auto undefined = [](const std::vector<double>& values) {
    return std::any_of(values.begin(), values.end(), [](double v) { return std::isnan(v); });
  };
  if (x.size() < 2 || undefined(x) || undefined(y)) return kNotMeasured;
  const auto rx = average_ranks(x);
  const auto ry = average_ranks(y);
  const double middle = (static_cast<double>(x.size()) + 1) / 2;
  double xy = 0;
  double xx = 0;
  double yy = 0;
  for (std::size_t i = 0; i < rx.size(); ++i) {
    xy += (rx[i] - middle) * (ry[i] - middle);
    xx += (rx[i] - middle) * (rx[i] - middle);
    yy += (ry[i] - middle) * (ry[i] - middle);
  }
  return xx == 0 || yy == 0 ? kNotMeasured : xy / std::sqrt(xx * yy);
}

}  // namespace llmcache::bench
