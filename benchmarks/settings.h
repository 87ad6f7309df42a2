// The settings of llmcache-bench: one list of them, given by configuration files (JSON) and by options; and the ways to
// run a workload that they ask for, which are measured side by side.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace llmcache::bench {

/// What each of them means is in the list of settings.cpp, which --help prints.
struct Settings {
  std::vector<std::string> models;
  std::vector<std::string> workloads;
  std::vector<std::string> modes = {"nocache", "kvcache", "llmcache", "semantic-cache"};
  std::vector<std::string> fidelities = {"lossless", "threshold"};
  std::vector<std::string> weights = {"as-loaded"};
  std::string weights_sample;  ///< empty: none
  std::optional<std::string> output;

  std::string metric = "auto";
  std::vector<double> epsilons = {0.005, 0.01, 0.02};
  double delta = 0.1;
  std::vector<std::string> early_exits = {"neighbour", "cache-free"};
  std::string bank_format = "as-computed";
  std::string calibration = "auto";
  std::optional<std::int64_t> calibration_requests;
  std::int64_t calibration_parts = 1;
  bool equal_error = false;

  std::vector<double> thresholds = {0.85, 0.90, 0.95};
  std::string fingerprint = "simhash128";
  std::int64_t fingerprint_layer = 0;
  bool centre = true;
  std::string cache_layers = "last";
  std::vector<std::string> evictions = {"lru"};
  std::optional<double> ttl_seconds;
  double audit_rate = 0;
  std::vector<std::int64_t> capacities_mib = {1024};

  std::int64_t threads = 1;
  std::optional<std::int64_t> batch;
  std::optional<std::int64_t> limit;
  std::optional<double> seconds;
  std::optional<std::int64_t> shuffle;

  std::filesystem::path models_folder;
  std::filesystem::path data_folder;
  std::optional<std::filesystem::path> json;
  std::string tokenizer;

  std::set<std::string> given;  ///< names of those that are not left to their defaults

  [[nodiscard]] bool has_mode(const std::string& mode) const;
  [[nodiscard]] bool has_fidelity(const std::string& fidelity) const;
  [[nodiscard]] bool is_given(const std::string& name) const { return given.contains(name); }
};

/// Values by the names of settings; several where the setting is a list.
using Values = std::map<std::string, std::vector<std::string>>;

/// Gives `settings` these values. Throws Failure for a setting that there is not, or a value that it cannot have.
void give(const Values& values, Settings& settings);

/// What a JSON object of settings holds. `where` is for messages. Throws Failure.
Values values_of(const nlohmann::json& object, const std::string& where);

/// Adds an option for each setting; parsing checks its values one by one.
void add_settings(CLI::App& app, Settings& settings);

/// The values that parsing found, of settings alone.
Values parsed_values(const CLI::App& app);

/// Layers that `cache_layers` ("all", "last" or "0,3,...") means in a model of `layers`, rising. Throws Failure for a
/// layer that the model does not have.
std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers);

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
