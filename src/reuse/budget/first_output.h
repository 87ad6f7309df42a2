// The part of a result by which answers are compared.
#pragma once

#include <ATen/core/Tensor.h>

#include "execute/batch.h"
#include "model/probe.h"
#include "model/tensors_of.h"

namespace llmcache {

/// Of a row the first tensor of its output, batch dimension 1, cut to the tokens that were asked for. A view.
class FirstOutput {
 public:
  explicit FirstOutput(const OutputSpec& output) : dims_(output.leaves.at(0)) {}

  /// The output has one entry a token.
  [[nodiscard]] bool per_token() const noexcept { return dims_.tokens >= 0; }

  [[nodiscard]] at::Tensor operator()(const c10::IValue& result, const Batch& batch, std::int64_t row) const {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
    auto own = tensors_of(result).at(0).narrow(dims_.batch, row, 1);
    if (per_token() && own.size(dims_.tokens) == batch.padded_length)
      own = own.narrow(dims_.tokens, span.first, span.tokens);
    return own;
  }

 private:
  const TokenDims dims_;
};

}  // namespace llmcache
