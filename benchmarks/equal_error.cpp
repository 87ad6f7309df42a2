#include "equal_error.h"

#include <algorithm>

#include "outputs.h"

namespace llmcache::bench {

std::vector<Nearest> nearest_answers(LoadedModel& model, const TokenFile& tokens, std::int64_t cut,
                                     const Calibration& calibration, Options options) {
  constexpr double kFilled = 0.7;
  options.threshold.tau = -1;
  options.threshold.layer_taus.clear();
  options.refresh.shadow_rate = 0;
  const auto cache = model.make_cache(options);
  const std::int64_t first = calibration.first_request();
  const std::int64_t filled = first + static_cast<std::int64_t>(kFilled * static_cast<double>(calibration.requests()));
  std::vector<Nearest> nearest;
  for (std::int64_t number = first; number < first + calibration.requests(); ++number) {
    const Rows rows = tokens.request(number, cut);
    const Inputs inputs = model.inputs(rows, tokens.pools(number, cut));
    RequestOptions one;
    one.look_up = number >= filled;
    const auto output = cache->forward(inputs, one);
    if (number < filled) continue;
    const auto errors = calibration.errors(all_of(output, rows), all_of(model.plain(inputs), rows));
    const auto& report = cache->last_report().sequences;
    for (std::size_t row = 0; row < errors.size(); ++row) nearest.push_back({report[row].similarity, errors[row]});
  }
  return nearest;
}

double threshold_within(std::vector<Nearest> nearest, double epsilon) {
  std::ranges::sort(nearest, std::ranges::greater{}, &Nearest::similarity);
  const double most = epsilon * static_cast<double>(nearest.size());
  double threshold = 1;
  double sum = 0;
  for (std::size_t i = 0; i < nearest.size(); ++i) {
    sum += nearest[i].error;
    if (sum > most) break;
    // Those that are as similar come together.
    if (i + 1 == nearest.size() || nearest[i + 1].similarity < nearest[i].similarity) threshold = nearest[i].similarity;
  }
  return threshold;
}

}  // namespace llmcache::bench
