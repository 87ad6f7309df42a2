#include "answer_span.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

namespace llmcache::bench {
namespace {

using Words = std::vector<std::string_view>;

/// Pieces of `text` between any of these characters, empty ones left out.
Words split(std::string_view text, std::string_view at) {
  Words pieces;
  while (!text.empty()) {
    const std::size_t length = std::min(text.find_first_of(at), text.size());
    if (length > 0) pieces.push_back(text.substr(0, length));
    text.remove_prefix(std::min(length + 1, text.size()));
  }
  return pieces;
}

/// Those that count, in their order.
Words words_of(std::string_view text) {
  Words words = split(text, " \n");
  std::erase_if(words, [](std::string_view word) { return word == "a" || word == "an" || word == "the"; });
  return words;
}

AnswerScore compare(const Words& answer, const Words& gold) {
  const bool same = answer == gold;
  if (answer.empty() || gold.empty()) return {same ? 1.0 : 0.0, same ? 1.0 : 0.0};
  Words sorted_answer = answer;
  Words sorted_gold = gold;
  std::ranges::sort(sorted_answer);
  std::ranges::sort(sorted_gold);
  Words common;
  std::ranges::set_intersection(sorted_answer, sorted_gold, std::back_inserter(common));
  const auto total = static_cast<double>(answer.size() + gold.size());
  return {same ? 1.0 : 0.0, 2 * static_cast<double>(common.size()) / total};
}

}  // namespace

TokenRange answer_span(std::span<const float> start, std::span<const float> end, TokenRange passage) {
  const std::int64_t last = std::min(passage.end, static_cast<std::int64_t>(std::min(start.size(), end.size())));
  TokenRange best;
  if (start.empty() || end.empty()) return best;
  double most = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = passage.begin; i < last; ++i) {
    for (std::int64_t j = i; j < std::min(last, i + kMostAnswerTokens); ++j) {
      const double sum = static_cast<double>(start[static_cast<std::size_t>(i)]) + end[static_cast<std::size_t>(j)];
      if (!(sum > most)) continue;
      most = sum;
      best = {i, j + 1};
    }
  }
  const double none = static_cast<double>(start[0]) + end[0];
  return none >= most ? TokenRange{} : best;
}

AnswerScore score_answer(std::string_view answer, std::string_view gold_answers) {
  const Words said = words_of(answer);
  AnswerScore best = gold_answers.empty() ? compare(said, {}) : AnswerScore{};
  for (const std::string_view gold : split(gold_answers, "\n")) {
    const AnswerScore one = compare(said, words_of(gold));
    best = {std::max(best.exact_match, one.exact_match), std::max(best.f1, one.f1)};
  }
  return best;
}

}  // namespace llmcache::bench
