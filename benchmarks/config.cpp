#include "config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "failure.h"
#include "llmcache/version.h"

namespace llmcache::bench {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kFirstRun = "first-run";
constexpr const char* kDescription =
    "llmcache-bench: runs recorded requests through a model, plain and wrapped in caches, side by side in one "
    "process,\n"
    "and reports speedup, hit rate, latency, answers and their divergence from the plain model, and memory.\n\n"
    "Without options it runs the configuration first-run: what users would choose, in under 10 minutes.\n"
    "benchmarks/README.md explains modes, measurement and columns.";
constexpr const char* kFooter = R"(
A configuration is a JSON file of these settings: {"settings": {"model": "gpt2", "threshold": [0.8, 0.9]}}.
Options win over it.

Exit status: 0, or 2 after an error, which is one line on stderr. Results that were measured are shown all the same.

Examples
  llmcache-bench --list
  llmcache-bench --model minilm-pooled --workload banking77 --seconds 120
  llmcache-bench --config paper-mode --limit 200
  llmcache-bench --model smollm2 --workload openbookqa-5shot --weights as-loaded,packed-fp16
)";

bool any_match(const std::vector<std::string>& patterns, const std::string& name) {
  return std::ranges::any_of(patterns, [&](const auto& p) { return ::fnmatch(p.c_str(), name.c_str(), 0) == 0; });
}

bool is_for(const ExperimentRule& rule, const ModelFile& model) {
  if (!rule.models.empty() && !any_match(rule.models, model.name)) return false;
  if (any_match(rule.except, model.name)) return false;
  if (!rule.family.empty() && (model.family == "decoder") != (rule.family == "decoder")) return false;
  return !rule.trained || *rule.trained != model.random_weights();
}

/// The keys of `object` must be among these.
void check_keys(const Json& object, const std::set<std::string>& known) {
  for (const auto& [key, value] : object.items()) {
    if (!known.contains(key)) throw Failure(fmt::format("it has the unknown key '{}'", key));
  }
}

ExperimentRule read_rule(const Json& json, const Json& groups, const std::string& name) {
  check_keys(json,
             {"group", "models", "except", "family", "trained", "linear_probe", "workloads", "share", "settings"});
  ExperimentRule rule;
  const Json group = json.contains("group") ? groups.at(json.at("group").get<std::string>()) : Json::object();
  for (const Json& choice : {group, json}) {
    rule.models = choice.value("models", rule.models);
    rule.except = choice.value("except", rule.except);
    rule.family = choice.value("family", rule.family);
    if (choice.contains("trained")) rule.trained = choice.at("trained").get<bool>();
  }
  rule.linear_probe = json.value("linear_probe", false);
  rule.workloads = json.at("workloads").get<std::vector<std::string>>();
  rule.share = json.value("share", 1.0);
  rule.values = values_of(json.value("settings", Json::object()), name);
  if (rule.values.contains("weights-sample")) {
    throw Failure("'weights-sample' is a setting of the whole run, not of an experiment");
  }
  return rule;
}

/// Settings from several places; the later ones win.
Settings settings_of(const std::vector<const Values*>& places) {
  Values all;
  for (const Values* values : places) {
    for (const auto& [name, texts] : *values) all[name] = texts;
  }
  Settings settings;
  settings.models_folder = (program_folder() / ".." / "models").lexically_normal();
  settings.data_folder = (program_folder() / ".." / "data").lexically_normal();
  give(all, settings);
  return settings;
}

Configuration read_object(const Json& json, const std::string& name, const Values& options) {
  if (!json.is_object()) throw Failure("it is not a JSON object");
  check_keys(json, {"description", "seconds_in_all", "settings", "stand_ins", "groups", "experiments"});
  Configuration configuration;
  configuration.values = values_of(json.value("settings", Json::object()), name);
  configuration.options = options;
  configuration.settings = settings_of({&configuration.values, &options});
  configuration.stand_ins = json.value("stand_ins", std::map<std::string, std::string>{});
  if (json.contains("seconds_in_all")) configuration.seconds_in_all = json.at("seconds_in_all").get<double>();
  const Json groups = json.value("groups", Json::object());
  for (const Json& one : json.value("experiments", Json::array())) {
    const auto& rule = configuration.experiments.emplace_back(read_rule(one, groups, name));
    settings_of({&configuration.values, &rule.values, &options});  // may refuse them
  }
  return configuration;
}

