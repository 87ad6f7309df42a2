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

void ThresholdOptions::validate(std::int64_t layers) const {
  const auto refuse = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidOptions, "ThresholdOptions." + what);
  };
  const auto check_tau = [&](const char* field, double value) {
    if (!(value >= -1 && value <= 1)) refuse(fmt::format("{} has the value {}; -1 to 1 is expected", field, value));
  };
  check_tau("tau", tau);
  for (const double value : layer_taus) check_tau("layer_taus", value);
  const auto check_layers = [&](const char* field, const std::vector<std::int64_t>& chosen) {
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      if (chosen[i] < 0 || (layers > 0 && chosen[i] >= layers)) {
        refuse(fmt::format("{} names layer {}; the model has the layers 0 to {}", field, chosen[i], layers - 1));
      }
      if (i > 0 && chosen[i] <= chosen[i - 1]) {
        refuse(fmt::format("{} has {} behind {}; ascending layers are expected", field, chosen[i], chosen[i - 1]));
      }
    }
  };
  const std::int64_t first = fingerprint_layers.empty() ? 0 : fingerprint_layers.front();
  check_layers("fingerprint_layers", fingerprint_layers);
  check_layers("cache_layers", cache_layers);
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
  if (fidelity == Fidelity::kBudget) {
    throw Error(ErrorCode::kNotAvailable,
                "fidelity 'budget' is not available in this version; use identical, lossless or threshold");
  }
}

void Options::validate() const {
  check_fidelity(fidelity);
  threshold.validate();
  refresh.validate();
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
