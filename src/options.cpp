#include "llmcache/options.h"

#include <fmt/core.h>

#include "llmcache/error.h"

namespace llmcache {

const char* to_string(Fidelity fidelity) noexcept {
  switch (fidelity) {
    case Fidelity::kIdentical:
      return "identical";
    case Fidelity::kLossless:
      return "lossless";
    case Fidelity::kBudget:
      return "budget";
    case Fidelity::kThreshold:
      return "threshold";
  }
  return "unknown";
}

Fidelity fidelity_from_string(const std::string& text) {
  for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless, Fidelity::kBudget, Fidelity::kThreshold}) {
    if (text == to_string(fidelity)) return fidelity;
  }
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("'{}' is no fidelity; known are identical, lossless, budget, threshold", text));
}

const char* to_string(Output output) noexcept {
  switch (output) {
    case Output::kAll:
      return "all";
    case Output::kLastToken:
      return "last";
    case Output::kNewTokens:
      return "new";
  }
  return "unknown";
}

Output output_from_string(const std::string& text) {
  for (const auto output : {Output::kAll, Output::kLastToken, Output::kNewTokens}) {
    if (text == to_string(output)) return output;
  }
  throw Error(ErrorCode::kInvalidOptions, fmt::format("'{}' is no output; known are all, last, new", text));
}

const char* to_string(Weights weights) noexcept {
  switch (weights) {
    case Weights::kAsLoaded:
      return "as-loaded";
    case Weights::kPackedFp32:
      return "packed-fp32";
    case Weights::kPackedFp16:
      return "packed-fp16";
    case Weights::kPackedBFloat16:
      return "packed-bf16";
    case Weights::kPackedInt8:
      return "packed-int8";
    case Weights::kFastest:
      return "fastest";
  }
  return "unknown";
}

Weights weights_from_string(const std::string& text) {
  for (const auto weights : {Weights::kAsLoaded, Weights::kPackedFp32, Weights::kPackedFp16, Weights::kPackedBFloat16,
                             Weights::kPackedInt8, Weights::kFastest}) {
    if (text == to_string(weights)) return weights;
  }
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("'{}' is no kind of weights; known are as-loaded, packed-fp32, packed-fp16, packed-bf16, "
                          "packed-int8, fastest",
                          text));
}

namespace {

/// Throws for a list of layers that does not ascend or names one that the model does not have.
void check_layers(const std::string& field, const std::vector<std::int64_t>& chosen, std::int64_t layers) {
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] < 0 || (layers > 0 && chosen[i] >= layers)) {
      throw Error(ErrorCode::kInvalidOptions,
                  fmt::format("{} names layer {}; the model has the layers 0 to {}", field, chosen[i], layers - 1));
    }
    if (i > 0 && chosen[i] <= chosen[i - 1]) {
      throw Error(ErrorCode::kInvalidOptions,
                  fmt::format("{} has {} behind {}; ascending layers are expected", field, chosen[i], chosen[i - 1]));
    }
  }
}

}  // namespace

void SnapshotOptions::validate() const {
  if (!(save_every_s >= 0 && save_every_s <= 1e9)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("SnapshotOptions.save_every_s is {}; 0 to 1e9 seconds are expected", save_every_s));
  }
  if (save_every_s > 0 && path.empty()) {
    throw Error(ErrorCode::kInvalidOptions, "SnapshotOptions.save_every_s is set, but SnapshotOptions.path is empty");
  }
}

void TenantOptions::validate() const {
  if (!(ttl_s >= 0)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("TenantOptions.ttl_s is {}; 0 (no limit) or more is expected", ttl_s));
  }
  if (!(pinned_share >= 0 && pinned_share <= 1)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("TenantOptions.pinned_share is {}; 0 to 1 is expected", pinned_share));
  }
}

void PrefixOptions::validate(std::int64_t model_layers) const {
  if (!(capacity_share >= 0 && capacity_share <= 1)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("PrefixOptions.capacity_share is {}; 0 to 1 is expected", capacity_share));
  }
  check_layers("PrefixOptions.layers", layers, model_layers);
  eviction.validate();
}

