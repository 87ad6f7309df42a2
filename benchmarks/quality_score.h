// Scores what a model returned for a request by the task of the workload.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "linear_probe.h"
#include "outputs.h"
#include "quality_metric.h"
#include "token_file.h"

namespace llmcache::bench {

/// What the outputs of a model are, as far as scores need them.
struct OutputShape {
  std::int64_t pooled_output = -1;  ///< number of the first output that is float [batch, dims]; -1: none
  std::int64_t pooled_dims = 0;
  std::int64_t logits_output = -1;  ///< number of the first output that is float [batch, tokens, dims]; -1: none
  std::int64_t logits_dims = 0;
  /// The outputs are float [batch, tokens] twice: logits of the first and of the last token of an answer.
  bool answer_span = false;
};

/// Log-likelihoods of the scored tokens of a request, one list a row; unset where the logits before a token did not
/// come back.
using TokenScores = std::vector<std::vector<std::optional<double>>>;

/// What a request contributes to the metric, and to a second one where the task has two: choices per byte, exact match
/// beside F1.
struct Scores {
  std::optional<Sample> first;
  std::optional<Sample> second;
};

/// Logits that predict what follows `ids`, from a request before.
struct LastLogits {
  std::vector<std::int32_t> ids;
  at::Tensor logits;  ///< [vocabulary]
};

/// For one model on one workload. `file` must outlive it.
class Scorer {
 public:
  /// `vocabulary`: ids that the model knows, 0 if unknown. The probe is used for classification only;
  /// throws Failure if it has not as many dimensions as the pooled output.
  Scorer(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary, std::optional<LinearProbe> probe);

  /// What is measured; unset: nothing that could be.
  [[nodiscard]] std::optional<Metric> metric() const { return metric_; }
  /// The second metric of the task; unset: it has one.
  [[nodiscard]] std::optional<Metric> second_metric() const;

  /// True if log-likelihoods are scored: first token_scores(), then scores().
  [[nodiscard]] bool reads_logits() const;

  /// Of request `request`, whose rows, cut to what was run, are `rows`. `before`: where the logits that predict the
  /// first scored token may be, if no call returned them; may be null.
  [[nodiscard]] TokenScores token_scores(std::int64_t request, const Rows& rows, const std::vector<Returned>& returned,
                                         const LastLogits* before) const;

  /// Unset where nothing can be scored: the answer was cut off, no token has a score, or of choices one has none.
  [[nodiscard]] Scores scores(std::int64_t request, const Rows& rows, const TokenScores& scores) const;

  /// Scores a request of which everything came back, right-padded. Unset where nothing of it can be scored: no metric,
  /// or what is scored was cut off.
  [[nodiscard]] Scores score(std::int64_t request, const Rows& rows, const c10::IValue& output) const;

 private:
  [[nodiscard]] Scores answers(std::int64_t request, const Rows& rows, const c10::IValue& output) const;
  [[nodiscard]] Sample classes(std::int64_t request, const Rows& rows, const c10::IValue& output) const;
  [[nodiscard]] TokenRange scored(std::int64_t request, std::size_t row, std::size_t length) const;

  const TokenFile& file_;
  OutputShape shape_;
  std::optional<LinearProbe> probe_;
  std::optional<Metric> metric_;
};

/// Takes away from each what is not in all of them, so that all are over the same tokens. They must be of one request.
void keep_common(const std::vector<TokenScores*>& scores);

}  // namespace llmcache::bench
