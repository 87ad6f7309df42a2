// Where a model's output is read: which tokens' final states move it.
#pragma once

#include <string>
#include <vector>

#include "llmcache/model/layered_model.h"
#include "model/probe.h"

namespace llmcache {

enum class OutputRead {
  kAllTokens,  ///< every token moves the whole output: pooled over all
  kFirstToken,
  kLastToken,
  kPerToken,    ///< the output has one entry a token, moved by that token alone
  kMaskedOnes,  ///< pooled over the tokens that an input of its own marks with ones (a pooling mask)
  kOther,       ///< none of these
};

/// "all tokens", "first token", ...
const char* to_string(OutputRead read) noexcept;

struct OutputPositions {
  OutputRead read = OutputRead::kOther;
  int mask_argument = -1;       ///< kMaskedOnes: position of that mask among the inputs
  std::vector<bool> head_only;  ///< by input: it moves no final state, so that states do not depend on it
  std::string note;             ///< for people

  /// True if the output is read at this token of a sequence of `tokens`, as far as no mask says so.
  [[nodiscard]] bool reads(std::int64_t token, std::int64_t tokens) const noexcept;
};

/// Changes the final state of one token after the other of a tiny sequence and looks at what the head makes of it. The
/// result has one entry a sequence (OutputSpec::per_row). Lets out what the model throws.
OutputPositions output_positions(const Model& model, const InputSpec& spec_of_inputs, const OutputSpec& spec,
                                 const ModelProfile& profile);

/// True if layers do not look at the places of their tokens: with the embedded tokens of a tiny sequence in another
/// order they give the same states in that order. Then a block of tokens may be reused in another place.
bool layers_ignore_places(const Model& model, const InputSpec& spec_of_inputs);

}  // namespace llmcache
