#include "settings.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <regex>
#include <sstream>
#include <utility>

#include "command_line.h"
#include "failure.h"

namespace llmcache::bench {
namespace {

using Choices = std::vector<std::string>;

constexpr const char* kGroup = "Settings";
const Choices kModes = {"nocache", "kvcache", "llmcache", "semantic-cache"};
const Choices kFidelities = {"identical", "lossless", "budget", "threshold"};
const Choices kWeights = {"as-loaded", "packed-fp32", "packed-fp16", "packed-bf16", "packed-int8", "fastest"};
const Choices kEarlyExits = {"neighbour", "cache-free"};
const Choices kEvictions = {"lru", "decay", "s3fifo", "gdsf"};

/// What the values of a setting must be, and how --help shows that.
struct Allowed {
  std::string shown;
  std::function<bool(const std::string&)> good = {};
  std::string expected = {};
};

Allowed form(const char* name) { return {name}; }

Allowed one_of_words(Choices all) {
  return {fmt::format("{}", fmt::join(all, "|")),
          [all](const std::string& text) { return std::ranges::find(all, text) != all.end(); },
          fmt::format("{}", fmt::join(all, ", "))};
}

/// NaN is in no range.
Allowed range(double low, double high, const char* shown = "N") {
  const auto good = [=](const std::string& text) {
    double value = 0;
    return CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
  };
  return {shown, good, fmt::format("a number from {} to {}", low, high)};
}

bool is_layer_list(const std::string& text) { return std::regex_match(text, std::regex("all|last|[0-9]+(,[0-9]+)*")); }

template <class T>
void rising(std::vector<T>& values) {
  std::ranges::sort(values);
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

void in_order_of(const Choices& all, Choices& values) {
  Choices ordered;
  for (const std::string& word : all) {
    if (std::ranges::find(values, word) != values.end()) ordered.push_back(word);
  }
  values = std::move(ordered);
}

void in_own_order(Choices& values) {
  Choices once;
  for (const std::string& word : values) {
    if (std::ranges::find(once, word) == once.end()) once.push_back(word);
  }
  values = std::move(once);
}

/// Lists without doubles, so that nothing runs twice.
void put_in_order(Settings& s) {
  in_own_order(s.models);
  in_own_order(s.workloads);
  in_order_of(kModes, s.modes);
  in_order_of(kFidelities, s.fidelities);
  in_order_of(kWeights, s.weights);
  in_order_of(kEarlyExits, s.early_exits);
  in_order_of(kEvictions, s.evictions);
  rising(s.epsilons);
  rising(s.thresholds);
  rising(s.capacities_mib);
}

/// What no value of a single setting can tell.
void check_together(const Settings& s) {
  if (s.calibration != "auto" && s.calibration_parts > 1) {
    throw Failure("--calibration-parts calibrates on each part: it needs --calibration auto");
  }
  if (!s.has_fidelity("budget") && (s.equal_error || s.bank_format != "as-computed")) {
    throw Failure("--equal-error and --bank-format are for budgets: name budget in --fidelity");
  }
}

constexpr std::int64_t kKvcacheMib = 1024;  // a decoder has room for one request, however small the caches are

class Expansion {
 public:
  Expansion(const Settings& settings, const Possible& possible)
      : s_(settings), possible_(possible), similar_(possible.quality && !possible.prefix_reuse) {}

  std::vector<RunConfig> all() {
    if (s_.has_mode("nocache")) add({.mode = "nocache"});
    for (const std::string& weights : s_.weights) {
      if (!s_.has_mode("kvcache") || !possible_.prefix_reuse) break;
      const std::int64_t mib = std::max(kKvcacheMib, s_.capacities_mib.back());
      add({.mode = "kvcache", .fidelity = "lossless", .capacity_mib = mib, .weights = weights});
    }
    if (s_.has_mode("llmcache")) add_layer_caches();
    const bool asked = (similar_ || s_.is_given("mode")) && !possible_.generation;
    for (const std::int64_t mib : s_.capacities_mib) {
      if (!s_.has_mode("semantic-cache") || !asked) break;
      at_thresholds({.mode = "semantic-cache", .eviction = "lru", .capacity_mib = mib});
    }
    return std::move(all_);
  }

 private:
  void add(RunConfig config) { all_.push_back(std::move(config)); }

  void at_thresholds(RunConfig config) {
    for (const double threshold : s_.thresholds) {
      config.threshold = threshold;
      add(config);
    }
  }

  void add_layer_caches() {
    for (const std::int64_t mib : s_.capacities_mib) {
      for (const std::string& fidelity : s_.fidelities) {
        if (possible_.generation && fidelity != "lossless") continue;
        for (const std::string& weights : s_.weights) {
          add_fidelity({.mode = "llmcache", .fidelity = fidelity, .capacity_mib = mib, .weights = weights});
        }
      }
    }
    if (s_.equal_error && !possible_.prefix_reuse) add_equal_errors();
  }

  void add_fidelity(RunConfig config) {
    if (config.fidelity == "budget") {
      if (possible_.budget) add_budgets(config);
    } else if (config.fidelity != "threshold") {
      add(config);
    } else if (similar_ || s_.is_given("fidelity") || s_.is_given("threshold")) {
      for (const std::string& eviction : s_.evictions) {
        config.eviction = eviction;
        at_thresholds(config);
      }
    }
  }

  void add_budgets(RunConfig config) {
    const std::vector<std::string> none = {"off"};  // nothing leaves a decoder early
    for (const double epsilon : s_.epsilons) {
      for (const std::string& early_exit : possible_.prefix_reuse ? none : s_.early_exits) {
        config.epsilon = epsilon;
        config.early_exit = early_exit;
        for (std::int64_t part = 1; part <= s_.calibration_parts; ++part) {
          if (s_.calibration_parts > 1) config.calibration_part = part;
          add(config);
        }
      }
    }
  }

  /// Behind the budgets, whose calibration tells what an error is.
  void add_equal_errors() {
    std::set<std::pair<double, std::string>> added;
    const std::vector<RunConfig> before = all_;
    for (const RunConfig& budget : before) {
      if (!budget.epsilon || !added.emplace(*budget.epsilon, budget.weights).second) continue;
      add({.mode = "llmcache",
           .fidelity = "threshold",
           .eviction = s_.evictions.front(),
           .capacity_mib = budget.capacity_mib,
           .weights = budget.weights,
           .equal_error = budget.epsilon});
    }
  }

  const Settings& s_;
  const Possible& possible_;
  const bool similar_;  ///< what nobody asked for by name runs
  std::vector<RunConfig> all_;
};

}  // namespace

bool Settings::has_mode(const std::string& mode) const { return std::ranges::find(modes, mode) != modes.end(); }

bool Settings::has_fidelity(const std::string& fidelity) const {
  return std::ranges::find(fidelities, fidelity) != fidelities.end();
}

void add_settings(CLI::App& app, Settings& s) {
  const auto finish = [](CLI::Option* option, const std::string& help) {
    option->group(kGroup)->capture_default_str();
    std::string standard = option->get_default_str();
    option->default_str("");
    if (standard.empty() || help.find('[') != std::string::npos) return;
    option->description(fmt::format("{} {}", help, standard[0] == '[' ? standard : "[" + standard + "]"));
  };
  const auto one = [&](const std::string& name, auto& field, const Allowed& allowed, const std::string& help) {
    CLI::Option* option = app.add_option("--" + name, field, help)->type_name(allowed.shown);
    if (option->get_items_expected_max() > 1) option->delimiter(',');
    if (allowed.good) {
      option->check([allowed](const std::string& text) {
        return allowed.good(text) ? "" : fmt::format("{}: expected {}", text, allowed.expected);
      });
    }
    finish(option, help);
  };
  one("model", s.models, form("NAME|PATH"), "models by name, or paths of .pt files [all full-size models]");
  one("workload", s.workloads, form("NAME"),
      "by name [those made for the model's tokenizer, see benchmarks/README.md]");
  one("mode", s.modes, one_of_words(kModes),
      "[all; kvcache only for decoders, semantic-cache only for others and where quality can be measured]");
  one("fidelity", s.fidelities, one_of_words(kFidelities),
      "what llmcache may reuse [lossless, and threshold where semantic-cache runs]");
  one("weights", s.weights, one_of_words(kWeights), "how kvcache and llmcache hold the weights of linear layers");
  one("weights-sample", s.weights_sample, form("NAME"),
      "workload whose first 1,024 tokens packed-int8 chooses by which inputs stay in float32 [none do]");
  one("output", s.output, one_of_words({"all", "last", "new"}),
      "what kvcache and llmcache (fidelity lossless) ask for [what the workload needs]");
  one("metric", s.metric, one_of_words({"auto", "decision", "relative", "token"}),
      "what the error of a budget is: another class, the distance of the outputs, another top token");
  one("epsilon", s.epsilons, range(1e-6, 0.5, "X"), "error budgets: largest mean error among all sequences");
  one("delta", s.delta, range(1e-6, 1 - 1e-6, "X"), "a budget may fail with this probability over calibrations");
  one("early-exit", s.early_exits, one_of_words(kEarlyExits),
      "of budgets: corrected answers of similar sequences, or regressed from the state alone");
  one("bank-format", s.bank_format, one_of_words({"as-computed", "bfloat16", "float16", "int8"}),
      "how budgets hold states of tokens");
  one("calibration", s.calibration, one_of_words({"auto", "kept"}),
      "of budgets: before each run, or kept beside the models for later runs");
  one("calibration-requests", s.calibration_requests, range(1, 1e12), "at most, of the training part [all]");
  one("calibration-parts", s.calibration_parts, range(1, 1000),
      "parts of the training part without a text in common: a budget runs once for each, calibrated on it alone");
  app.add_flag("--equal-error", s.equal_error,
               "beside budgets, fidelity threshold too, where its error on them is as large")
      ->group(kGroup);
  one("threshold", s.thresholds, range(-1, 1, "X"), "similarity from which on an earlier request counts");
  one("fingerprint", s.fingerprint, one_of_words({"raw", "pca", "simhash64", "simhash128", "simhash256", "jaccard"}),
      "what similarity is measured on; pca is fitted on the workload");
  one("fingerprint-layer", s.fingerprint_layer, range(0, 1e6), "whose state: 0 the embedding output, K after K layers");
  one("centre", s.centre, form("on|off"), "take the running mean state off first [on]");
  one("cache-layers", s.cache_layers, {"all|last|N,...", is_layer_list, "all, last, or layers like 0,3,5"},
      "layers whose output fidelity threshold keeps");
  one("eviction", s.evictions, one_of_words(kEvictions), "what fidelity threshold drops for room");
  one("ttl", s.ttl_seconds, range(1e-3, 1e9, "X"), "seconds after which fidelity threshold drops an entry [never]");
  one("audit-rate", s.audit_rate, range(0, 1, "X"), "share of its hits that are also computed in full");
  one("capacity-mib", s.capacities_mib, range(0, 1 << 20), "of each cache");
  one("threads", s.threads, range(1, 1024), "within an operator; between operators always 1");
  one("batch", s.batch, range(1, 4096), "sequences a request, where they are independent [as in the file]");
  one("limit", s.limit, range(1, 1e12), "requests of each workload, the first of the file [what the time allows]");
  one("seconds", s.seconds, range(1e-3, 1e6, "X"),
      "of each model on each workload [no limit with --limit; else a share]");
  one("shuffle", s.shuffle, range(0, 9e15), "seed of an order of the requests [the file's; 0 if grouped by label]");
  one("models", s.models_folder, form("DIR"), "folder of the models [../models beside the program's]");
  one("data", s.data_folder, form("DIR"), "folder of the token files [../data beside the program's]");
  one("json", s.json, form("FILE"), "write the results there; --schema prints their form");
  one("tokenizer", s.tokenizer, form("NAME"), "of models that have no sidecar");
}

Values parsed_values(const CLI::App& app) {
  Values values;
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_group() == kGroup && option->count() > 0) values[option->get_single_name()] = option->results();
  }
  return values;
}

