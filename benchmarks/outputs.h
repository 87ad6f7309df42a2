// What a model's call returns, as far as the benchmark reads it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <span>
#include <vector>

#include "token_file.h"

namespace llmcache::bench {

/// The sequences of one request: their ids.
using Rows = std::vector<std::span<const std::int32_t>>;

/// Tokens of the longest row, and real tokens of all rows.
std::int64_t padded_length(const Rows& rows);
std::int64_t tokens_of(const Rows& rows);

/// What the outputs of a model are, as far as scores need them.
struct OutputShape {
  std::int64_t pooled_output = -1;  ///< number of the first output that is float [batch, dims]; -1: none
  std::int64_t pooled_dims = 0;
  std::int64_t logits_output = -1;  ///< number of the first output that is float [batch, tokens, dims]; -1: none
  std::int64_t logits_dims = 0;
  /// The outputs are float [batch, tokens] twice: logits of the first and of the last token of an answer.
  bool answer_span = false;
};

/// In the order of the result, tuples and lists opened, None left out. Throws Failure for anything else.
std::vector<at::Tensor> tensors_of(const c10::IValue& value);

/// Tensor `number` of the result. Throws Failure where there are not so many.
at::Tensor tensor_of(const c10::IValue& value, std::int64_t number);

/// What one call returned. An output with one entry a token has those of `tokens` at the start of its token dimension.
struct Returned {
  c10::IValue output;
  std::vector<TokenRange> tokens;  ///< one a row: which tokens of the sequence came back
};

/// All tokens of each row came back.
Returned all_of(c10::IValue output, const Rows& rows);

/// What comes out on top in each row of `logits` [rows, vocabulary].
std::vector<std::int64_t> best_tokens(const at::Tensor& logits);

}  // namespace llmcache::bench
