// Answers that a model finds in a passage, compared with gold answers by the rules of SQuAD 2.0 (Rajpurkar, Jia and
// Liang 2018, arXiv 1806.03822, and their evaluation script): exact match and F1 of words.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

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

/// The best over all gold answers, each ended by a newline; none: right is to say nothing. Both are texts of words,
/// lower case and without punctuation; "a", "an" and "the" do not count.
AnswerScore score_answer(std::string_view answer, std::string_view gold_answers);

}  // namespace llmcache::bench
