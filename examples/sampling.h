// The next token from a language model's logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>

namespace llmcache::examples {

struct Sampling {
  double temperature = 0;  ///< 0: greedy, the most probable token
  std::int64_t top_k = 0;  ///< only the k most probable tokens; 0: all
  double top_p = 1;        ///< of these, the fewest most probable ones whose probabilities sum up to at least p; (0, 1]

  /// Throws std::invalid_argument that names the field.
  void validate() const;
};

/// The token that `draw`, a number in [0, 1), falls on. Of equally probable tokens the lower id comes first, both
/// where the best is wanted and where the last that is allowed is. A logit of minus infinity excludes its token.
/// Throws std::invalid_argument if no token is left, or a logit is NaN or plus infinity: the model is broken, and
/// any choice would hide it.
std::int64_t sample(std::span<const float> logits, const Sampling& sampling, double draw);

/// Uniform in [0, 1). The same sequence everywhere, which std::uniform_real_distribution does not promise.
inline double next_draw(std::mt19937_64& generator) { return static_cast<double>(generator() >> 11) * 0x1.0p-53; }

}  // namespace llmcache::examples