std::string command_text(int argc, const char* const* argv) {
  std::string text = fs::path(argv[0]).filename().string();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool quote = argument.empty() || argument.find_first_of(" \t\"'$*;&|<>()") != std::string::npos;
    text += quote ? fmt::format(" '{}'", argument) : " " + argument;
  }
  return text;
}

}  // namespace

std::string Configuration::kind_of(const std::string& workload) const {
  const auto known = stand_ins.find(workload);
  return known == stand_ins.end() ? workload : known->second;
}

std::vector<Experiment> Configuration::experiments_for(const ModelFile& model, const std::string& workload,
                                                       bool linear_probe) const {
  std::vector<Experiment> found;
  for (const ExperimentRule& rule : experiments) {
    const bool here = std::ranges::find(rule.workloads, kind_of(workload)) != rule.workloads.end();
    if (!here || !is_for(rule, model) || (rule.linear_probe && !linear_probe)) continue;
    found.push_back({settings_of({&values, &rule.values, &options}), rule.share});
  }
  return found;
}

Configuration read_configuration(std::string_view text, const std::string& name, const Values& options) {
  try {
    return read_object(Json::parse(text), name, options);
  } catch (const std::exception& error) {  // of JSON, or Failure
    throw Failure(fmt::format("configuration {}: {}", name, error.what()));
  }
}

Configuration read_configuration(const fs::path& name, const Values& options) {
  const fs::path known = fs::path(LLMCACHE_BENCH_CONFIGS) / (name.string() + ".json");
  std::error_code error;
  const bool is_known = !name.has_parent_path() && fs::exists(known, error);
  std::ifstream in(is_known ? known : name);
  std::ostringstream text;
  if (!in || fs::is_directory(name, error) || !(text << in.rdbuf())) {
    throw Failure(fmt::format("configuration {}: neither a file that can be read nor one of {}", name.string(),
                              LLMCACHE_BENCH_CONFIGS));
  }
  return read_configuration(text.str(), name.string(), options);
}

Command parse_command(int argc, const char* const* argv) {
  constexpr std::size_t kNameColumn = 30;
  static const std::set<std::string> kNotAsking = {"models", "data", "json", "threads"};
  Command command;
  command.text = command_text(argc, argv);
  std::string name;
  Settings checked;  // one by one; those of several places together are given below
  CLI::App app(kDescription, "llmcache-bench");
  app.footer(kFooter);
  app.get_formatter()->column_width(kNameColumn);
  app.set_version_flag("--version", "llmcache-bench " LLMCACHE_VERSION);
  app.add_option("--config", name, "a configuration of benchmarks/configs by its name, or a JSON file")
      ->type_name("NAME|FILE");
  add_settings(app, checked);
  app.add_flag("--list", command.list, "print the models and workloads found, and stop");
  app.add_flag("--needs", command.needs, "print which models, workloads and probes the run needs, and stop");
  app.add_flag("--schema", command.schema, "print the JSON schema of results, and stop");
  parse(app, argc, argv);
  const Values options = parsed_values(app);
  const bool asks = std::ranges::any_of(options, [](const auto& one) { return !kNotAsking.contains(one.first); });
  command.configuration = name.empty() && asks ? read_object(Json::object(), "", options)
                                               : read_configuration(fs::path(name.empty() ? kFirstRun : name), options);
  return command;
}

std::string needs_text(const Configuration& configuration) {
  const Settings& settings = configuration.settings;
  auto models = settings.models.empty() ? std::vector<std::string>{"bench"} : settings.models;  // all that it measures
  std::erase_if(models, [](const std::string& model) { return model.ends_with(".pt"); });
  std::set<std::string> workloads(settings.workloads.begin(), settings.workloads.end());
  bool budgets = settings.has_fidelity("budget");
  for (const ExperimentRule& rule : configuration.experiments) {
    workloads.insert(rule.workloads.begin(), rule.workloads.end());
    budgets = budgets || settings_of({&configuration.values, &rule.values}).has_fidelity("budget");
  }
  return fmt::format("models {}\nworkloads {}\nsample {}\nbudgets {}\n", fmt::join(models, " "),
                     fmt::join(workloads, " "), settings.weights_sample, budgets ? "yes" : "");
}

}  // namespace llmcache::bench
