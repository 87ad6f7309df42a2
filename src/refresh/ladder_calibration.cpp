#include "refresh/ladder_calibration.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>

#include "refresh/risk_bound.h"

namespace llmcache {
namespace {

double mean(const std::vector<double>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return sum / static_cast<double>(std::max<std::size_t>(1, values.size()));
}

constexpr std::array kParts = {0.3, 0.6, 0.9};  // of the budget

}  // namespace

double upper_bound(const std::vector<double>& errors, double delta, bool binary) {
  if (errors.empty()) return 1;
  if (binary) {
    return clopper_pearson_upper(std::llround(std::accumulate(errors.begin(), errors.end(), 0.0)),
                                 static_cast<std::int64_t>(errors.size()), delta);
  }
  double low = mean(errors);
  double high = 1;
  while (high - low > 1e-5) {
    const double middle = (low + high) / 2;
    (betting_p_value(errors, middle, delta) <= delta ? high : low) = middle;
  }
  return high;
}

std::vector<std::size_t> choose_rungs(const std::vector<LadderDraw>& draws, double epsilon) {
  std::vector<std::size_t> rungs;
  if (draws.empty()) return rungs;
  const std::size_t settings = draws[0].errors.size();
  const auto mean_of = [&](std::size_t setting, auto field) {
    std::vector<double> values;
    for (const LadderDraw& draw : draws) values.push_back((draw.*field)[setting]);
    return mean(values);
  };
  const auto error_of = [&](std::size_t setting) { return mean_of(setting, &LadderDraw::errors); };
  const auto computed_of = [&](std::size_t setting) { return mean_of(setting, &LadderDraw::computed); };
  // The safest one that computes less than all, and then whatever computes less still.
  double least = 1;
  std::optional<std::size_t> safest;
  for (std::size_t s = 0; s < settings; ++s) {
    if (computed_of(s) < 1 && (!safest || error_of(s) < error_of(*safest))) safest = s;
  }
  if (!safest || error_of(*safest) > epsilon) return rungs;
  if (error_of(*safest) > kParts.front() * epsilon) {
    rungs.push_back(*safest);
    least = computed_of(*safest);
  }
  for (const double part : kParts) {
    std::optional<std::size_t> best;
    for (std::size_t s = 0; s < settings; ++s) {
      const double computed = computed_of(s);
      if (computed >= least || error_of(s) > part * epsilon) continue;
      best = s;
      least = computed;
    }
    if (best) rungs.push_back(*best);
  }
  return rungs;
}

}  // namespace llmcache
