#include "refresh/ladder_calibration.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "refresh/risk_bound.h"

namespace llmcache {
namespace {

double mean(const std::vector<double>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return sum / static_cast<double>(std::max<std::size_t>(1, values.size()));
}

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

LadderChoice choose_setting(const std::vector<LadderDraw>& draws, const Budget& budget, bool binary) {
  LadderChoice choice;
  if (draws.empty()) return choice;
  const std::size_t settings = draws[0].errors.size();
  struct Candidate {
    int setting = 0;
    double error = 0;
    double computed = 0;
  };
  std::vector<Candidate> candidates;
  const auto values = [&](std::size_t first, std::size_t setting, auto field) {
    std::vector<double> chosen;
    for (std::size_t i = first; i < draws.size(); i += 2) chosen.push_back((draws[i].*field)[setting]);
    return chosen;
  };
  for (std::size_t s = 0; s < settings; ++s) {
    candidates.push_back(
        {static_cast<int>(s), mean(values(0, s, &LadderDraw::errors)), mean(values(0, s, &LadderDraw::computed))});
  }
  std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.error != b.error ? a.error < b.error : a.computed < b.computed;
  });
  std::vector<Candidate> ladder;
  for (const Candidate& candidate : candidates) {
    if (ladder.empty() || candidate.computed < ladder.back().computed) ladder.push_back(candidate);
  }
  std::vector<std::vector<double>> errors;
  for (const Candidate& candidate : ladder) {
    errors.push_back(values(1, static_cast<std::size_t>(candidate.setting), &LadderDraw::errors));
  }
  choice.ordered = (draws.size() + 1) / 2;
  choice.certified = draws.size() / 2;
  if (choice.certified == 0) return choice;
  // The ladder computes less with every rung, so that the last one that passes computes least.
  const auto last = choose_level(errors, budget.epsilon, budget.delta, binary ? LossKind::kBinary : LossKind::kReal);
  if (last < 0) return choice;
  const auto rung = static_cast<std::size_t>(last);
  choice.setting = ladder[rung].setting;
  choice.error = mean(errors[rung]);
  choice.bound = upper_bound(errors[rung], budget.delta, binary);
  choice.computed = mean(values(1, static_cast<std::size_t>(choice.setting), &LadderDraw::computed));
  return choice;
}

}  // namespace llmcache
