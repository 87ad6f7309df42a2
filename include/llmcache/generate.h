// Text generation with a wrapped causal language model.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "llmcache/layer_cache.h"

namespace llmcache {

/// How the next token is chosen from the model's logits.
struct Sampling {
  double temperature = 0;  ///< 0 (default): greedy, the most probable token
  std::int64_t top_k = 0;  ///< only the k most probable tokens; 0 (default): all
  double top_p = 1;        ///< of these, the fewest most probable ones whose probabilities sum to at least p; (0, 1]
  std::uint64_t seed = 0;  ///< sequence i of a batch draws with seed + i: equal seeds give equal tokens

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// Uniform in [0, 1). The same sequence everywhere, which std::uniform_real_distribution does not promise.
inline double next_draw(std::mt19937_64& generator) { return static_cast<double>(generator() >> 11) * 0x1.0p-53; }

/// The token that `draw`, a number in [0, 1), falls on. Of equally probable tokens the lower id comes first. A logit of
/// minus infinity excludes its token. `logits`: `[vocabulary]`. Thread safe.
/// Throws Error(kInvalidOptions) for bad settings, and Error(kModelFailed) if no token is left or a logit is NaN or
/// plus infinity: the model is broken, and any choice would hide that.
std::int64_t sample(std::span<const float> logits, const Sampling& sampling, double draw);

/// Settings of generate().
struct GenerateOptions {
  std::int64_t max_new_tokens = 128;           ///< for each sequence, at least 1
  std::vector<std::int64_t> stop_tokens = {};  ///< a sequence ends at the first of these, which is not part of it
  Sampling sampling = {};
  std::string tenant = {};      ///< RequestOptions::tenant of all sequences
  std::int64_t max_tokens = 0;  ///< longest sequence for the model; 0: what the model takes, if known
  /// Of an encoder-decoder: the source of each prompt, in their order. A prompt is the beginning of a target then: the
  /// token that the model's targets start with, at least. Of other models: none.
  std::vector<std::vector<std::int64_t>> sources = {};
};

/// Why a sequence ended.
enum class StopReason {
  kStopToken,     ///< one of GenerateOptions::stop_tokens came
  kMaxNewTokens,  ///< it has GenerateOptions::max_new_tokens
  kMaxTokens,     ///< the model takes no longer sequence
  kCaller,        ///< `on_token` returned false
};

/// "stop token", "max new tokens", "max tokens", "caller".
const char* to_string(StopReason reason) noexcept;

/// What was generated behind one prompt.
struct Generated {
  std::vector<std::int64_t> tokens;  ///< without the prompt and the stop token
  StopReason stopped = StopReason::kMaxNewTokens;
  std::int64_t prompt_tokens = 0;
  std::int64_t prompt_reused = 0;  ///< tokens of the prompt that were known from earlier requests
  std::int64_t steps = 0;          ///< calls of forward() after the first one
  double prefill_ms = 0;           ///< the first call, which all sequences share
  double decode_ms = 0;            ///< from then until this sequence ended
};

/// Called with each new token as soon as it is chosen: number of the sequence, and token. False ends the sequence.
using OnToken = std::function<bool(std::size_t sequence, std::int64_t token)>;

/// Continues each of `prompts` (token ids) until it stops: one ragged batch, one call of forward() for each step.
/// Requests are made with Fidelity::kLossless: tokens are those that the model itself would give, up to ties within
/// rounding. A step computes one token of each sequence that is not done, where the cache keeps prefixes:
/// ModelProfile::prefix_reuse is true, the cache was made for kLossless or kBudget, and the sequences fit into its
/// share for prefixes. Elsewhere each step computes the whole sequences. The model returns logits `[batch, tokens,
/// vocabulary]`, alone or first in a tuple.
///
/// Thread safety: may run in many threads on one cache; `on_token` is called from the calling thread.
/// Throws Error(kInvalidInput) for no prompt, an empty one, or one that leaves no room for a new token;
/// Error(kInvalidOptions); Error(kNotAvailable) where the model is not causal or returns no logits; what forward()
/// throws; what `on_token` throws, unchanged. What steps before kept stays in the cache then.
std::vector<Generated> generate_batch(LayerCacheBase& cache, const std::vector<std::vector<std::int64_t>>& prompts,
                                      const GenerateOptions& options = {}, const OnToken& on_token = {});
/// The same for one prompt; `on_token` gets the token alone.
Generated generate(LayerCacheBase& cache, const std::vector<std::int64_t>& prompt, const GenerateOptions& options = {},
                   const std::function<bool(std::int64_t token)>& on_token = {});

}  // namespace llmcache
