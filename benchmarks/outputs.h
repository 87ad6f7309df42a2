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

/// Tokens of the longest row.
std::int64_t padded_length(const Rows& rows);

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

}  // namespace llmcache::bench
