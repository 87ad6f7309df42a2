#include "llmcache/generate.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "execute/clock.h"
#include "llmcache/error.h"
#include "llmcache/padding.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

using Ids = std::vector<std::int64_t>;

/// The smaller one of two limits, of which 0 is none.
std::int64_t least_known(std::int64_t one, std::int64_t other) {
  return one == 0 || other == 0 ? std::max(one, other) : std::min(one, other);
}

/// One sequence on its way.
struct Growing {
  Ids ids;  // the prompt, and what was generated
  std::mt19937_64 draws;
  bool done = false;
};

class Generation {
 public:
  Generation(LayerCacheBase& cache, const std::vector<Ids>& prompts, const GenerateOptions& options,
             const OnToken& on_token)
      : cache_(cache),
        options_(options),
        on_token_(on_token),
        most_(least_known(options.max_tokens, cache.profile().max_tokens)) {
    check(prompts);
    results_.resize(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      growing_.push_back({.ids = prompts[i], .draws = std::mt19937_64(options.sampling.seed + i)});
      results_[i].prompt_tokens = static_cast<std::int64_t>(prompts[i].size());
    }
  }

  std::vector<Generated> run() {
    std::vector<std::size_t> open(growing_.size());
    std::iota(open.begin(), open.end(), std::size_t{0});
    Stopwatch clock;
    step(open);
    const double prefill_ms = clock.lap();
    double decode_ms = 0;
    while (true) {
      decode_ms += clock.lap();
      for (const std::size_t i : open) results_[i].decode_ms = decode_ms;
      std::erase_if(open, [&](std::size_t i) { return growing_[i].done; });
      if (open.empty()) break;
      for (const std::size_t i : open) ++results_[i].steps;
      step(open);
    }
    for (Generated& result : results_) result.prefill_ms = prefill_ms;
    return std::move(results_);
  }

 private:
  void check(const std::vector<Ids>& prompts) const {
    options_.sampling.validate();
    const ModelProfile& profile = cache_.profile();
    if (options_.max_new_tokens < 1 || options_.max_tokens < 0) {
      throw Error(ErrorCode::kInvalidOptions, "generate: max_new_tokens is at least 1, max_tokens 0 or above");
    }
    if (!profile.causal) {
      throw Error(ErrorCode::kNotAvailable, "generate: the model is not causal, so it cannot continue a text");
    }
    if (prompts.empty()) throw Error(ErrorCode::kInvalidInput, "generate: there is no prompt");
    check_sources(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      if (prompts[i].empty()) throw Error(ErrorCode::kInvalidInput, fmt::format("generate: prompt {} has no token", i));
      if (most_ > 0 && static_cast<std::int64_t>(prompts[i].size()) > most_) {
        throw Error(ErrorCode::kInvalidInput, fmt::format("generate: prompt {} has {} tokens, at most {} are possible",
                                                          i, prompts[i].size(), most_));
      }
    }
  }

  void check_sources(std::size_t prompts) const {
    const std::size_t expected = cache_.profile().source_arguments.empty() ? 0 : prompts;
    if (options_.sources.size() != expected) {
      throw Error(ErrorCode::kInvalidInput,
                  fmt::format("generate: {} sources, {} expected: {}", options_.sources.size(), expected,
                              expected > 0 ? "one for each prompt" : "the model takes none"));
    }
    for (std::size_t i = 0; i < options_.sources.size(); ++i) {
      if (options_.sources[i].empty())
        throw Error(ErrorCode::kInvalidInput, fmt::format("generate: source {} has no token", i));
    }
  }

  [[nodiscard]] Inputs inputs_of(const std::vector<std::size_t>& rows) const {
    std::vector<Ids> sequences;
    std::vector<Ids> sources;
    for (const std::size_t i : rows) {
      sequences.push_back(growing_[i].ids);
      if (!options_.sources.empty()) sources.push_back(options_.sources[i]);
    }
    const ModelProfile& profile = cache_.profile();
    const PaddedBatch batch = pad(sequences);
    return sources.empty() ? batch.inputs(profile) : batch.inputs(profile, pad(sources));
  }

  /// Chooses the next token of each of these sequences: all in one call, or where lengths differ and the model takes no
  /// mask, each in its own.
  void step(const std::vector<std::size_t>& open) {
    const ModelProfile& profile = cache_.profile();
    const auto differ = [&](const auto& length) {
      return std::ranges::any_of(open, [&](std::size_t i) { return length(i) != length(open.front()); });
    };
    const bool ragged = profile.mask_argument < 0 && differ([&](std::size_t i) { return growing_[i].ids.size(); });
    const bool ragged_sources =
        profile.source_arguments.size() == 1 && differ([&](std::size_t i) { return options_.sources[i].size(); });
    if (ragged || ragged_sources) {
      for (const std::size_t i : open) call({i});
    } else {
      call(open);
    }
  }

  void call(const std::vector<std::size_t>& rows) {
    const auto output = cache_.forward(
        inputs_of(rows), {.fidelity = Fidelity::kLossless, .output = Output::kLastToken, .tenant = options_.tenant});
    const at::Tensor logits = last_logits(output);
    const ForwardReport report = cache_.last_report();
    for (std::size_t row = 0; row < rows.size(); ++row) {
      Generated& result = results_[rows[row]];
      if (result.steps == 0) result.prompt_reused = report.sequences.at(row).reused_tokens;
      take(rows[row], logits[static_cast<std::int64_t>(row)]);
    }
  }

