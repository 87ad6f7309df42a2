// The inputs of one call, checked, and where the real tokens of each row are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"

namespace llmcache {

struct RowSpan {
  std::int64_t first = 0;   ///< position of the first real token
  std::int64_t tokens = 0;  ///< real tokens
};

/// One row as banks know it: what decides its states, token after token.
struct RowKey {
  std::int64_t row = 0;  ///< of the batch
  RowSpan span;
  /// Rows of other partitions share nothing with it: tenant (tenant_key.h, in front), the source, types of the
  /// inputs, padding in front and what it holds.
  std::string partition;
  std::vector<std::int64_t> tokens;  ///< `ids_per_token` numbers for each real token
  std::size_t ids_per_token = 1;
};

/// The source of an encoder-decoder's batch.
struct BatchSource {
  std::vector<char> inputs;          ///< by input of the model: it is of the source; empty: there is none
  std::int64_t padded_length = 0;    ///< tokens a row, padding included
  std::vector<std::int64_t> tokens;  ///< by row: those that decide anything; padding behind them does not

  std::vector<at::Tensor> values;  ///< what SourceModel::run() gives for the rows, if it is known; empty: it is not

  [[nodiscard]] bool has(std::size_t input) const { return input < inputs.size() && inputs[input] != 0; }
};

/// All that is said of tokens is said of the target's, where there is a source.
struct Batch {
  Inputs inputs;  ///< one entry for every input the model declares
  /// The same on the host, int64 `[rows, tokens]`, contiguous; undefined for inputs that are None. Read once.
  std::vector<at::Tensor> on_host;
  std::string types;  ///< a character for each input: its type, or -1 for None
  std::int64_t rows = 0;
  std::int64_t padded_length = 0;  ///< tokens a row, padding included
  std::vector<RowSpan> spans;
  bool padded = false;       ///< some row has fewer real tokens than the padded length
  bool right_padded = true;  ///< every row begins with a real token
  bool contiguous = true;    ///< the real tokens of every row stand side by side
  std::int64_t tokens = 0;   ///< real tokens of all rows
  std::string plain_only;    ///< why only the plain model can be trusted with it; empty: nothing speaks against reuse
  BatchSource source;
  /// By row: position of the token that its output is read at (Model::read_positions), -1: unknown. Empty: the output
  /// is read in another way.
  std::vector<std::int64_t> read_at;
  std::int64_t largest_mark = 0;  ///< largest magnitude in inputs that select from no embedding, the mask aside

  /// Every real token through every layer.
  [[nodiscard]] Plan full_plan(std::int32_t layers) const;
  /// What the model is run on: its inputs, and behind them what is known of the source.
  [[nodiscard]] Inputs model_inputs() const;
  /// False if the output of the row is read at padding.
  [[nodiscard]] bool reads_real_token(std::int64_t row) const;
  /// The same of all rows that have a real token.
  [[nodiscard]] bool reads_real_tokens() const;
  /// Bytes that its inputs take.
  [[nodiscard]] std::size_t input_bytes() const;
  /// The batch made of some of the rows, in that order.
  [[nodiscard]] Batch select(const std::vector<std::int64_t>& chosen) const;
  /// Keys of the rows that have a real token. `left_out[i]`: input i decides no state; empty: all do.
  [[nodiscard]] std::vector<RowKey> keys(const std::string& tenant, const std::vector<char>& left_out = {}) const;
  /// Everything that decides what follows from a row's source alone.
  [[nodiscard]] std::string source_key(std::int64_t row, const std::string& tenant) const;
  /// Everything that decides the output of a row, byte by byte. `padding`: the padding behind its tokens is part of
  /// that, as it must be where the output is read there.
  [[nodiscard]] std::string whole_key(std::int64_t row, const std::string& tenant, bool padding) const;
};

/// Throws Error(kInvalidInput) that says what was found and what is expected: also for a real token outside the
/// vocabulary, and for a row that is longer than the model has positions for. Fills all of it; values that no probe
/// holds (a mask of other numbers than 0 and 1, ids outside the vocabulary at padding) make it `plain_only`.
Batch check_batch(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device);

struct WrappedModel;
/// The same of a wrapped model's own, with `read_at`, which the other leaves empty.
Batch check_batch(const Inputs& inputs, const WrappedModel& wrapped);

}  // namespace llmcache
