// The settings of llmcache-bench: one list of them, given by configuration files (JSON) and by options.
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

/// Adds an option for each setting; parsing gives `options` their values, and an empty list to the others.
void add_options(CLI::App& app, Values& options);

/// Layers that `cache_layers` ("all", "last" or "0,3,...") means in a model of `layers`, rising.
/// Throws Failure for a layer that the model does not have.
std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers);

}  // namespace llmcache::bench