void give(const Values& values, Settings& settings) {
  CLI::App app("", "llmcache-bench");
  app.set_help_flag("");
  add_settings(app, settings);
  Choices arguments = {app.get_name()};
  for (const auto& [name, list] : values) {
    if (app.get_option_no_throw("--" + name) == nullptr) throw Failure(fmt::format("there is no setting '{}'", name));
    const std::string text = fmt::format("{}", fmt::join(list, ","));
    if (text.empty()) throw Failure(fmt::format("--{}: expected a value", name));
    arguments.push_back(fmt::format("--{}={}", name, text));
    settings.given.insert(name);
  }
  std::vector<const char*> texts;
  for (const std::string& argument : arguments) texts.push_back(argument.c_str());
  parse(app, static_cast<int>(texts.size()), texts.data());
  put_in_order(settings);
  check_together(settings);
}

Values values_of(const nlohmann::json& object, const std::string& where) {
  if (!object.is_object()) throw Failure(fmt::format("{}: the settings are not a JSON object", where));
  Values values;
  for (const auto& [name, value] : object.items()) {
    auto& texts = values[name];
    for (const auto& one : value.is_array() ? value : nlohmann::json::array({value})) {
      if (!one.is_string() && !one.is_boolean() && !one.is_number()) {
        throw Failure(
            fmt::format("{}: '{}' has a value that is neither text, number, true, false nor a list", where, name));
      }
      texts.push_back(one.is_string() ? one.get<std::string>() : one.dump());
    }
  }
  return values;
}

std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers) {
  if (cache_layers == "last") return {layers - 1};
  std::vector<std::int64_t> chosen(cache_layers == "all" ? static_cast<std::size_t>(layers) : 0);
  std::iota(chosen.begin(), chosen.end(), std::int64_t{0});
  std::istringstream numbers(cache_layers == "all" ? "" : cache_layers);
  for (std::string number; std::getline(numbers, number, ',');) {
    chosen.push_back(number.size() > 9 ? layers : std::stoll(number));
    if (chosen.back() < layers) continue;
    throw Failure(fmt::format("--cache-layers {}: the model has no layer {}, its layers are 0 to {}", cache_layers,
                              number, layers - 1));
  }
  rising(chosen);
  return chosen;
}

std::vector<RunConfig> run_configs(const Settings& settings, const Possible& possible) {
  return Expansion(settings, possible).all();
}

}  // namespace llmcache::bench
