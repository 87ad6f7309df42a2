// The command line of llmcache-bench.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace llmcache::bench {

struct Arguments {
  std::vector<std::string> models;     ///< names or paths; empty: all found
  std::vector<std::string> workloads;  ///< names; empty: all that fit
  std::vector<std::string> modes = {"nocache", "llmcache", "doccache"};
  std::vector<std::string> fidelities = {"lossless", "threshold"};
  bool doccache_asked = false;   ///< by --mode: runs also where quality cannot be measured
  bool threshold_asked = false;  ///< by --fidelity or --threshold: the same
  std::vector<double> thresholds = {0.85, 0.90, 0.95};
  std::string fingerprint = "simhash128";
  std::int64_t fingerprint_layer = 0;
  bool centre = true;
  std::string cache_layers = "last";                  ///< "all", "last" or numbers with commas
  std::vector<std::string> evictions = {"lru"};       ///< of fidelity threshold
  std::optional<double> ttl_seconds;                  ///< of fidelity threshold; unset: entries do not expire
  double shadow_rate = 0;                             ///< of fidelity threshold
  std::optional<std::filesystem::path> pca;           ///< unset: fitted on the workload
  std::vector<std::int64_t> capacities_mib = {1024};  ///< of each cache
  std::string tokenizer;                              ///< for models without sidecar
  int threads = 1;
  std::optional<std::int64_t> limit;
  std::optional<double> seconds;
  std::optional<std::uint64_t> shuffle;
  std::optional<double> zipf;
  std::filesystem::path models_folder;
  std::filesystem::path data_folder;
  std::optional<std::filesystem::path> json;
  bool list = false;
  std::string command;  ///< as typed, the program by its name only

  [[nodiscard]] bool has_mode(const std::string& mode) const;
};

/// Nothing to do: help was asked for and is in `text`.
struct HelpAsked {
  std::string text;
};

/// Throws Failure for a bad command line, HelpAsked for --help and --version.
Arguments parse_arguments(int argc, const char* const* argv);

/// Layers that `cache_layers` ("all", "last" or "0,3,...") means in a model of `layers`, rising.
/// Throws Failure for a layer that the model does not have.
std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers);

/// Folder of the running program.
std::filesystem::path program_folder();

/// One way to run a workload: a mode with its settings. A run has one record for each.
struct Setting {
  std::string mode;
  std::string fidelity = {};                      ///< of llmcache
  std::optional<double> threshold = {};           ///< of doccache, and of llmcache with fidelity threshold
  std::string eviction = {};                      ///< of llmcache with fidelity threshold
  std::optional<std::int64_t> capacity_mib = {};  ///< unset for nocache
};

/// What `arguments` ask for, nocache first. Doccache and fidelity threshold, unless asked for by
/// name, are left out where quality cannot be measured: a hit rate alone says nothing about them.
std::vector<Setting> settings(const Arguments& arguments, bool quality);

}  // namespace llmcache::bench
