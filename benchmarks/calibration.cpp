#include "calibration.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "failure.h"
#include "files.h"
#include "llmcache/version.h"

namespace llmcache::bench {
namespace {

std::uint64_t hash_of(const auto& values, std::uint64_t seed = 0) {
  return XXH3_64bits_withSeed(values.data(), values.size() * sizeof(values[0]), seed);
}

}  // namespace

Calibration::Calibration(const ExperimentContext& context, const std::optional<LinearProbe>& probe, bool decoder)
    : context_(context),
      metric_(context.settings.metric != "auto" ? budget_metric_from_string(context.settings.metric)
              : decoder                         ? BudgetMetric::kTokenAgreement
                                                : BudgetMetric::kDecision) {
  if (!probe) return;
  const auto classes = static_cast<std::int64_t>(probe->classes.size());
  scores_ = linear_scores(at::tensor(probe->weight).view({classes, probe->dims}), at::tensor(probe->bias));
  first_ = first_unfitted(*probe, tokens_);
  probe_hash_ = hash_of(probe->weight) + hash_of(probe->bias) + static_cast<std::uint64_t>(first_);
}

BudgetOptions Calibration::options(const RunConfig& config) const {
  BudgetOptions options;
  options.budget = {metric_, config.epsilon.value(), context_.settings.delta};
  options.scores = scores_;
  options.early_exit = early_exit_from_string(config.early_exit);
  options.format = bank_format_from_string(context_.settings.bank_format);
  options.token_reuse = options.early_exit != EarlyExit::kCacheFree;  // a baseline that keeps nothing
  return options;
}

RequestRange Calibration::requests(const RunConfig& config) const {
  const std::int64_t all = tokens_.fill_requests - first_;
  const std::int64_t size =
      std::min(context_.settings.calibration_requests.value_or(all), all) / context_.settings.calibration_parts;
  const std::int64_t begin = first_ + (config.calibration_part.value_or(1) - 1) * size;
  return {begin, begin + size};
}

void Calibration::calibrate(Cache& cache, const RunConfig& config) {
  try {
    const auto path =
        kept_path(fmt::format("{}-{}-{}-{}", to_string(metric_), *config.epsilon, config.early_exit, config.weights));
    if (!keeps() || !take_kept(cache, path)) {
      make(cache, config);
      if (keeps()) keep(cache, path);
    }
  } catch (const Error& error) {
    throw Failure(fmt::format("{}: {}", tokens_.workload, one_line(error)));
  }
  typical_distance_ = cache.calibration()->typical_distance;
}

std::filesystem::path Calibration::kept_path(const std::string& what) const {
  const auto folder = context_.settings.models_folder / "calibrations";
  std::error_code error;  // if there is none, saving says so
  if (keeps()) std::filesystem::create_directories(folder, error);
  const std::uint64_t data = hash_of(tokens_.tokens, probe_hash_ + static_cast<std::uint64_t>(requests().count()));
  return folder / fmt::format("{}.{}.{}.{:016x}.json", context_.model.cache().profile().digest.substr(0, 12),
                              tokens_.workload, what, data);
}

/// A profile that another version wrote, or that is damaged, is made again.
bool Calibration::take_kept(Cache& cache, const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return false;
  try {
    cache.use_calibration(CalibrationProfile::load(path));
    return true;
  } catch (const Error& error) {
    context_.note("{}: {}; calibrating again", path.string(), one_line(error));
    return false;
  }
}

void Calibration::keep(const Cache& cache, const std::filesystem::path& path) const {
  try {
    cache.calibration()->save(path);
  } catch (const Error& error) {
    context_.note("the calibration is not kept: {}", one_line(error));
  }
}

void Calibration::make(Cache& cache, const RunConfig& config) {
  const auto start = Clock::now();
  const RequestRange range = requests(config);
  if (range.count() == 0) throw Failure(fmt::format("{} has fewer requests than parts", tokens_.workload));
  auto& sample = samples_[fmt::format("{} {}", config.weights, range.begin)];
  if (sample.exit == nullptr) {
    std::int64_t next = range.begin;
    sample = cache.run_sample([&]() -> std::optional<Inputs> {
      if (next == range.end) return std::nullopt;
      return context_.inputs(next++);
    });
  }
  cache.calibrate(sample);
  context_.note(
      "{}: epsilon {}, early exit {}, weights {}: calibrated on {} requests of its training part ({} different "
      "sequences) in {:.0f} s, before the clock started",
      tokens_.workload, *config.epsilon, config.early_exit, config.weights, range.count(), sample.sequences,
      seconds_since(start));
}

at::Tensor Calibration::pooled(const c10::IValue& output) const {
  return tensor_of(output, context_.model.output_shape().pooled_output).to(at::kFloat);
}

std::vector<double> Calibration::errors(const Returned& answer, const Returned& plain) const {
  std::vector<double> errors;
  if (metric_ == BudgetMetric::kTokenAgreement) {
    const auto got = tensor_of(answer.output, context_.model.output_shape().logits_output);
    const auto want = tensor_of(plain.output, context_.model.output_shape().logits_output);
    for (std::size_t row = 0; row < answer.tokens.size(); ++row) {
      const auto [begin, end] = answer.tokens[row];
      if (begin == end) continue;
      const auto r = static_cast<std::int64_t>(row);
      const bool same = got[r][end - 1 - begin].argmax().equal(want[r][end - 1].argmax());
      errors.push_back(same ? 0 : 1);
    }
    return errors;
  }
  const auto got = pooled(answer.output);
  const auto want = pooled(plain.output);
  at::Tensor error;
  if (metric_ == BudgetMetric::kRelativeError) {
    if (typical_distance_ == 0) return {};
    error = ((got - want).norm(2, 1) / typical_distance_).clamp_max(1.0);
  } else {
    const auto decide = [&](const at::Tensor& outputs) { return (scores_ ? scores_(outputs) : outputs).argmax(1); };
    error = decide(got).ne(decide(want));
  }
  error = error.to(at::kDouble).contiguous();
  errors.assign(error.const_data_ptr<double>(), error.const_data_ptr<double>() + error.numel());
  return errors;
}

std::vector<Nearest> nearest_answers(const ExperimentContext& context, const Calibration& calibration,
                                     Options options) {
  constexpr double kFilled = 0.7;
  options.threshold.tau = -1;
  options.threshold.layer_taus.clear();
  options.refresh.audit_rate = 0;
  const auto cache = context.model.make_cache(options);
  const RequestRange range = calibration.requests();
  const std::int64_t filled = range.begin + static_cast<std::int64_t>(kFilled * static_cast<double>(range.count()));
  std::vector<Nearest> nearest;
  for (std::int64_t number = range.begin; number < range.end; ++number) {
    const Rows rows = context.tokens.request(number, context.cut());
    const Inputs inputs = context.inputs(number);
    RequestOptions one;
    one.look_up = number >= filled;
    const auto output = cache->forward(inputs, one);
    if (number < filled) continue;
    const auto errors = calibration.errors(all_of(output, rows), all_of(context.model.plain(inputs), rows));
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
  std::vector<Nearest> nearest;
  try {
    const auto json = nlohmann::json::parse(in);
    if (json.at("version") != LLMCACHE_VERSION) return {};
    for (const auto& [similarity, error] : json.at("nearest").get<std::vector<std::pair<double, double>>>()) {
      nearest.push_back({similarity, error});
    }
  } catch (const nlohmann::json::exception&) {
    return {};
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
