#include "scores.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "failure.h"

namespace llmcache::bench {
namespace {

std::optional<Metric> find_metric(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary,
                                  bool has_probe) {
  using Found = std::optional<Metric>;
  const bool pooled = shape.pooled_output >= 0;
  const std::int64_t ids = vocabulary > 0 ? vocabulary : *std::ranges::max_element(file.tokens) + 1;
  const bool logits = shape.logits_output >= 0 && shape.logits_dims >= ids && !file.scored.empty();
  if (file.task == Task::kClassification) return pooled && has_probe ? Metric::kAccuracy : Found();
  if (file.task == Task::kSimilarity) return pooled ? Metric::kSpearman : Found();
  if (file.task == Task::kAnswer && shape.answer_span && !file.passage.empty()) return Metric::kF1;
  if (file.task == Task::kChoice && logits) return Metric::kChoiceAccuracy;
  if (file.task == Task::kPerplexity && logits) return Metric::kPerplexity;
  return file.task == Task::kAnswer && logits ? Metric::kAnswerNll : Found();
}

/// Natural logarithms of the probabilities of tokens [range.begin, range.end) of `ids`, double [count]; row t - 1 -
/// first of `logits` scores token t.
at::Tensor log_likelihoods(const at::Tensor& logits, std::int64_t first, std::span<const std::int32_t> ids,
                           TokenRange range) {
  const std::int64_t count = range.end - range.begin;
  const std::vector<std::int64_t> own(ids.begin() + range.begin, ids.begin() + range.end);
  const at::Tensor tokens = at::tensor(own, at::device(logits.device()).dtype(at::kLong)).view({count, 1});
  const at::Tensor rows = logits.narrow(0, range.begin - 1 - first, count).to(at::kFloat).log_softmax(-1);
  return rows.gather(1, tokens).squeeze(1).to(at::kCPU, at::kDouble);
}

/// What is scored of a row that was cut to `length` tokens.
TokenRange cut_to(TokenRange range, std::size_t length) {
  range.end = std::min(range.end, static_cast<std::int64_t>(length));
  range.begin = std::min(range.begin, range.end);
  return range;
}

/// The sequence with the largest score; the first of equals.
struct Best {
  std::optional<std::size_t> sequence = {};
  double score = 0;

