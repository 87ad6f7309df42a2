#include "calibration.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "failure.h"

namespace llmcache::bench {
namespace {

ScoreFunction scores_of(const Probe& probe) {
  const auto classes = static_cast<std::int64_t>(probe.classes.size());
  const auto weight = at::tensor(probe.weight).view({classes, probe.dims}).t().contiguous();
  const auto bias = at::tensor(probe.bias);
  return [weight, bias](const at::Tensor& outputs) { return at::addmm(bias, outputs.to(at::kFloat), weight); };
}

}  // namespace

Calibration::Calibration(LoadedModel& model, const TokenFile& tokens, const Arguments& arguments,
                         const std::optional<Probe>& probe, std::int64_t cut, Progress& progress)
    : model_(model), tokens_(tokens), arguments_(arguments), cut_(cut), progress_(progress) {
  if (probe) scores_ = scores_of(*probe);
}

BudgetOptions Calibration::options(const Setting& setting) const {
  BudgetOptions options;
  options.budget = {budget_metric_from_string(arguments_.metric), setting.epsilon.value(), arguments_.delta};
  options.scores = scores_;
  options.early_exit = early_exit_from_string(setting.early_exit);
  return options;
}

void Calibration::calibrate(Cache& cache, const Setting& setting) {
  const bool file = arguments_.calibration != "auto";
  try {
    if (file && std::filesystem::exists(arguments_.calibration)) {
      cache.use_calibration(CalibrationProfile::load(arguments_.calibration));
    } else {
      if (tokens_.fill_requests == 0) {
        throw Failure(fmt::format("{} has no training part to calibrate on; name a profile by --calibration FILE",
                                  tokens_.workload));
      }
      auto& sample = samples_[setting.weights];
      if (sample.exit == nullptr) {
        const auto start = std::chrono::steady_clock::now();
        std::int64_t next = 0;
        sample = cache.run_sample([&]() -> std::optional<Inputs> {
          if (next == tokens_.fill_requests) return std::nullopt;
          return model_.inputs(tokens_.request(next++, cut_));
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        progress_.note(
            fmt::format("note: {}: calibrated on the {} requests of its training part ({} different "
                        "sequences), which ran in {:.0f} s before the clock started",
                        tokens_.workload, tokens_.fill_requests, sample.sequences, seconds.count()));
      }
      cache.calibrate(sample);
      if (file) cache.calibration()->save(arguments_.calibration);
    }
  } catch (const Error& error) {
    throw Failure(fmt::format("{}: {}", tokens_.workload, one_line(error)));
  }
  typical_distance_ = cache.calibration()->typical_distance;
}

at::Tensor Calibration::pooled(const c10::IValue& output) const {
  return tensor_of(output, model_.output_shape().pooled_output).to(at::kFloat);
}

std::vector<double> Calibration::errors(const c10::IValue& answer, const c10::IValue& plain) const {
  const auto got = pooled(answer);
  const auto want = pooled(plain);
  at::Tensor error;
  if (arguments_.metric == "relative") {
    if (typical_distance_ == 0) return {};
    error = ((got - want).norm(2, 1) / typical_distance_).clamp_max(1.0);
  } else {
    const auto decide = [&](const at::Tensor& outputs) { return (scores_ ? scores_(outputs) : outputs).argmax(1); };
    error = decide(got).ne(decide(want));
  }
  error = error.to(at::kDouble).contiguous();
  return {error.const_data_ptr<double>(), error.const_data_ptr<double>() + error.numel()};
}

}  // namespace llmcache::bench
