#include "settings.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <concepts>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>

#include "failure.h"

namespace llmcache::bench {
namespace {

/// What the values of a setting must be: one of some words, a number of a range, or of a certain form.
struct Allowed {
  std::vector<std::string> words = {};
  double low = 0;
  double high = 9e15;
  const char* form = nullptr;  ///< a name for its values
};

Allowed range(double low, double high) { return {.low = low, .high = high}; }
Allowed words(std::vector<std::string> all) { return {.words = std::move(all)}; }
Allowed form(const char* name) { return {.form = name}; }

/// The list: calls `one`(name, field, what is allowed, help) for each setting. Order is that of --help.
template <class Visitor>
void visit(Settings& s, const Visitor& one) {
  const auto weights = words({"as-loaded", "packed-fp32", "packed-fp16", "packed-bf16", "packed-int8", "fastest"});
  one("model", s.models, form("NAME|PATH"), "models by name, or paths of .pt files [all full-size models]");
  one("workload", s.workloads, form("NAME"),
      "by name [those made for the model's tokenizer, see benchmarks/README.md]");
  one("mode", s.modes, words({"nocache", "kvcache", "llmcache", "semantic-cache"}),
      "[all; kvcache only for decoders, semantic-cache only for others and where quality can be measured]");
  one("fidelity", s.fidelities, words({"identical", "lossless", "budget", "threshold"}),
      "what llmcache may reuse [lossless, and threshold where semantic-cache runs]");
  one("weights", s.weights, weights, "how kvcache and llmcache hold the weights of linear layers");
  one("weights-sample", s.weights_sample, form("NAME"),
      "workload whose first 1,024 tokens packed-int8 chooses by which inputs stay in float32 [none do]");
  one("output", s.output, words({"all", "last", "new"}),
      "what kvcache and llmcache (fidelity lossless) ask for [what the workload needs]");
  one("metric", s.metric, words({"auto", "decision", "relative", "token"}),
      "what the error of a budget is: another class, the distance of the outputs, another top token");
  one("epsilon", s.epsilons, range(1e-6, 0.5), "error budgets: largest mean error among all sequences");
  one("delta", s.delta, range(1e-6, 1 - 1e-6), "a budget may fail with this probability over calibrations");
  one("early-exit", s.early_exits, words({"neighbour", "cache-free"}),
      "of budgets: corrected answers of similar sequences, or regressed from the state alone");
  one("bank-format", s.bank_format, words({"as-computed", "bfloat16", "float16", "int8"}),
      "how budgets hold states of tokens");
  one("calibration", s.calibration, words({"auto", "kept"}),
      "of budgets: before each run, or kept beside the models for later runs");
  one("calibration-requests", s.calibration_requests, range(1, 1e12), "at most, of the training part [all]");
  one("calibration-parts", s.calibration_parts, range(1, 1000),
      "parts of the training part without a text in common: a budget runs once for each, calibrated on it alone");
  one("equal-error", s.equal_error, {}, "beside budgets, fidelity threshold too, where its error on them is as large");
  one("threshold", s.thresholds, range(-1, 1), "similarity from which on an earlier request counts");
  one("fingerprint", s.fingerprint, words({"raw", "pca", "simhash64", "simhash128", "simhash256", "jaccard"}),
      "what similarity is measured on; pca is fitted on the workload");
  one("fingerprint-layer", s.fingerprint_layer, range(0, 1e6), "whose state: 0 the embedding output, K after K layers");
  one("centre", s.centre, {}, "take the running mean state off first");
  one("cache-layers", s.cache_layers, form("all|last|N,..."), "layers whose output fidelity threshold keeps");
  one("eviction", s.evictions, words({"lru", "decay", "s3fifo", "gdsf"}), "what fidelity threshold drops for room");
  one("ttl", s.ttl_seconds, range(1e-3, 1e9), "seconds after which fidelity threshold drops an entry [never]");
  one("audit-rate", s.audit_rate, range(0, 1), "share of its hits that are also computed in full");
  one("capacity-mib", s.capacities_mib, range(0, 1 << 20), "of each cache");
  one("threads", s.threads, range(1, 1024), "within an operator; between operators always 1");
  one("batch", s.batch, range(1, 4096), "sequences a request, where they are independent [as in the file]");
  one("limit", s.limit, range(1, 1e12), "requests of each workload, the first of the file [what the time allows]");
  one("seconds", s.seconds, range(1e-3, 1e6), "of each model on each workload [no limit with --limit; else a share]");
  one("shuffle", s.shuffle, range(0, 9e15), "seed of an order of the requests [the file's; 0 if grouped by label]");
  one("models", s.models_folder, form("DIR"), "folder of the models [../models beside the program's]");
  one("data", s.data_folder, form("DIR"), "folder of the token files [../data beside the program's]");
  one("json", s.json, form("FILE"), "write the results there; --schema prints their form");
  one("tokenizer", s.tokenizer, form("NAME"), "of models that have no sidecar");
}

[[noreturn]] void refuse(const std::string& name, const std::string& text, const std::string& expected) {
  throw Failure(fmt::format("--{} {}: expected {}; llmcache-bench --help lists the options", name, text, expected));
}

bool is_layer_list(const std::string& text) {
  return text == "all" || text == "last" ||
         (!text.empty() && text.front() != ',' && text.back() != ',' && text.find(",,") == std::string::npos &&
          text.find_first_not_of("0123456789,") == std::string::npos);
}

void read(const std::string& name, const std::string& text, const Allowed& allowed, std::string& value) {
  if (!allowed.words.empty() && std::ranges::find(allowed.words, text) == allowed.words.end()) {
    refuse(name, text, fmt::format("{}", fmt::join(allowed.words, ", ")));
  }
  if (name == "cache-layers" && !is_layer_list(text)) refuse(name, text, "all, last, or layers like 0,3,5");
  value = text;
}

void read(const std::string&, const std::string& text, const Allowed&, std::filesystem::path& value) { value = text; }

void read(const std::string& name, const std::string& text, const Allowed&, bool& value) {
  if (text != "on" && text != "off") refuse(name, text, "on or off");
  value = text == "on";
}

template <class T>
requires std::integral<T> || std::floating_point<T>
void read(const std::string& name, const std::string& text, const Allowed& allowed, T& value) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  const bool whole = std::floating_point<T> || text.find_first_not_of("0123456789") == std::string::npos;
  if (text.empty() || *end != '\0' || !whole || !(number >= allowed.low && number <= allowed.high)) {
    refuse(name, text,
           fmt::format("a {}number from {} to {}", std::integral<T> ? "whole " : "", allowed.low, allowed.high));
  }
  value = static_cast<T>(number);
}

template <class T>
void read_all(const std::string& name, const std::vector<std::string>& texts, const Allowed& allowed, T& value) {
  if (texts.size() != 1) refuse(name, fmt::format("{}", fmt::join(texts, ",")), "one value");
  read(name, texts.front(), allowed, value);
}

template <class T>
void read_all(const std::string& name, const std::vector<std::string>& texts, const Allowed& allowed,
              std::optional<T>& value) {
  read_all(name, texts, allowed, value.emplace());
}

/// Without doubles, so that nothing runs twice. Numbers rise and words are in the order of the list.
template <class T>
void read_all(const std::string& name, const std::vector<std::string>& texts, const Allowed& allowed,
              std::vector<T>& values) {
  values.clear();
  for (const std::string& text : texts) {
    T value;
    read(name, text, allowed, value);
    if (std::ranges::find(values, value) == values.end()) values.push_back(value);
  }
  const auto place = [&](const T& value) {
    if constexpr (std::is_arithmetic_v<T>) {
      return value;
    } else {
      return std::ranges::find(allowed.words, value) - allowed.words.begin();
    }
  };
  std::ranges::stable_sort(values, {}, place);
}

template <class T>
struct TypeOf {
  static constexpr bool kList = false;
  static std::string text(const T& value) {
    if constexpr (std::is_same_v<T, std::filesystem::path>) {
      return value.string();
    } else if constexpr (std::is_same_v<T, bool>) {
      return value ? "on" : "off";
    } else {
      return fmt::format("{}", value);
    }
  }
};
template <class T>
struct TypeOf<std::vector<T>> {
  static constexpr bool kList = true;
  static std::string text(const std::vector<T>& values) { return fmt::format("{}", fmt::join(values, ",")); }
};
template <class T>
struct TypeOf<std::optional<T>> {
  static constexpr bool kList = false;
  static std::string text(const std::optional<T>&) { return {}; }
};

bool is_whole(std::int64_t) { return true; }
bool is_whole(const auto&) { return false; }
bool is_whole(const std::vector<std::int64_t>&) { return true; }
bool is_whole(const std::optional<std::int64_t>&) { return true; }

/// What no value of a single setting can tell.
void check_together(const Settings& s) {
  if (s.calibration != "auto" && s.calibration_parts > 1) {
    throw Failure("--calibration-parts calibrates on each part: it needs --calibration auto");
  }
  if (!s.has_fidelity("budget") && (s.equal_error || s.bank_format != "as-computed")) {
    throw Failure("--equal-error and --bank-format are for budgets: name budget in --fidelity");
  }
}

}  // namespace

