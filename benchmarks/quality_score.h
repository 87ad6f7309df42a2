// Scores what a model returned for a request by the task of the workload.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "probe.h"
#include "quality_metric.h"
#include "token_file.h"

namespace llmcache::bench {

/// What the outputs of a model are, as far as scores need them.
struct OutputShape {
  std::int64_t pooled_output = -1;  ///< number of the first output that is float [batch, dims]; -1: none
  std::int64_t pooled_dims = 0;
  std::int64_t logits_output = -1;  ///< number of the first output that is float [batch, tokens, dims]; -1: none
  std::int64_t logits_dims = 0;
};

/// For one model on one workload. `file` must outlive it.
class Scorer {
 public:
  /// `vocabulary`: ids that the model knows, 0 if unknown. The probe is used for classification only;
  /// throws Failure if it has not as many dimensions as the pooled output.
  Scorer(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary, std::optional<Probe> probe);

  /// What is measured; unset: nothing that could be.
  [[nodiscard]] std::optional<Metric> metric() const { return metric_; }

  /// Scores request `request`, whose rows, cut to what was run, are `rows`, right-padded. Unset where
  /// nothing of it can be scored: no metric, or what is scored was cut off.
  [[nodiscard]] std::optional<Sample> score(std::int64_t request,
                                            const std::vector<std::span<const std::int32_t>>& rows,
                                            const c10::IValue& output) const;

 private:
  const TokenFile& file_;
  OutputShape shape_;
  std::optional<Probe> probe_;
  std::optional<Metric> metric_;
};

/// Sum of the natural logarithms of the probabilities of tokens [range.begin, range.end) of `ids`, each
/// given all before it. `logits`: [tokens, vocabulary]; row t - 1 scores token t. An empty range: 0.
double log_likelihood(const at::Tensor& logits, std::span<const std::int32_t> ids, TokenRange range);

}  // namespace llmcache::bench
