#include "refresh/sample_need.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace llmcache {
namespace {

constexpr std::int64_t kMostSequences = 100'000'000;

/// The fewest of which so many errors would prove it; kMostSequences if as many do not.
std::int64_t needed_binary(double error, const Budget& budget) {
  const auto proves = [&](std::int64_t n) {
    return binomial_cdf(std::llround(error * static_cast<double>(n)), n, budget.epsilon) <= budget.delta;
  };
  std::int64_t high = 1;
  while (high < kMostSequences && !proves(high)) high *= 2;
  std::int64_t low = high / 2;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (proves(middle) ? high : low) = middle;
  }
  return high;
}

/// By the normal approximation, and at least what errors of 0 would need.
std::int64_t needed_real(const std::vector<double>& errors, double error, const Budget& budget) {
  double squares = 0;
  for (const double one : errors) squares += (one - error) * (one - error);
  const double variance = errors.empty() ? 0 : squares / static_cast<double>(errors.size());
  const double spread = std::sqrt(2 * std::log(1 / budget.delta));  // at least the normal quantile of 1 - delta
  const double gap = budget.epsilon - error;
  const double needed = std::max(variance * spread * spread / (gap * gap), std::log(1 / budget.delta) / budget.epsilon);
  return static_cast<std::int64_t>(std::min(std::ceil(needed), static_cast<double>(kMostSequences)));
}

/// Two significant places, upwards.
std::int64_t rounded(double number) {
  const double unit = std::pow(10, std::max(0.0, std::floor(std::log10(std::max(number, 1.0))) - 1));
  return static_cast<std::int64_t>(std::ceil(number / unit) * unit);
}

}  // namespace

std::string why_not_certified(const std::vector<double>& errors, const Budget& budget, LossKind kind, double share) {
  const auto n = static_cast<double>(errors.size());
  const double error = errors.empty() ? 0 : std::accumulate(errors.begin(), errors.end(), 0.0) / n;
  if (error >= budget.epsilon) {
    return fmt::format(
        "the error of the most careful setting was {:.3g} on the {} sequences that certify, which is not "
        "below epsilon = {:g}: a larger sample would not help",
        error, errors.size(), budget.epsilon);
  }
  const std::int64_t needed =
      kind == LossKind::kBinary ? needed_binary(error, budget) : needed_real(errors, error, budget);
  return fmt::format(
      "an error of {:.3g} on {} sequences does not prove epsilon = {:g} with confidence {:g}; at this error "
      "it needs about {} sequences in the sample, of which {:.0f} % certify",
      error, errors.size(), budget.epsilon, 1 - budget.delta, rounded(static_cast<double>(needed) / share),
      100 * share);
}

}  // namespace llmcache
