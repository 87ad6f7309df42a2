// How far a reused answer is from the full model's, in the metric of an error budget.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "llmcache/refresh/budget.h"

namespace llmcache {

/// Of the outputs of one sequence: tensors of one batch row, cut to its real tokens, of which the first counts.
class OutputError {
 public:
  /// `per_token`: the output has one entry a token, in dimension 1. `typical_distance`: for kRelativeError, see
  /// typical_distance(); above 0.
  OutputError(BudgetMetric metric, ScoreFunction scores, bool per_token, double typical_distance)
      : metric_(metric), scores_(std::move(scores)), per_token_(per_token), typical_distance_(typical_distance) {}

  /// 0 to 1. Decision and relative error of an output with one entry a token: the mean over its tokens. Token
  /// agreement: of the last token. Not finite: 1. Throws Error(kInvalidOptions) as decisions_of().
  [[nodiscard]] double operator()(const at::Tensor& answer, const at::Tensor& full) const;

  /// Mean distance between outputs of different sequences, `[1, values]` each, or `[1, tokens, values]`, of which equal
  /// places are compared. 0 for fewer than two.
  static double typical_distance(const std::vector<at::Tensor>& outputs, bool per_token);

 private:
  [[nodiscard]] at::Tensor rows_of(const at::Tensor& output) const;

  const BudgetMetric metric_;
  const ScoreFunction scores_;
  const bool per_token_;
  const double typical_distance_;
};

}  // namespace llmcache
