#include "refresh/candidate_choice.h"

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

std::vector<std::size_t> choose_candidates(const std::vector<CandidateDraw>& draws, double epsilon) {
  std::vector<std::size_t> candidates;
  if (draws.empty()) return candidates;
  const std::size_t count = draws[0].errors.size();
  const auto error_of = [&](std::size_t candidate) {
    double sum = 0;
    for (const CandidateDraw& draw : draws) sum += draw.errors[candidate];
    return sum / static_cast<double>(draws.size());
  };
  const auto computed_of = [&](std::size_t candidate) {
    double sum = 0;
    double tokens = 0;
    for (const CandidateDraw& draw : draws) {
      sum += static_cast<double>(draw.tokens) * draw.computed[candidate];
      tokens += static_cast<double>(draw.tokens);
    }
    return sum / tokens;
  };
  // The safest one that computes less than all, and then whatever computes less still.
  double least = 1;
  std::optional<std::size_t> safest;
  for (std::size_t s = 0; s < count; ++s) {
    if (computed_of(s) < 1 && (!safest || error_of(s) < error_of(*safest))) safest = s;
  }
  if (!safest || error_of(*safest) > epsilon) return candidates;
  if (error_of(*safest) > kParts.front() * epsilon) {
    candidates.push_back(*safest);
    least = computed_of(*safest);
  }
  for (const double part : kParts) {
    std::optional<std::size_t> best;
    for (std::size_t s = 0; s < count; ++s) {
      const double computed = computed_of(s);
      if (computed >= least || error_of(s) > part * epsilon) continue;
      best = s;
      least = computed;
    }
    if (best) candidates.push_back(*best);
  }
  return candidates;
}

}  // namespace llmcache