void ThresholdOptions::validate(std::int64_t layers) const {
  const auto refuse = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidOptions, "ThresholdOptions." + what);
  };
  const auto check_tau = [&](const char* field, double value) {
    if (!(value >= -1 && value <= 1)) refuse(fmt::format("{} has the value {}; -1 to 1 is expected", field, value));
  };
  check_tau("tau", tau);
  for (const double value : layer_taus) check_tau("layer_taus", value);
  const std::int64_t first = fingerprint_layers.empty() ? 0 : fingerprint_layers.front();
  check_layers("ThresholdOptions.fingerprint_layers", fingerprint_layers, layers);
  check_layers("ThresholdOptions.cache_layers", cache_layers, layers);
  if (!cache_layers.empty() && cache_layers.front() < first) {
    refuse(
        fmt::format("cache_layers names layer {}, which has run before the first fingerprint, of the state that enters "
                    "layer {}",
                    cache_layers.front(), first));
  }
  if (fingerprint.attention && first == 0) {
    refuse(
        "fingerprint.attention needs fingerprint_layers of 1 or more: attention statistics exist once the first layer "
        "has run");
  }
  if (fingerprint.kind == FingerprintKind::kJaccard && (fingerprint_layers.size() > 1 || first != 0)) {
    refuse("fingerprint_layers: jaccard compares token ids, which are the same at every layer; {0} is expected");
  }
  for (const double share : capacity_split) {
    if (!(share > 0 && share <= std::numeric_limits<double>::max())) {
      refuse(fmt::format("capacity_split has the share {}; shares above 0 are expected", share));
    }
  }
  if (!cache_layers.empty() && !capacity_split.empty() && capacity_split.size() != cache_layers.size()) {
    refuse(
        fmt::format("capacity_split has {} values for {} cached layers", capacity_split.size(), cache_layers.size()));
  }
  if (!cache_layers.empty() && !layer_taus.empty() && layer_taus.size() != cache_layers.size()) {
    refuse(fmt::format("layer_taus has {} values for {} cached layers", layer_taus.size(), cache_layers.size()));
  }
  if (!(capacity_share >= 0 && capacity_share <= 1)) {
    refuse(fmt::format("capacity_share is {}; 0 to 1 is expected", capacity_share));
  }
  if (!(ttl_seconds > 0)) refuse(fmt::format("ttl_seconds is {}; more than 0 is expected", ttl_seconds));
  fingerprint.validate();
  eviction.validate();
}

void check_fidelity(Fidelity fidelity) {
  const auto value = static_cast<int>(fidelity);
  if (value < 0 || value > static_cast<int>(Fidelity::kThreshold)) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("fidelity is {}, which is no Fidelity", value));
  }
}

void check_output(Output output) {
  const auto value = static_cast<int>(output);
  if (value < 0 || value > static_cast<int>(Output::kNewTokens)) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("output is {}, which is no Output", value));
  }
}

void check_weights_as_loaded(const Options& options) {
  if (options.weights == Weights::kAsLoaded || options.weights == Weights::kFastest) return;
  throw Error(
      ErrorCode::kNotAvailable,
      fmt::format("Options.weights is {}, but this kind of model keeps its weights to itself; use as-loaded, or "
                  "wrap a TorchScript module",
                  to_string(options.weights)));
}

void Options::validate() const {
  tenants.validate();
  if (!(source_capacity_share >= 0 && source_capacity_share <= 1)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("Options.source_capacity_share is {}; 0 to 1 is expected", source_capacity_share));
  }
  check_fidelity(fidelity);
  if (static_cast<int>(weights) < 0 || static_cast<int>(weights) > static_cast<int>(Weights::kFastest)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("Options.weights is {}, which is no Weights", static_cast<int>(weights)));
  }
  if (!(verify_rate >= 0 && verify_rate <= 1)) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("Options.verify_rate is {}; 0 to 1 is expected", verify_rate));
  }
  if (packing_cost_tokens < 0) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("Options.packing_cost_tokens is {}; 0 or more is expected", packing_cost_tokens));
  }
  prefix.validate();
  budget.validate();
  threshold.validate();
  refresh.validate();
  snapshot.validate();
  store.validate();
  if (refresh.flush_below > 0 && threshold.eviction.policy != Eviction::kDecay) {
    throw Error(
        ErrorCode::kInvalidOptions,
        fmt::format("RefreshOptions.flush_below is {}, but the eviction policy is '{}'; only 'decay' keeps scores",
                    refresh.flush_below, to_string(threshold.eviction.policy)));
  }
  if (mask_argument && *mask_argument < -1) {
    throw Error(
        ErrorCode::kInvalidOptions,
        fmt::format("Options.mask_argument is {}; -1 (none) or the position of an input is expected", *mask_argument));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers[i] == '.' && (i == 0 || i + 1 == layers.size() || layers[i + 1] == '.')) {
      throw Error(ErrorCode::kInvalidOptions, fmt::format("Options.layers '{}' is no dotted path", layers));
    }
  }
}

}  // namespace llmcache
