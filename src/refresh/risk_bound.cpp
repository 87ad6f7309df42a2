#include "refresh/risk_bound.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "llmcache/error.h"
#include "refusal.h"

namespace llmcache {
namespace {

void check_probability(const char* name, double value) {
  if (!(value > 0 && value < 1)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("{} is {}; more than 0 and less than 1 is expected", name, value));
  }
}

void check_counts(std::int64_t count, std::int64_t n) {
  if (n < 0 || count < 0 || count > n)
    refuse_input(fmt::format("{} of {} is no count; 0 to n of n is expected", count, n));
}

void check_loss(double loss) {
  if (!(loss >= 0 && loss <= 1)) refuse_input(fmt::format("a loss is {}; 0 to 1 is expected", loss));
}

/// Logarithm of the gamma function, thread-safe: std::lgamma writes a global. Stirling's series, exact to 1e-14
/// from 10.
double log_gamma(double x) {
  double shift = 0;
  for (; x < 10; ++x) shift -= std::log(x);
  const double y = 1 / (x * x);
  const double series = (1.0 / 12 - y * (1.0 / 360 - y * (1.0 / 1260 - y * (1.0 / 1680 - y / 1188)))) / x;
  return shift + (x - 0.5) * std::log(x) - x + 0.91893853320467274178 + series;
}

/// The continued fraction of the incomplete beta function (Abramowitz & Stegun 26.5.8), by Lentz's method.
double beta_fraction(double a, double b, double x) {
  constexpr double kTiny = 1e-300;
  const auto away_from_zero = [](double value) { return std::abs(value) < kTiny ? kTiny : value; };
  double c = 1;
  double d = 1 / away_from_zero(1 - (a + b) * x / (a + 1));
  double value = d;
  for (int i = 1; i < 100000; ++i) {
    const double m = i;
    const double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1 / away_from_zero(1 + even * d);
    c = away_from_zero(1 + even / c);
    value *= d * c;
    const double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / away_from_zero(1 + odd * d);
    c = away_from_zero(1 + odd / c);
    value *= d * c;
    if (std::abs(d * c - 1) < 1e-15) break;
  }
  return value;
}

/// I_x(a, b), the distribution function of Beta(a, b).
double regularized_beta(double a, double b, double x) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  const double front = std::exp(log_gamma(a + b) - log_gamma(a) - log_gamma(b) + a * std::log(x) + b * std::log1p(-x));
  // The fraction converges fast on this side of the mean only.
  if (x < (a + 1) / (a + b + 2)) return front * beta_fraction(a, b, x) / a;
  return 1 - front * beta_fraction(b, a, 1 - x) / b;
}

}  // namespace

double binomial_cdf(std::int64_t successes, std::int64_t n, double p) {
  check_counts(successes, n);
  if (!(p >= 0 && p <= 1)) refuse_input(fmt::format("success probability is {}; 0 to 1 is expected", p));
  if (successes == n) return 1;
  return regularized_beta(static_cast<double>(n - successes), static_cast<double>(successes + 1), 1 - p);
}

double clopper_pearson_upper(std::int64_t errors, std::int64_t n, double delta) {
  check_counts(errors, n);
  check_probability("delta", delta);
  if (errors == n) return 1;
  double low = static_cast<double>(errors) / static_cast<double>(n);
  double high = 1;
  while (high - low > 1e-15 * high) {
    const double middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (binomial_cdf(errors, n, middle) > delta ? low : high) = middle;
  }
  return high;
}

double hoeffding_bentkus_p_value(double mean, std::int64_t n, double epsilon) {
  check_counts(0, n);
  check_loss(mean);
  check_probability("epsilon", epsilon);
  if (n == 0) return 1;
  const double count = static_cast<double>(n);
  const double low = std::min(mean, epsilon);
  double entropy = (1 - low) * std::log((1 - low) / (1 - epsilon));
  if (low > 0) entropy += low * std::log(low / epsilon);
  // What is above a whole number by rounding alone is that number.
  const auto errors = std::min(n, static_cast<std::int64_t>(std::ceil(count * mean * (1 - 1e-14))));
  const double bentkus = std::exp(1.0) * binomial_cdf(errors, n, epsilon);
  return std::min({1.0, std::exp(-count * entropy), bentkus});
}

double betting_p_value(std::span<const double> losses, double epsilon, double level) {
  check_probability("epsilon", epsilon);
  check_probability("level", level);
  const double aim = 2 * std::log(1 / level) / static_cast<double>(std::max<std::size_t>(losses.size(), 1));
  double log_capital = 0;
  double largest = 0;
  double sum = 0;
  double squares = 0;  // of the differences of each loss from the mean at its time
  double variance = 0.25;
  double count = 0;
  for (const double loss : losses) {
    check_loss(loss);
    const double nu = std::min(1.0, std::sqrt(aim / variance));
    log_capital += std::log1p(nu * (epsilon - loss));  // at least log(epsilon): nu is at most 1
    largest = std::max(largest, log_capital);
    ++count;
    sum += loss;
    const double mean = (0.5 + sum) / (1 + count);
    squares += (loss - mean) * (loss - mean);
    variance = (0.25 + squares) / (1 + count);
  }
  return std::exp(-largest);
}

std::int64_t choose_level(std::span<const std::vector<double>> losses, double epsilon, double delta, LossKind kind) {
  check_probability("epsilon", epsilon);
  check_probability("delta", delta);
  std::int64_t chosen = -1;
  for (const std::vector<double>& level : losses) {
    double p_value = 1;
    if (kind == LossKind::kReal) {
      p_value = betting_p_value(level, epsilon, delta);
    } else {
      std::int64_t errors = 0;
      for (const double loss : level) {
        if (loss != 0 && loss != 1) refuse_input(fmt::format("a binary loss is {}; 0 or 1 is expected", loss));
        errors += loss != 0 ? 1 : 0;
      }
      p_value = binomial_cdf(errors, static_cast<std::int64_t>(level.size()), epsilon);
    }
    if (!(p_value <= delta)) break;
    ++chosen;
  }
  return chosen;
}

}  // namespace llmcache
