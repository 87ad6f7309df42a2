#include "runner.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <exception>

#include "clock.h"
#include "experiment.h"
#include "failure.h"
#include "loaded_model.h"
#include "progress.h"
#include "systems.h"

namespace llmcache::bench {
namespace {

std::string reason_of(const std::exception& error) {
  return dynamic_cast<const Failure*>(&error) != nullptr ? error.what() : one_line(error);
}

void run_one(LoadedModel& model, const ModelFile& file, const SelectedExperiment& experiment, double per_share,
             Progress& progress, Results& results) {
  const std::string label = fmt::format("{} on {}", file.name, experiment.tokens->workload);
  progress.begin(label);
  const auto start = Clock::now();
  try {
    const double seconds = experiment.settings.seconds.value_or(per_share * experiment.share);
    const auto records = run_experiment({model, file, *experiment.tokens, experiment.settings, seconds, progress});
    results.records.insert(results.records.end(), records.begin(), records.end());
    progress.end(fmt::format("{} of {} requests, {:.1f} s", records[0].requests, records[0].requests_available,
                             seconds_since(start)));
  } catch (const std::exception& error) {
    results.failures.push_back(fmt::format("{}: {}", label, reason_of(error)));
    progress.end("failed");
  }
}

/// The first cache says what the model is, and finds the states for semantic-cache; the others have caches of their
/// own.
void wrap(LoadedModel& model, const Settings& settings, Results& results) {
  const auto cached = [](const std::string& mode) { return mode != "nocache"; };
  if (std::ranges::none_of(settings.modes, cached)) return;
  const bool identical = settings.has_fidelity("identical") && !settings.has_fidelity("lossless");
  for (const std::string& weights : settings.weights) {
    const RunConfig config = {.mode = "llmcache",
                              .fidelity = identical ? "identical" : "lossless",
                              .capacity_mib = settings.capacities_mib.front(),
                              .weights = weights};
    results.wraps.push_back(model.wrap(cache_options(config, settings, {}, 0), cache_name(config, settings)));
  }
}

/// The first texts of the workload that Settings::weights_sample names.
std::vector<std::vector<std::int64_t>> weights_sample(const Configuration& configuration, const Selected& selected) {
  constexpr std::size_t kTokens = 1024;
  const Settings& settings = configuration.settings;
  const std::string& tokenizer = selected.experiments.front().tokens->tokenizer;
  const auto file = settings.data_folder / fmt::format("{}.{}.safetensors", settings.weights_sample, tokenizer);
  const TokenFile tokens = read_token_file(file);
  std::vector<std::vector<std::int64_t>> texts;
  std::size_t left = kTokens;
  for (std::int64_t i = 0; i < tokens.sequences() && left > 0; ++i) {
    const auto ids = tokens.sequence(i);
    const auto own = ids.first(std::min({left, ids.size(), static_cast<std::size_t>(selected.model.max_tokens)}));
    texts.emplace_back(own.begin(), own.end());
    left -= own.size();
  }
  return texts;
}

}  // namespace

Results run(const Configuration& configuration, const std::vector<Selected>& selected) {
  at::set_num_interop_threads(1);
  at::set_num_threads(static_cast<int>(configuration.settings.threads));
  std::size_t experiments = 0;
  double shares = 0;
  for (const Selected& one : selected) {
    experiments += one.experiments.size();
    for (const SelectedExperiment& experiment : one.experiments) shares += experiment.share;
  }
  const double per_share = seconds_per_share(configuration, shares);
  Progress progress(experiments);
  Results results;
  for (const Selected& one : selected) {
    try {
      LoadedModel model(one.model);
      if (!configuration.settings.weights_sample.empty()) model.take_weights_sample(weights_sample(configuration, one));
      wrap(model, configuration.settings, results);
      for (const auto& experiment : one.experiments) {
        run_one(model, one.model, experiment, per_share, progress, results);
      }
    } catch (const Failure& error) {
      results.failures.emplace_back(error.what());
      progress.skip(one.experiments.size());
    } catch (const std::exception& error) {
      results.failures.push_back(fmt::format("model {}: {}", one.model.name, one_line(error)));
      progress.skip(one.experiments.size());
    }
  }
  return results;
}

}  // namespace llmcache::bench