  void add(std::size_t candidate, double its_score) {
    if (!sequence || its_score > score) *this = {candidate, its_score};
  }
};

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

AnswerScore compare(Words answer, Words gold) {
  const double same = answer == gold ? 1 : 0;
  if (answer.empty() || gold.empty()) return {same, same};
  std::ranges::sort(answer);
  std::ranges::sort(gold);
  Words common;
  std::ranges::set_intersection(answer, gold, std::back_inserter(common));
  return {same, 2 * static_cast<double>(common.size()) / static_cast<double>(answer.size() + gold.size())};
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

void keep_common(const std::vector<TokenScores*>& scores) {
  if (scores.empty()) return;
  for (std::size_t row = 0; row < scores.front()->size(); ++row) {
    for (std::size_t i = 0; i < scores.front()->at(row).size(); ++i) {
      const bool common = std::ranges::all_of(scores, [&](const auto* s) { return s->at(row).at(i).has_value(); });
      if (common) continue;
      for (TokenScores* one : scores) one->at(row).at(i).reset();
    }
  }
}

Scorer::Scorer(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary,
               std::optional<LinearProbe> probe)
    : file_(file),
      shape_(shape),
      probe_(std::move(probe)),
      metric_(find_metric(file, shape, vocabulary, probe_.has_value())) {
  if (metric_ == Metric::kAccuracy && probe_->dims != shape_.pooled_dims) {
    throw Failure(fmt::format("the probe for {} on {} has {} dimensions, the model's pooled output {}; fit it again",
                              probe_->model, probe_->workload, probe_->dims, shape_.pooled_dims));
  }
}

bool Scorer::reads_logits() const {
  return metric_ == Metric::kChoiceAccuracy || metric_ == Metric::kPerplexity || metric_ == Metric::kAnswerNll;
}

std::optional<Metric> Scorer::second_metric() const {
  if (metric_ == Metric::kF1) return Metric::kExactMatch;
  if (metric_ == Metric::kChoiceAccuracy && !file_.scored_bytes.empty()) return Metric::kChoiceAccuracyPerByte;
  return std::nullopt;
}

TokenScores Scorer::token_scores(std::int64_t request, const Rows& rows, const std::vector<Returned>& returned,
                                 const LastLogits* before) const {
  const at::NoGradGuard no_grad;
  TokenScores scores(rows.size());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto sequence = static_cast<std::size_t>(file_.first_sequence(request)) + row;
    const TokenRange range = cut_to(file_.scored[sequence], rows[row].size());
    auto& values = scores[row];
    values.resize(static_cast<std::size_t>(range.end - range.begin));
    if (values.empty()) continue;
    for (const Returned& call : returned) {
      const TokenRange here = call.tokens.at(row);  // their logits score the tokens behind them
      const TokenRange part = {std::max(range.begin, here.begin + 1), std::min(range.end, here.end + 1)};
      if (part.begin >= part.end) continue;
      const at::Tensor logits = tensor_of(call.output, shape_.logits_output)[static_cast<std::int64_t>(row)];
      const at::Tensor found = log_likelihoods(logits, here.begin, rows[row], part);
      std::copy_n(found.const_data_ptr<double>(), found.size(0), values.begin() + (part.begin - range.begin));
    }
    if (values.front() || before == nullptr || std::ssize(before->ids) != range.begin) continue;
    if (!std::equal(before->ids.begin(), before->ids.end(), rows[row].begin())) continue;
    const TokenRange first = {range.begin, range.begin + 1};
    values.front() = log_likelihoods(before->logits.unsqueeze(0), range.begin - 1, rows[row], first).item<double>();
  }
  return scores;
}

Scores Scorer::scores(std::int64_t request, const Rows& rows, const TokenScores& scores) const {
  const auto first = static_cast<std::size_t>(file_.first_sequence(request));
  const bool choices = metric_ == Metric::kChoiceAccuracy;
  Sample text;
  Best by_sum, per_byte;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const bool cut = file_.scored[first + row].end > std::ssize(rows[row]);
    if (cut && metric_ != Metric::kPerplexity) return {};
    double sum = 0, count = 0;
    for (const auto& score : scores[row]) {
      if (!score && choices) return {};  // it would not be compared alike
      sum += score.value_or(0);
      count += score ? 1 : 0;
    }
    if (count == 0) continue;
    text.value -= sum;
    text.weight += count;
    by_sum.add(first + row, sum);
    if (second_metric()) per_byte.add(first + row, sum / static_cast<double>(file_.scored_bytes[first + row]));
  }
  if (!choices) return text.weight == 0 ? Scores{} : Scores{.first = text};
  const auto right = [&](const Best& best) {
    return Sample{best.sequence && file_.labels[*best.sequence] == 1 ? 1.0 : 0.0, 1};
  };
  return {.first = right(by_sum), .second = second_metric() ? std::optional(right(per_byte)) : std::nullopt};
}

Scores Scorer::score(std::int64_t request, const Rows& rows, const c10::IValue& output) const {
  if (!metric_) return {};
  if (reads_logits()) return scores(request, rows, token_scores(request, rows, {all_of(output, rows)}, nullptr));
  const at::NoGradGuard no_grad;
  if (metric_ == Metric::kF1) return answers(request, rows, output);
  if (metric_ == Metric::kAccuracy) return {.first = classes(request, rows, output)};
  const at::Tensor pair = tensor_of(output, shape_.pooled_output).to(at::kDouble);
  const double gold = file_.pair_score[static_cast<std::size_t>(request)];
  return {.first = Sample{at::cosine_similarity(pair[0], pair[1], 0).item<double>(), gold}};
}

Sample Scorer::classes(std::int64_t request, const Rows& rows, const c10::IValue& output) const {
  const auto first = static_cast<std::size_t>(file_.first_sequence(request));
  const at::Tensor pooled = tensor_of(output, shape_.pooled_output).to(at::kCPU, at::kFloat).contiguous();
  const auto dims = static_cast<std::size_t>(pooled.size(1));
  Sample sample;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::span<const float> values(pooled.data_ptr<float>() + row * dims, dims);
    sample.value += probe_->classify(values) == file_.labels[first + row] ? 1 : 0;
    sample.weight += 1;
  }
  return sample;
}

/// A request is one question.
Scores Scorer::answers(std::int64_t request, const Rows& rows, const c10::IValue& output) const {
  const std::int64_t sequence = file_.first_sequence(request);
  const auto logits = [&](std::int64_t number) {
    return tensor_of(output, number)[0].to(at::kCPU, at::kFloat).contiguous();
  };
  const at::Tensor start = logits(0);
  const at::Tensor end = logits(1);
  const std::size_t length = rows.front().size();
  const TokenRange span = answer_span({start.const_data_ptr<float>(), length}, {end.const_data_ptr<float>(), length},
                                      file_.passage[static_cast<std::size_t>(sequence)]);
  const AnswerScore score = score_answer(file_.text(sequence, span), file_.gold_answers(request));
  return {.first = Sample{score.f1, 1}, .second = Sample{score.exact_match, 1}};
}

void ServedCounts::add(std::int64_t request, std::int64_t asking, std::int64_t entry) {
  const auto r = static_cast<std::size_t>(request);
  const bool known = entry >= 0;
  // Of the entry; the next one begins behind it.
  const std::int64_t from = known ? file_.first_request_from(entry + 1) - 1 : kNotServed;
  served_ += entry != kNotServed ? 1 : 0;
  if (file_.task == Task::kDuplicates) {
    const bool duplicate = file_.pair_label[r] == 1;
    duplicates_ += duplicate ? 1 : 0;
    const bool equal = known && std::ranges::equal(file_.sequence(asking), file_.sequence(entry));
    const bool pair = known && from == file_.partner[r];
    if (equal || (pair && duplicate)) {
      ++right_;
      recalled_ += duplicate ? 1 : 0;
    } else if (pair) {
      ++unsafe_;
    }
  }
  if (file_.task == Task::kAnswer && known) {
    same_answer_ += file_.group[static_cast<std::size_t>(from)] == file_.group[r] ? 1 : 0;
  }
}

}  // namespace llmcache::bench
