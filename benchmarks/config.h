// What a run of llmcache-bench measures: its command line, and the configuration file that it names.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "command_line.h"
#include "files.h"
#include "settings.h"

namespace llmcache::bench {

/// An experiment of a configuration file: settings, and the models and workloads that it is for.
struct ExperimentRule {
  std::vector<std::string> models;  ///< patterns with * as in file names; none: all
  std::vector<std::string> except;  ///< the same: models that it is not for
  std::string family;               ///< "encoder" or "decoder"; empty: both
  std::optional<bool> trained;      ///< the weights are real ones, or are random
  bool linear_probe = false;        ///< only where there is one for model and workload
  std::vector<std::string> workloads;
  double share = 1;  ///< of the time, in proportion to the others
  Values values;     ///< of settings
};

/// One measurement of a model on a workload.
struct Experiment {
  Settings settings;
  double share = 1;
};

struct Configuration {
  Settings settings;                             ///< of all that is measured
  Values values;                                 ///< of the file's own "settings"
  Values options;                                ///< of the command line: these win
  std::vector<ExperimentRule> experiments;       ///< none: one for each model and workload chosen
  std::map<std::string, std::string> stand_ins;  ///< samples, and the workloads of real data that they stand in for
  std::optional<double> seconds_in_all;          ///< to be shared by the experiments

  /// The workload of real data that a sample stands in for, or the workload itself.
  [[nodiscard]] std::string kind_of(const std::string& workload) const;
  /// Those of `experiments` for a model on a workload. `linear_probe`: there is one.
  [[nodiscard]] std::vector<Experiment> experiments_for(const ModelFile& model, const std::string& workload,
                                                        bool linear_probe) const;
};

/// Reads a configuration file: a JSON object with "settings", and perhaps "experiments" and what else stands in
/// configs/first-run.json. `options` win over its settings. Throws Failure.
Configuration read_configuration(std::string_view text, const std::string& name, const Values& options);

/// The file of that name, or of that name with .json in benchmarks/configs.
Configuration read_configuration(const std::filesystem::path& name, const Values& options);

struct Command {
  Configuration configuration;
  bool list = false;    ///< only show models and workloads
  bool schema = false;  ///< only print the schema of results
  bool needs = false;   ///< only print which models, workloads and probes the run needs
  std::string text;     ///< as typed, the program by its name only
};

/// Throws Failure for a bad command line, HelpAsked for --help and --version. What asks for nothing, but says where and
/// how, runs the configuration first-run.
Command parse_command(int argc, const char* const* argv);

/// What --needs prints: "models", "workloads" and "budgets" with their values, one a line.
std::string needs_text(const Configuration& configuration);

}  // namespace llmcache::bench
