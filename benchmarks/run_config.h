// The ways to run a workload that are measured side by side.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "settings.h"

namespace llmcache::bench {

/// A mode with its settings. An experiment has one record for each.
struct RunConfig {
  std::string mode;
  std::string fidelity = {};                          ///< of llmcache, and of kvcache: lossless
  std::optional<double> threshold = {};               ///< of semantic-cache, and of llmcache with fidelity threshold
  std::string eviction = {};                          ///< of llmcache with fidelity threshold
  std::optional<std::int64_t> capacity_mib = {};      ///< unset for nocache; kvcache: enough
  std::string weights = "as-loaded";                  ///< nocache and semantic-cache: always so
  std::optional<double> epsilon = {};                 ///< of llmcache with fidelity budget
  std::string early_exit = {};                        ///< the same
  std::optional<std::int64_t> calibration_part = {};  ///< the same, from 1 on: of several parts that each calibrate
  std::optional<double> equal_error = {};  ///< fidelity threshold whose threshold is to be found for this error

  /// Computes what the model computes.
  [[nodiscard]] bool exact() const { return !threshold && !epsilon; }
  /// Asks for the outputs that the workload needs.
  [[nodiscard]] bool chooses_output() const { return fidelity == "lossless" || epsilon; }
  /// Keeps something of one request for the next.
  [[nodiscard]] bool keeps() const { return mode != "nocache" && mode != "kvcache"; }
};

/// What can be done with a model on a workload.
struct Possible {
  bool quality = false;       ///< the quality of outputs can be measured
  bool prefix_reuse = false;  ///< the model can go on behind keys and values that are kept
  bool generation = false;    ///< text is generated, token by token
  bool budget = false;        ///< answers can be reused within an error budget
};

/// What `settings` ask for and is possible, nocache first. Semantic-cache and fidelity threshold, unless asked for by
/// name, are left out where quality cannot be measured, since a hit rate alone says nothing about them, and where
/// prefixes are reused, so that the time goes to that. Where text is generated, of llmcache only fidelity lossless
/// runs, and no semantic-cache: the others know nothing of growing requests.
std::vector<RunConfig> run_configs(const Settings& settings, const Possible& possible);

}  // namespace llmcache::bench
