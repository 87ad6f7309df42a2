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
#include "loaded_model.h"
#include "probe.h"
#include "progress.h"
#include "variant.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double weight(const Arguments& arguments, const ModelFile& model, const TokenFile& tokens) {
  std::error_code error;
  const auto probe = probe_path(arguments.data_folder, tokens.workload, model.name);
  return cell_weight(model, tokens, std::filesystem::exists(probe, error));
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
      results.wraps.push_back(model.wrap(cache_options(setting, arguments, {}, 0), cache_name(setting)));
    }
  }
  for (const auto& workload : selected.workloads) {
    const std::string label = fmt::format("{} on {}", selected.model.name, workload->workload);
    progress.begin(label);
    const auto start = Clock::now();
    try {
      const double budget = arguments.seconds.value_or(share * weight(arguments, selected.model, *workload));
      const auto records = run_cell({model, selected.model, *workload, arguments, budget, progress});
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
}

}  // namespace

Results run(const Arguments& arguments, const std::vector<Selected>& selected) {
  at::set_num_interop_threads(1);
  at::set_num_threads(arguments.threads);
  std::size_t cells = 0;
  double weights = 0;
  for (const Selected& one : selected) {
    cells += one.workloads.size();
    for (const auto& workload : one.workloads) weights += weight(arguments, one.model, *workload);
  }
  const double share = share_seconds(arguments, weights);
  Progress progress(cells);
  Results results;
  for (const Selected& one : selected) {
    try {
      run_model(one, arguments, share, progress, results);
    } catch (const Failure& error) {
      results.failures.emplace_back(error.what());
      progress.skip(one.workloads.size());
    } catch (const std::exception& error) {
      results.failures.push_back(fmt::format("model {}: {}", one.model.name, one_line(error)));
      progress.skip(one.workloads.size());
    }
  }
  return results;
}

Versions versions() { return {LLMCACHE_VERSION, TORCH_VERSION, compiler()}; }

}  // namespace llmcache::bench
