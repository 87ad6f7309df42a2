// Scores what a model returned for a request by the task of the workload, and what served sequences were served from.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "linear_probe.h"
#include "outputs.h"
#include "statistics.h"
#include "token_file.h"

namespace llmcache::bench {

/// Most tokens of an answer, as in BERT's own evaluation.
inline constexpr std::int64_t kMostAnswerTokens = 30;

/// The part of `passage` for which the sum of the logits of its first and its last token is largest; an empty range if
/// the first token of the sequence, which says that there is no answer, has a sum as large. `start` and `end`: one
/// logit for each token of the sequence; a passage that goes beyond them is cut. NaN is never the largest.
TokenRange answer_span(std::span<const float> start, std::span<const float> end, TokenRange passage);

struct AnswerScore {
  double exact_match = 0;  ///< 0 or 1
  double f1 = 0;           ///< 0 to 1
};

/// By the rules of SQuAD 2.0 (Rajpurkar, Jia and Liang 2018, arXiv 1806.03822, and their evaluation script), the best
/// over all gold answers, each ended by a newline; none: right is to say nothing. Both are texts of words, lower case
/// and without punctuation; "a", "an" and "the" do not count.
AnswerScore score_answer(std::string_view answer, std::string_view gold_answers);

/// Log-likelihoods of the scored tokens of a request, one list a row; unset where the logits before a token did not
/// come back.
using TokenScores = std::vector<std::vector<std::optional<double>>>;

/// What a request contributes to the metric, and to a second one where the task has two: choices per byte, exact match
/// beside F1.
struct Scores {
  std::optional<Sample> first = {}, second = {};
};

/// Logits [vocabulary] that predict what follows `ids`, from a request before.
struct LastLogits {
  std::vector<std::int32_t> ids;
  at::Tensor logits;
};

/// For one model on one workload. `file` must outlive it.
class Scorer {
 public:
  /// `vocabulary`: ids that the model knows, 0 if unknown. The probe is used for classification only; throws Failure if
  /// it has not as many dimensions as the pooled output.
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

  const TokenFile& file_;
  OutputShape shape_;
  std::optional<LinearProbe> probe_;
  std::optional<Metric> metric_;
};

/// Takes away from each what is not in all of them, so that all are over the same tokens. They must be of one request.
void keep_common(const std::vector<TokenScores*>& scores);

/// Was the cached request one that a served sequence may stand for?
///
/// Duplicates: a sequence that was served from its pair's other text is right where the pair is labelled a duplicate
/// and unsafe where it is labelled none; served from a text with equal ids it is right; served from any other text
/// nobody labelled the two, and it is neither. Answers: a sequence that was served from a request with the same gold
/// answer (or, like itself, without one) has the same answer.
class ServedCounts {
 public:
  explicit ServedCounts(const TokenFile& file) : file_(file) {}

  static constexpr std::int64_t kNotServed = -1;
  static constexpr std::int64_t kUnknown = -2;  ///< served, the cache does not say from what

  /// Sequence `asking` of the file was computed (kNotServed) or served from sequence `entry` of the file.
  void add(std::int64_t request, std::int64_t asking, std::int64_t entry);

  /// Right / (right + unsafe). NaN without labelled pairs among the served.
  [[nodiscard]] double precision() const { return ratio(right_, right_ + unsafe_); }
  /// Right among sequences whose pair is a duplicate / such sequences that asked.
  [[nodiscard]] double recall() const { return ratio(recalled_, duplicates_); }
  /// Unsafe / all served, those served from a text that nobody labelled included.
  [[nodiscard]] Rate unsafe() const { return of_served(unsafe_); }
  [[nodiscard]] std::int64_t unlabelled() const { return served_ - right_ - unsafe_; }
  /// Served from a request with the same gold answer / all served.
  [[nodiscard]] Rate same_answer() const { return of_served(same_answer_); }

 private:
  [[nodiscard]] Rate of_served(std::int64_t some) const {
    return {ratio(some, served_), wilson(some, served_), served_};
  }

  const TokenFile& file_;
  std::int64_t served_ = 0, right_ = 0, unsafe_ = 0, same_answer_ = 0;
  std::int64_t duplicates_ = 0, recalled_ = 0;  // asked, labelled
};

}  // namespace llmcache::bench
