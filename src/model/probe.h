// What a few tiny forwards tell about a model that no name does.
#pragma once

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/model/layered_model.h"
#include "model/packing.h"

namespace llmcache {

/// Shape of a model's result: one TokenDims for each tensor in it, in order.
struct OutputSpec {
  std::vector<TokenDims> leaves;
  bool per_row = false;  ///< every tensor has the batch as a dimension, and there is nothing else
};

/// One pass of the plain model.
struct PlainRun {
  std::int64_t rows = 0, tokens = 0;
  Inputs inputs;
  c10::IValue result;
  std::vector<std::int64_t> real = {};  ///< tokens of each row in front of its padding; empty: all of them
};

/// The longest sequence that probing runs, for its size class: no power of two, as some sizes of models are.
constexpr std::int64_t kLongProbe = 33;

/// What probe() found beside what it fills in of a profile.
struct Probed {
  OutputSpec output;
  std::vector<PlainRun> runs;  ///< of unlike sizes, to be compared with other ways of running the model
};

/// The shape of hidden states, as a result.
OutputSpec states_output();

/// Deterministic inputs `[batch, tokens]`: ids spread over each embedding, `seed` varies them; ones
/// where an input selects from no embedding. Those of a source have probe_source_tokens(batch) tokens.
Inputs probe_inputs(const InputSpec& spec, at::Device device, std::int64_t batch, std::int64_t tokens,
                    std::int64_t seed = 0);

/// A length that follows from the rows, so that no run confuses it with the target's.
constexpr std::int64_t probe_source_tokens(std::int64_t batch) { return 4 * batch + 7; }

/// Numbers that an input is compared with and may hold (InputSpec::compared): within its vocabulary, if it has one. At
/// least one: where the model compares it with nothing that is 0, the usual padding.
std::vector<std::int64_t> special_values(const InputSpec& inputs, std::size_t argument);

/// Positions of the inputs that select from no embedding, ids aside: masks, as far as is known. 0 where padding is.
std::vector<int> marks(const InputSpec& inputs, int ids_argument);
/// The same of a source.
std::vector<int> source_marks(const InputSpec& inputs);

/// The line of an exception's text that says what went wrong: TorchScript puts it last, behind the trace, others first.
std::string reason_of(const std::exception& error);

/// Runs embed, layers and head in turn.
c10::IValue run_dense(const Model& model, const Inputs& inputs);

/// Fills causal, rows_independent, per_row_output and mask_argument of `profile`, whose ids_argument
/// and inputs the adapter has filled. Throws Error(kUnsupportedModel) for a model that answers the
/// same inputs differently or fails on tiny ones, or if `mask_argument` is out of range. What depends on the graph of
/// the layers alone is asked of `shallow` (ShallowModel), unless that is null.
Probed probe(const Model& model, const Model* shallow, const InputSpec& inputs, std::optional<int> mask_argument,
             ModelProfile& profile);

/// Throws Error(kUnsupportedModel) if the model gives another result for the inputs of `run` now.
void check_answers_again(const Model& model, const PlainRun& run);

/// Keeps profile.max_tokens and max_source_tokens, which the adapter has read off, only where the model takes as many
/// tokens and no more, as far as its work before the first layer tells; a bound beyond 4,096 is taken as it is, and so
/// is one that the model declares (InputSpec::most_tokens).
void probe_max_tokens(const Model& model, const InputSpec& inputs, ModelProfile& profile);

/// The entries of row `row` at positions [first, first + tokens) of each tensor of a result.
std::vector<at::Tensor> row_of(const c10::IValue& result, const OutputSpec& spec, std::int64_t row, std::int64_t first,
                               std::int64_t tokens, std::int64_t padded_length);

}  // namespace llmcache
