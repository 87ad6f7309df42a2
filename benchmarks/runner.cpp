#include "runner.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <system_error>

#include "budget.h"
#include "cell.h"
#include "failure.h"
#include "first_run.h"
#include "loaded_model.h"
#include "probe.h"
#include "progress.h"
#include "variant.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What is measured of a model on a workload: one thing, unless nothing was asked for.
std::vector<Part> parts(const Arguments& arguments, const ModelFile& model, const TokenFile& tokens) {
  std::error_code error;
  const bool probe =
      std::filesystem::exists(probe_path(arguments.data_folder, tokens.workload, model.name), error);
  if (arguments.first_run) return first_run(arguments, model, tokens.workload, probe);
  return {{arguments, cell_weight(model, tokens, probe)}};
}

void run_part(LoadedModel& model, const ModelFile& file, const TokenFile& tokens, const Part& part, double share,
              Progress& progress, Results& results) {
  const std::string label = fmt::format("{} on {}", file.name, tokens.workload);
  progress.begin(label);
  const auto start = Clock::now();
  try {
    const double budget = part.arguments.seconds.value_or(share * part.weight);
    const auto records = run_cell({model, file, tokens, part.arguments, budget, progress});
    results.records.insert(results.records.end(), records.begin(), records.end());
    progress.end(fmt::format("{} of {} requests, {:.1f} s", records[0].requests, records[0].requests_available,
                             seconds_since(start)));
  } catch (const Failure& error) {
    results.failures.push_back(fmt::format("{}: {}", label, error.what()));
    progress.end("failed");
  } catch (const std::exception& error) {
    results.failures.push_back(fmt::format("{}: {}", label, one_line(error)));
    progress.end("failed");
  }
}

/// All workloads of one model.
void run_model(const Selected& selected, const Arguments& arguments, double share, Progress& progress,
               Results& results) {
  LoadedModel model(selected.model);
  if (std::any_of(arguments.modes.begin(), arguments.modes.end(), [](const auto& mode) { return mode != "nocache"; })) {
    // The first one says what the model is, and finds the states for doccache; the others have caches of their own.
    const auto& fidelities = arguments.fidelities;
    const bool identical = std::find(fidelities.begin(), fidelities.end(), "identical") != fidelities.end();
    const bool lossless = std::find(fidelities.begin(), fidelities.end(), "lossless") != fidelities.end();
    for (const std::string& weights : arguments.weights) {
      const Setting setting = {.mode = "llmcache",
                               .fidelity = identical && !lossless ? "identical" : "lossless",
                               .capacity_mib = arguments.capacities_mib.front(),
                               .weights = weights};
      results.wraps.push_back(model.wrap(cache_options(setting, arguments, {}, 0), cache_name(setting, arguments)));
    }
  }
  for (const auto& workload : selected.workloads) {
    for (const Part& part : parts(arguments, selected.model, *workload)) {
      run_part(model, selected.model, *workload, part, share, progress, results);
    }
  }
}

}  // namespace

Results run(const Arguments& arguments, const std::vector<Selected>& selected) {
  at::set_num_interop_threads(1);
  at::set_num_threads(arguments.threads);
  std::size_t cells = 0;
  double weights = 0;
  std::vector<std::size_t> cells_of;  // one a model
  for (const Selected& one : selected) {
    const std::size_t before = cells;
    for (const auto& workload : one.workloads) {
      for (const Part& part : parts(arguments, one.model, *workload)) {
        ++cells;
        weights += part.weight;
      }
    }
    cells_of.push_back(cells - before);
  }
  const double share = share_seconds(arguments, weights);
  Progress progress(cells);
  Results results;
  for (std::size_t i = 0; i < selected.size(); ++i) {
    const Selected& one = selected[i];
    try {
      run_model(one, arguments, share, progress, results);
    } catch (const Failure& error) {
      results.failures.emplace_back(error.what());
      progress.skip(cells_of[i]);
    } catch (const std::exception& error) {
      results.failures.push_back(fmt::format("model {}: {}", one.model.name, one_line(error)));
      progress.skip(cells_of[i]);
    }
  }
  return results;
}

Versions versions() { return {LLMCACHE_VERSION, TORCH_VERSION, compiler()}; }

}  // namespace llmcache::bench