  /// Float `[rows, vocabulary]` on the CPU.
  static at::Tensor last_logits(const c10::IValue& output) {
    for (const at::Tensor& tensor : tensors_of(output)) {
      if (tensor.dim() != 3 || tensor.size(1) != 1 || !tensor.is_floating_point()) break;
      return tensor.select(1, 0).to(at::kCPU, at::kFloat).contiguous();
    }
    throw Error(ErrorCode::kNotAvailable, "generate: the model returns no logits [batch, tokens, vocabulary] first");
  }

  void take(std::size_t i, const at::Tensor& logits) {
    Growing& sequence = growing_[i];
    Generated& result = results_[i];
    const std::int64_t token = sample({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())},
                                      options_.sampling, next_draw(sequence.draws));
    const auto stop = [&](StopReason reason) {
      sequence.done = true;
      result.stopped = reason;
    };
    if (std::ranges::find(options_.stop_tokens, token) != options_.stop_tokens.end())
      return stop(StopReason::kStopToken);
    sequence.ids.push_back(token);
    result.tokens.push_back(token);
    if (on_token_ && !on_token_(i, token)) return stop(StopReason::kCaller);
    if (static_cast<std::int64_t>(result.tokens.size()) >= options_.max_new_tokens)
      return stop(StopReason::kMaxNewTokens);
    if (most_ > 0 && static_cast<std::int64_t>(sequence.ids.size()) > most_) return stop(StopReason::kMaxTokens);
  }

  LayerCacheBase& cache_;
  const GenerateOptions& options_;
  const OnToken& on_token_;
  const std::int64_t most_;  // of a sequence; 0: not known
  std::vector<Growing> growing_;
  std::vector<Generated> results_;
};

}  // namespace

void Sampling::validate() const {
  const auto bad = [](const char* what) { throw Error(ErrorCode::kInvalidOptions, what); };
  if (!(temperature >= 0) || !std::isfinite(temperature)) bad("Sampling.temperature: expected a number, 0 or above");
  if (top_k < 0) bad("Sampling.top_k: expected 0 (all) or above");
  if (!(top_p > 0 && top_p <= 1)) bad("Sampling.top_p: expected a number above 0, at most 1");
}

std::int64_t sample(std::span<const float> logits, const Sampling& sampling, double draw) {
  sampling.validate();
  if (!(draw >= 0 && draw < 1)) throw Error(ErrorCode::kInvalidOptions, "sample: draw is a number from 0, below 1");
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<std::int64_t> tokens;  // that are not excluded
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == kInfinity) {
      throw Error(ErrorCode::kModelFailed,
                  fmt::format("the logit of token {} is {}", i, std::isnan(logits[i]) ? "NaN" : "infinite"));
    }
    if (logits[i] != -kInfinity) tokens.push_back(static_cast<std::int64_t>(i));
  }
  if (tokens.empty()) throw Error(ErrorCode::kModelFailed, "there is no token to choose from");

  const auto logit = [&](std::int64_t token) { return logits[static_cast<std::size_t>(token)]; };
  const auto before = [&](std::int64_t a, std::int64_t b) {
    return logit(a) != logit(b) ? logit(a) > logit(b) : a < b;
  };
  if (sampling.temperature == 0) return *std::min_element(tokens.begin(), tokens.end(), before);

  const auto wanted = static_cast<std::size_t>(sampling.top_k);
  const std::size_t kept = wanted == 0 ? tokens.size() : std::min(wanted, tokens.size());
  const float highest = logit(*std::min_element(tokens.begin(), tokens.end(), before));
  if (kept < tokens.size()) {
    std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end(), before);
    tokens.resize(kept);
  } else if (sampling.top_p < 1) {
    std::sort(tokens.begin(), tokens.end(), before);
  }

  std::vector<double> weights;  // probabilities, up to a factor
  double sum = 0;
  for (const std::int64_t token : tokens) {
    weights.push_back(std::exp((static_cast<double>(logit(token)) - highest) / sampling.temperature));
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

const char* to_string(StopReason reason) noexcept {
  switch (reason) {
    case StopReason::kStopToken:
      return "stop token";
    case StopReason::kMaxNewTokens:
      return "max new tokens";
    case StopReason::kMaxTokens:
      return "max tokens";
    case StopReason::kCaller:
      return "caller";
  }
  return "unknown";
}

std::vector<Generated> generate_batch(LayerCacheBase& cache, const std::vector<std::vector<std::int64_t>>& prompts,
                                      const GenerateOptions& options, const OnToken& on_token) {
  return Generation(cache, prompts, options, on_token).run();
}

Generated generate(LayerCacheBase& cache, const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                   const std::function<bool(std::int64_t token)>& on_token) {
  OnToken each;
  if (on_token) each = [&](std::size_t, std::int64_t token) { return on_token(token); };
  return std::move(generate_batch(cache, {prompt}, options, each).front());
}

}  // namespace llmcache
