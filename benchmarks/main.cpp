// llmcache-bench: see README.md for what it does, or --help.
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "command_line.h"
#include "config.h"
#include "experiment.h"
#include "failure.h"
#include "files.h"
#include "loaded_model.h"
#include "machine.h"
#include "selection.h"
#include "systems.h"
#include "table.h"

namespace {

using namespace llmcache::bench;

constexpr const char* kName = "llmcache-bench";

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

/// Finds out before measuring, not after, that the results cannot be written.
void check_target(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(absolute(path).parent_path()) && !std::filesystem::is_directory(path)) return;
  throw Failure(fmt::format("--json {}: the folder is missing, or the name is a folder's", path.string()));
}

struct Results {
  std::vector<Record> records;
  std::vector<WrapCost> wraps;
  std::vector<std::string> failures;  ///< one line each; what was measured before is in `records`
};

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
    results.failures.push_back(fmt::format("{}: {}", label, one_line(error)));
    progress.end("failed");
  }
}

/// The first cache says what the model is, and finds the states for semantic-cache; the others have caches of their
/// own.
void wrap(LoadedModel& model, const Settings& settings, Results& results) {
  if (std::ranges::all_of(settings.modes, [](const std::string& mode) { return mode == "nocache"; })) return;
  const bool identical = settings.has_fidelity("identical") && !settings.has_fidelity("lossless");
  for (const std::string& weights : settings.weights) {
    const RunConfig config = {.mode = "llmcache",
                              .fidelity = identical ? "identical" : "lossless",
                              .capacity_mib = settings.capacities_mib.front(),
                              .weights = weights};
    results.wraps.push_back(model.wrap(cache_options(config, settings, {}, 0), cache_name(config, settings)));
  }
}

/// The first texts of the workload that Settings::weights_sample names; none where it names none.
std::vector<std::vector<std::int64_t>> weights_sample(const Settings& settings, const Selected& selected) {
  constexpr std::size_t kTokens = 1024;
  if (settings.weights_sample.empty()) return {};
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

/// Sets the number of threads of the process and runs everything, a model at a time. A model that fails is reported and
/// the others go on. Shows progress on stderr.
Results run(const Configuration& configuration, const std::vector<Selected>& selected) {
  at::set_num_interop_threads(1);
  at::set_num_threads(static_cast<int>(configuration.settings.threads));
  std::size_t experiments = 0;
  double shares = 0;
  for (const Selected& one : selected) {
    for (const SelectedExperiment& experiment : one.experiments) shares += experiment.share;
    experiments += one.experiments.size();
  }
  const double per_share = seconds_per_share(configuration, shares);
  Progress progress(experiments);
  Results results;
  for (const Selected& one : selected) {
    try {
      LoadedModel model(one.model);
      model.prepare_wrapping(weights_sample(configuration.settings, one), /*saved_profiles=*/true);
      wrap(model, configuration.settings, results);
      for (const auto& experiment : one.experiments) {
        run_one(model, one.model, experiment, per_share, progress, results);
      }
    } catch (const std::exception& error) {
      const bool told = dynamic_cast<const Failure*>(&error) != nullptr;
      results.failures.push_back(told ? error.what() : fmt::format("model {}: {}", one.model.name, one_line(error)));
      progress.skip(one.experiments.size());
    }
  }
  return results;
}

void print_results(const Results& results, const Machine& machine, const Settings& settings) {
  const Versions& versions = results.records.front().versions;
  const std::string batch = settings.batch ? fmt::format(" batches of {};", *settings.batch) : "";
  print(fmt::format("{}, {} cores, {:.1f} GiB; {} {};{} LibTorch {}, {}, LLMCache {}\n\n", machine.cpu, machine.cores,
                    machine.memory_gib, settings.threads, settings.threads == 1 ? "thread" : "threads", batch,
                    versions.torch, versions.compiler, versions.llmcache));
  print(results_table(results.records));
  if (const std::string list = greedy_list(results.records); !list.empty()) {
    print(fmt::format("\nTokens that do not come out on top as in nocache:\n{}", list));
  }
  if (!results.wraps.empty()) print(fmt::format("\n{}", wrap_table(results.wraps)));
  std::fflush(stdout);
}

int bench(int argc, char** argv) {
  const Command command = parse_command(argc, argv);
  const Settings& settings = command.configuration.settings;
  if (command.list || command.schema || command.needs) {
    print(command.list     ? list_files(settings)
          : command.schema ? results_schema().dump(1) + "\n"
                           : needs_text(command.configuration));
    return 0;
  }
  if (settings.json) check_target(*settings.json);
  const Results results = run(command.configuration, select(command.configuration));
  if (!results.records.empty()) {
    const Machine machine = this_machine();
    print_results(results, machine, settings);
    if (settings.json) write_json(*settings.json, results_json(machine, command.text, results.records));
  }
  for (const std::string& failure : results.failures) complain(kName, failure);
  return results.failures.empty() ? 0 : 2;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kName, [&] { return bench(argc, argv); });
}