bool Settings::has_mode(const std::string& mode) const { return std::ranges::find(modes, mode) != modes.end(); }

bool Settings::has_fidelity(const std::string& fidelity) const {
  return std::ranges::find(fidelities, fidelity) != fidelities.end();
}

void give(const Values& values, Settings& settings) {
  std::set<std::string> unknown;
  for (const auto& [name, texts] : values) unknown.insert(name);
  visit(settings, [&](const char* name, auto& field, const Allowed& allowed, const char*) {
    const auto found = values.find(name);
    if (found == values.end()) return;
    read_all(name, found->second, allowed, field);
    settings.given.insert(name);
    unknown.erase(name);
  });
  if (!unknown.empty()) throw Failure(fmt::format("there is no setting '{}'", *unknown.begin()));
  check_together(settings);
}

Values values_of(const nlohmann::json& object, const std::string& where) {
  if (!object.is_object()) throw Failure(fmt::format("{}: the settings are not a JSON object", where));
  const auto text = [&](const std::string& name, const nlohmann::json& value) -> std::string {
    if (value.is_string()) return value.get<std::string>();
    if (value.is_boolean()) return value.get<bool>() ? "on" : "off";
    if (value.is_number()) return value.dump();
    throw Failure(
        fmt::format("{}: '{}' has a value that is neither text, number, true, false nor a list", where, name));
  };
  Values values;
  for (const auto& [name, value] : object.items()) {
    auto& texts = values[name];
    if (!value.is_array()) texts.push_back(text(name, value));
    if (value.is_array()) {
      for (const auto& element : value) texts.push_back(text(name, element));
    }
  }
  return values;
}

