#include "calibration.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>

#include "clock.h"
#include "failure.h"

namespace llmcache::bench {

Calibration::Calibration(LoadedModel& model, const TokenFile& tokens, const Settings& settings,
                         const std::optional<LinearProbe>& probe, bool decoder, std::int64_t cut, Progress& progress)
    : model_(model),
      tokens_(tokens),
      settings_(settings),
      metric_(settings.metric != "auto" ? budget_metric_from_string(settings.metric)
              : decoder                 ? BudgetMetric::kTokenAgreement
                                        : BudgetMetric::kDecision),
      cut_(cut),
      progress_(progress) {
  if (!probe) return;
  const auto classes = static_cast<std::int64_t>(probe->classes.size());
  scores_ = linear_scores(at::tensor(probe->weight).view({classes, probe->dims}), at::tensor(probe->bias));
  first_ = first_unfitted(*probe, tokens);
  probe_hash_ = XXH3_64bits(probe->weight.data(), probe->weight.size() * sizeof(probe->weight[0])) +
                XXH3_64bits(probe->bias.data(), probe->bias.size() * sizeof(probe->bias[0])) +
                static_cast<std::uint64_t>(first_);
}

BudgetOptions Calibration::options(const RunConfig& config) const {
  BudgetOptions options;
  options.budget = {metric_, config.epsilon.value(), settings_.delta};
  options.scores = scores_;
  options.early_exit = early_exit_from_string(config.early_exit);
  options.format = bank_format_from_string(settings_.bank_format);
  options.token_reuse = options.early_exit != EarlyExit::kCacheFree;  // a baseline that keeps nothing
  return options;
}

RequestRange Calibration::requests(const RunConfig& config) const {
  const std::int64_t all = tokens_.fill_requests - first_;
  const std::int64_t size = std::min(settings_.calibration_requests.value_or(all), all) / settings_.calibration_parts;
  const std::int64_t begin = first_ + (config.calibration_part.value_or(1) - 1) * size;
  return {begin, begin + size};
}

void Calibration::calibrate(Cache& cache, const RunConfig& config) {
  try {
    if (!keeps()) {
      make(cache, config);
    } else {
      const auto path =
          kept_path(fmt::format("{}-{}-{}-{}", to_string(metric_), *config.epsilon, config.early_exit, config.weights));
      if (!take_kept(cache, path)) {
        make(cache, config);
        keep(cache, path);
      }
    }
  } catch (const Error& error) {
    throw Failure(fmt::format("{}: {}", tokens_.workload, one_line(error)));
  }
  typical_distance_ = cache.calibration()->typical_distance;
}

std::filesystem::path Calibration::kept_path(const std::string& what) const {
  const auto folder = settings_.models_folder / "calibrations";
  std::error_code error;  // if there is none, saving says so
  std::filesystem::create_directories(folder, error);
  const auto bytes = [](const auto& values) { return values.size() * sizeof(values[0]); };
  const std::uint64_t data = XXH3_64bits_withSeed(tokens_.tokens.data(), bytes(tokens_.tokens),
                                                  probe_hash_ + static_cast<std::uint64_t>(requests().count()));
  return folder / fmt::format("{}.{}.{}.{:016x}.json", model_.cache().profile().digest.substr(0, 12), tokens_.workload,
                              what, data);
}

/// A profile that another version wrote, or that is damaged, is made again.
bool Calibration::take_kept(Cache& cache, const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return false;
  try {
    cache.use_calibration(CalibrationProfile::load(path));
    return true;
  } catch (const Error& error) {
    progress_.note(fmt::format("note: {}: {}; calibrating again", path.string(), one_line(error)));
    return false;
  }
}

void Calibration::keep(const Cache& cache, const std::filesystem::path& path) const {
  try {
    cache.calibration()->save(path);
  } catch (const Error& error) {
    progress_.note(fmt::format("note: the calibration is not kept: {}", one_line(error)));
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
      const std::int64_t number = next++;
      return model_.inputs(tokens_.request(number, cut_), tokens_.marks(number, cut_));
    });
  }
  cache.calibrate(sample);
  progress_.note(
      fmt::format("note: {}: epsilon {}, early exit {}, weights {}: calibrated on {} requests of its training part "
                  "({} different sequences) in {:.0f} s, before the clock started",
                  tokens_.workload, *config.epsilon, config.early_exit, config.weights, range.count(), sample.sequences,
                  seconds_since(start)));
}

at::Tensor Calibration::pooled(const c10::IValue& output) const {
  return tensor_of(output, model_.output_shape().pooled_output).to(at::kFloat);
}

std::vector<double> Calibration::errors(const Returned& answer, const Returned& plain) const {
  std::vector<double> errors;
  if (metric_ == BudgetMetric::kTokenAgreement) {
    const auto got = tensor_of(answer.output, model_.output_shape().logits_output);
    const auto want = tensor_of(plain.output, model_.output_shape().logits_output);
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

}  // namespace llmcache::bench
