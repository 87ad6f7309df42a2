#include "equal_error.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "failure.h"
#include "files.h"
#include "llmcache/version.h"
#include "outputs.h"

namespace llmcache::bench {

std::vector<Nearest> nearest_answers(LoadedModel& model, const TokenFile& tokens, std::int64_t cut,
                                     const Calibration& calibration, Options options) {
  constexpr double kFilled = 0.7;
  options.threshold.tau = -1;
  options.threshold.layer_taus.clear();
  options.refresh.audit_rate = 0;
  const auto cache = model.make_cache(options);
  const RequestRange range = calibration.requests();
  const std::int64_t filled = range.begin + static_cast<std::int64_t>(kFilled * static_cast<double>(range.count()));
  std::vector<Nearest> nearest;
  for (std::int64_t number = range.begin; number < range.end; ++number) {
    const Rows rows = tokens.request(number, cut);
    const Inputs inputs = model.inputs(rows, tokens.marks(number, cut));
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

void save_nearest(const std::filesystem::path& path, const std::vector<Nearest>& nearest) {
  auto pairs = nlohmann::ordered_json::array();
  for (const Nearest& one : nearest) pairs.push_back({one.similarity, one.error});
  try {
    write_json(path, {{"version", LLMCACHE_VERSION}, {"nearest", std::move(pairs)}});
  } catch (const Failure&) {  // they are found again
  }
}

std::vector<Nearest> load_nearest(const std::filesystem::path& path) {
  std::ifstream in(path);
  const auto json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.value("version", nlohmann::json()) != LLMCACHE_VERSION) return {};
  std::vector<Nearest> nearest;
  if (!json.contains("nearest") || !json["nearest"].is_array()) return {};
  for (const auto& pair : json["nearest"]) {
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_number() || !pair[1].is_number()) return {};
    nearest.push_back({pair[0].get<double>(), pair[1].get<double>()});
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
