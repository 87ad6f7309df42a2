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
  std::vector<std::string> modes = {"nocache", "kvcache", "llmcache", "doccache"};
  std::vector<std::string> fidelities = {"lossless", "threshold"};
  std::vector<std::string> weights = {"as-loaded"};  ///< how kvcache and llmcache hold them
  std::optional<std::string> output;  ///< what kvcache and llmcache ask for; unset: what the workload needs
  int shots = 0;                      ///< solved examples in front of the questions of openbookqa
  bool kvcache_asked = false;         ///< by --mode: a model that has none is an error
  bool doccache_asked = false;        ///< by --mode: runs also where quality cannot be measured
  bool equal_error = false;           ///< fidelity threshold at the error of each budget
  bool threshold_asked = false;       ///< by --fidelity or --threshold: the same
  bool budget_asked = false;          ///< by --fidelity: a model or workload that has none is an error
  std::string metric = "auto";        ///< of fidelity budget, what follows too
  std::vector<double> epsilons = {0.005, 0.01, 0.02};
  double delta = 0.1;
  std::string calibration = "auto";  ///< or the path of a profile: read if it is there, else written
  std::vector<std::string> early_exits = {"neighbour", "cache-free"};
  std::string bank_format = "as-computed";  ///< of token states that fidelity budget keeps
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
  std::optional<std::int64_t> batch;  ///< sequences a request; unset: as in the file
  std::optional<std::int64_t> limit;
  std::optional<double> seconds;
  std::optional<std::uint64_t> shuffle;
  std::optional<double> zipf;
  std::filesystem::path models_folder;
  std::filesystem::path data_folder;
  std::optional<std::filesystem::path> json;
  std::optional<std::int64_t> calibration_requests;  ///< at most, of a run without options; unset: all that fill
  bool list = false;
  bool first_run = false;  ///< nothing was asked for: what first_run() chooses
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
  std::string fidelity = {};                      ///< of llmcache, and of kvcache: lossless
  std::optional<double> threshold = {};           ///< of doccache, and of llmcache with fidelity threshold
  std::string eviction = {};                      ///< of llmcache with fidelity threshold
  std::optional<std::int64_t> capacity_mib = {};  ///< unset for nocache; kvcache: enough
  std::string weights = "as-loaded";              ///< nocache and doccache: always so
  std::optional<double> epsilon = {};             ///< of llmcache with fidelity budget
  std::string early_exit = {};                    ///< the same
  std::optional<double> equal_error = {};         ///< fidelity threshold whose threshold is to be found for this error
};

/// What can be done with a model on a workload.
struct Possible {
  bool quality = false;       ///< the quality of outputs can be measured
  bool prefix_reuse = false;  ///< the model can go on behind keys and values that are kept
  bool generation = false;    ///< text is generated, token by token
  bool budget = false;        ///< answers can be reused within an error budget
};

/// What `arguments` ask for and is possible, nocache first. Doccache and fidelity threshold, unless asked for by name,
/// are left out where quality cannot be measured, since a hit rate alone says nothing about them, and where prefixes
/// are reused, so that the time goes to that. Where text is generated, of llmcache only fidelity lossless runs, and no
/// doccache: the others know nothing of growing requests.
std::vector<Setting> settings(const Arguments& arguments, const Possible& possible);

}  // namespace llmcache::bench
