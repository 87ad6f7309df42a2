#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmcache::examples {

void Sampling::validate() const {
  const auto bad = [](const char* what) { throw std::invalid_argument(what); };
  if (!(temperature >= 0) || !std::isfinite(temperature)) bad("temperature: expected a number, 0 or above");
  if (top_k < 0) bad("top_k: expected 0 (all) or above");
  if (!(top_p > 0 && top_p <= 1)) bad("top_p: expected a number above 0, at most 1");
}

std::int64_t sample(std::span<const float> logits, const Sampling& sampling, double draw) {
  sampling.validate();
  if (!(draw >= 0 && draw < 1)) throw std::invalid_argument("draw: expected a number from 0, below 1");
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<std::int64_t> tokens;  // that are not excluded
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == kInfinity) {
      throw std::invalid_argument("the logit of token " + std::to_string(i) + " is " +
                                  (std::isnan(logits[i]) ? "NaN" : "infinite"));
    }
    if (logits[i] != -kInfinity) tokens.push_back(static_cast<std::int64_t>(i));
  }
  if (tokens.empty()) throw std::invalid_argument("there is no token to choose from");

  const auto logit = [&](std::int64_t token) { return logits[static_cast<std::size_t>(token)]; };
  const auto before = [&](std::int64_t a, std::int64_t b) {
    return logit(a) != logit(b) ? logit(a) > logit(b) : a < b;
  };
  if (sampling.temperature == 0) return *std::min_element(tokens.begin(), tokens.end(), before);

  const auto wanted = static_cast<std::size_t>(sampling.top_k);
  const std::size_t kept = wanted == 0 ? tokens.size() : std::min(wanted, tokens.size());
  std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end(), before);
  tokens.resize(kept);

  std::vector<double> weights;  // probabilities, up to a factor
  double sum = 0;
  for (const std::int64_t token : tokens) {
    weights.push_back(std::exp((static_cast<double>(logit(token)) - logit(tokens[0])) / sampling.temperature));
    sum += weights.back();
  }
  std::size_t allowed = 0;
  double mass = 0;
  while (allowed < kept && (allowed == 0 || mass < sampling.top_p * sum)) mass += weights[allowed++];
  double reached = 0;
  for (std::size_t i = 0; i < allowed; ++i) {
    reached += weights[i];
    if (draw * mass < reached) return tokens[i];
  }
  return tokens[allowed - 1];  // rounding
}

}  // namespace llmcache::examples
