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

void Options::validate() const {
  const auto value = static_cast<int>(fidelity);
  if (value < 0 || value > static_cast<int>(Fidelity::kThreshold)) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("Options.fidelity is {}, which is no Fidelity", value));
  }
  if (fidelity == Fidelity::kBudget || fidelity == Fidelity::kThreshold) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("Options.fidelity: '{}' is not available in this version; use identical or lossless",
                            to_string(fidelity)));
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
