#include "settings.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <concepts>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>

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
  one("output", s.output, words({"all", "last", "new"}),
      "what kvcache and llmcache (fidelity lossless) ask for [what the workload needs]");
  one("shots", s.shots, range(0, 99), "openbookqa with so many solved examples in front, made by prepare_data.py");
  one("metric", s.metric, words({"auto", "decision", "relative", "token"}),
      "what the error of a budget is: another class, the distance of the outputs, another top token");
  one("epsilon", s.epsilons, range(1e-6, 0.5), "error budgets: largest mean error among all sequences");
  one("delta", s.delta, range(1e-6, 1 - 1e-6), "a budget may fail with this probability over calibrations");
  one("early-exit", s.early_exits, words({"neighbour", "cache-free"}),
      "of budgets: corrected answers of similar sequences, or regressed from the state alone");
  one("bank-format", s.bank_format, words({"as-computed", "bfloat16", "float16", "int8"}),
      "how budgets hold states of tokens");
  one("calibration", s.calibration, form("auto|kept|FILE"),
      "of budgets: before each run; kept beside the models for later runs; or a profile, written if it is not there");
  one("calibration-requests", s.calibration_requests, range(1, 1e12), "at most, of the training part [all]");
  one("calibration-parts", s.calibration_parts, range(1, 1000),
      "parts of the training part without a text in common: a budget runs once for each, calibrated on it alone");
  one("equal-error", s.equal_error, {}, "beside budgets, fidelity threshold too, where its error on them is as large");
  one("threshold", s.thresholds, range(-1, 1), "similarity from which on an earlier request counts");
  one("fingerprint", s.fingerprint, words({"raw", "pca", "simhash64", "simhash128", "simhash256", "jaccard"}),
      "what similarity is measured on");
  one("fingerprint-layer", s.fingerprint_layer, range(0, 1e6), "whose state: 0 the embedding output, K after K layers");
  one("centre", s.centre, {}, "take the running mean state off first");
  one("pca", s.pca, form("FILE"), "fitted PCA for fingerprint pca [fitted on the workload]");
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
  one("zipf", s.zipf, range(0, 10), "draw requests with repeats, the k-th with probability ~ 1/k^X [each once]");
  one("models", s.models_folder, form("DIR"), "folder of the models [../models beside the program's]");
  one("data", s.data_folder, form("DIR"), "folder of the token files [../data beside the program's]");
  one("json", s.json, form("FILE"), "write the results there, see benchmarks/results.schema.json");
  one("tokenizer", s.tokenizer, form("NAME"), "of models that have no sidecar");
}

[[noreturn]] void refuse(const std::string& name, const std::string& text, const std::string& expected) {
  throw Failure(fmt::format("--{} {}: expected {}; llmcache-bench --help lists the settings", name, text, expected));
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
  if (s.calibration != "auto" && s.calibration != "kept" && (s.epsilons.size() > 1 || s.early_exits.size() > 1)) {
    throw Failure("--calibration FILE holds one profile: name one --epsilon and one --early-exit beside it");
  }
  if (s.calibration != "auto" && s.calibration_parts > 1) {
    throw Failure("--calibration-parts calibrates on each part: it needs --calibration auto");
  }
  if (!s.has_fidelity("budget") && (s.equal_error || s.bank_format != "as-computed")) {
    throw Failure("--equal-error and --bank-format are for budgets: name budget in --fidelity");
  }
  if (s.pca && s.fingerprint != "pca") {
    throw Failure(fmt::format("--pca {} is only for --fingerprint pca, not {}", s.pca->string(), s.fingerprint));
  }
}

/// openbookqa is the workload that examples are for; with them it is another one.
void name_shots(Settings& s) {
  constexpr const char* kShotWorkload = "openbookqa";
  if (s.shots == 0) return;
  const std::string with_shots = fmt::format("{}-{}shot", kShotWorkload, s.shots);
  std::ranges::replace(s.workloads, std::string(kShotWorkload), with_shots);
  if (s.workloads.empty() || std::ranges::find(s.workloads, with_shots) != s.workloads.end()) return;
  throw Failure(
      fmt::format("--shots {} is for the workload {}, which --workload does not name", s.shots, kShotWorkload));
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
  name_shots(settings);
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

std::vector<SettingInfo> all_settings() {
  std::vector<SettingInfo> all;
  Settings settings;
  visit(settings, [&]<class T>(const char* name, T& field, const Allowed& allowed, const char* help) {
    SettingInfo info{.name = name, .help = help, .type = {}, .standard = {}, .list = TypeOf<T>::kList, .flag = false};
    info.flag = std::is_same_v<T, bool> && TypeOf<T>::text(field) == "off";
    if (std::string(help).find('[') == std::string::npos) info.standard = TypeOf<T>::text(field);
    info.type = allowed.form != nullptr   ? allowed.form
                : !allowed.words.empty()  ? fmt::format("{}", fmt::join(allowed.words, "|"))
                : std::is_same_v<T, bool> ? "on|off"
                : is_whole(field)         ? "N"
                                          : "X";
    all.push_back(std::move(info));
  });
  return all;
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

std::filesystem::path program_folder() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::filesystem::current_path() : program.parent_path();
}

}  // namespace llmcache::bench