void add_options(CLI::App& app, Values& options) {
  Settings settings;
  visit(settings, [&]<class T>(const char* name, T& field, const Allowed& allowed, const char* help) {
    const std::string standard = TypeOf<T>::text(field);
    const bool told = standard.empty() || std::string_view(help).find('[') != std::string_view::npos;
    const std::string text = told ? help : fmt::format("{} [{}]", help, standard);
    const std::string option = fmt::format("--{}", name);
    if (std::is_same_v<T, bool> && standard == "off") {
      app.add_flag_callback(
          option, [&options, key = std::string(name)] { options[key] = {"on"}; }, text);
      return;
    }
    CLI::Option* made = app.add_option(option, options[name], text);
    made->type_name(allowed.form != nullptr   ? allowed.form
                    : !allowed.words.empty()  ? fmt::format("{}", fmt::join(allowed.words, "|"))
                    : std::is_same_v<T, bool> ? "on|off"
                    : is_whole(field)         ? "N"
                                              : "X");
    TypeOf<T>::kList ? made->delimiter(',') : made->expected(1);
  });
}

std::vector<std::int64_t> parse_cache_layers(const std::string& cache_layers, std::int64_t layers) {
  std::set<std::int64_t> chosen;
  if (cache_layers == "last") return {layers - 1};
  if (cache_layers == "all") {
    for (std::int64_t layer = 0; layer < layers; ++layer) chosen.insert(layer);
  } else {
    std::istringstream numbers(cache_layers);
    for (std::string number; std::getline(numbers, number, ',');) {
      const std::int64_t layer = number.size() > 9 ? layers : std::stoll(number);
      if (layer >= layers) {
        throw Failure(fmt::format("--cache-layers {}: the model has no layer {}, its layers are 0 to {}", cache_layers,
                                  number, layers - 1));
      }
      chosen.insert(layer);
    }
  }
  return {chosen.begin(), chosen.end()};
}

}  // namespace llmcache::bench
