#include "first_run.h"

#include <map>
#include <set>

namespace llmcache::bench {
namespace {

/// The same model as minilm-pooled, but for its head.
const std::set<std::string> kTwins = {"minilm", "minilm-pooled-mask"};

Arguments with_modes(Arguments arguments, std::vector<std::string> modes, std::vector<std::string> fidelities) {
  arguments.modes = std::move(modes);
  arguments.fidelities = std::move(fidelities);
  arguments.thresholds = {0.85};
  arguments.fingerprint = "raw";  // the cosine of mean states as they are, which the paper's thresholds are of
  arguments.centre = false;
  return arguments;
}

/// A budget of one size; what leaves early takes the answers of its neighbours.
Arguments with_budget(Arguments arguments, double epsilon, const std::string& metric) {
  arguments.metric = metric;
  arguments.epsilons = {epsilon};
  arguments.early_exits = {"neighbour"};
  return arguments;
}

std::vector<Part> classification(const Arguments& arguments) {
  Arguments settings = with_budget(
      with_modes(arguments, {"nocache", "llmcache", "doccache"}, {"lossless", "budget", "threshold"}), 0.02, "auto");
  settings.equal_error = true;
  Arguments thresholds = with_modes(arguments, {"nocache", "llmcache"}, {"threshold"});
  thresholds.thresholds = {0.75, 0.80, 0.85, 0.90, 0.95};
  thresholds.cache_layers = "all";
  Arguments capacities = with_modes(arguments, {"llmcache"}, {"threshold"});
  capacities.capacities_mib = {1, 2, 4, 8};
  return {{settings, 8}, {thresholds, 3}, {capacities, 2}};
}

std::vector<Part> of_encoder(const Arguments& arguments, const std::string& kind, bool probe) {
  if (kind == "banking77") return probe ? classification(arguments) : std::vector<Part>{};
  if (kind == "small-edits-256") {
    Arguments settings =
        with_budget(with_modes(arguments, {"nocache", "llmcache"}, {"lossless", "budget"}), 0.1, "relative");
    settings.calibration_requests = 250;  // a minute; more would certify a little more
    return {{settings, 8}};
  }
  if (kind == "squad" || kind == "openbookqa") {
    return {{with_modes(arguments, {"nocache", "llmcache"}, {"lossless"}), 1.5}};
  }
  return {};
}

std::vector<Part> of_decoder(const Arguments& arguments, const std::string& kind) {
  static const std::map<std::string, double> kWeights = {
      {"chat", 16}, {"squad", 6}, {"openbookqa", 4}, {"wikitext", 6}, {"generate-128", 9}};
  const auto weight = kWeights.find(kind);
  if (weight == kWeights.end()) return {};
  Arguments settings = with_modes(arguments, {"nocache", "kvcache", "llmcache"}, {"lossless"});
  if (kind == "chat" || kind == "generate-128") settings.weights = {"as-loaded", "packed-fp16"};
  return {{settings, weight->second}};
}

/// Of the paper's table, without answers that could be judged.
std::vector<Part> of_random_weights(const Arguments& arguments, const std::string& kind, bool decoder) {
  if (kind != "wikitext" && kind != "squad" && kind != "openbookqa") return {};
  Arguments settings =
      with_modes(arguments, {"nocache", "kvcache", "llmcache", "doccache"}, {"lossless", "threshold"});
  settings.threshold_asked = true;
  settings.doccache_asked = true;
  settings.cache_layers = "all";
  return {{settings, decoder ? 5.0 : 2.5}};
}

}  // namespace

std::string kind_of(const std::string& workload) {
  static const std::map<std::string, std::string> kSamples = {
      {"sample-faq", "banking77"},          {"sample-documents", "squad"},
      {"sample-edits-200", "small-edits-256"}, {"sample-choices", "openbookqa"},
      {"sample-articles", "wikitext"},      {"sample-generate-128", "generate-128"},
      {"sample-generate-512", "generate-512"}, {"sample-chat", "chat"}};
  const auto known = kSamples.find(workload);
  return known == kSamples.end() ? workload : known->second;
}

std::vector<Part> first_run(const Arguments& arguments, const ModelFile& model, const std::string& workload,
                            bool probe) {
  const std::string kind = kind_of(workload);
  const bool decoder = model.family == "decoder";
  if (kTwins.count(model.name) > 0) return {};
  if (model.random_weights()) return of_random_weights(arguments, kind, decoder);
  return decoder ? of_decoder(arguments, kind) : of_encoder(arguments, kind, probe);
}

}  // namespace llmcache::bench
