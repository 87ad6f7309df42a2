#include "quality_score.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "answer_span.h"
#include "failure.h"
#include "outputs.h"

namespace llmcache::bench {
namespace {

std::optional<Metric> find_metric(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary,
                                  bool has_probe) {
  const bool pooled = shape.pooled_output >= 0;
  const std::int64_t ids = vocabulary > 0 ? vocabulary : *std::max_element(file.tokens.begin(), file.tokens.end()) + 1;
  const bool logits = shape.logits_output >= 0 && shape.logits_dims >= ids && !file.scored.empty();
  switch (file.task) {
    case Task::kClassification:
      return pooled && has_probe ? std::optional(Metric::kAccuracy) : std::nullopt;
    case Task::kSimilarity:
      return pooled ? std::optional(Metric::kSpearman) : std::nullopt;
    case Task::kChoice:
      return logits ? std::optional(Metric::kChoiceAccuracy) : std::nullopt;
    case Task::kPerplexity:
      return logits ? std::optional(Metric::kPerplexity) : std::nullopt;
    case Task::kAnswer:
      if (shape.answer_span && !file.passage.empty()) return Metric::kF1;
      return logits ? std::optional(Metric::kAnswerNll) : std::nullopt;
    case Task::kDuplicates:
    case Task::kGeneration:
    case Task::kNone:
      break;
  }
  return std::nullopt;
}

/// Natural logarithms of the probabilities of tokens [range.begin, range.end) of `ids`, double [count]; row t - 1 -
/// first of `logits` scores token t.
at::Tensor log_likelihoods(const at::Tensor& logits, std::int64_t first, std::span<const std::int32_t> ids,
                           TokenRange range) {
  const std::int64_t count = range.end - range.begin;
  const at::Tensor tokens = at::empty({count, 1}, at::kLong);
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.data_ptr<std::int64_t>()[i] = ids[static_cast<std::size_t>(range.begin + i)];
  }
  const at::Tensor rows = logits.narrow(0, range.begin - 1 - first, count).to(at::kFloat).log_softmax(-1);
  return rows.gather(1, tokens.to(logits.device())).squeeze(1).to(at::kCPU, at::kDouble);
}

/// The sequence with the largest score; the first of equals.
struct Best {
  std::optional<std::size_t> sequence = {};
  double score = 0;

  void add(std::size_t candidate, double its_score) {
    if (!sequence || its_score > score) *this = {candidate, its_score};
  }
};

}  // namespace

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

/// What is scored of a row that was cut to `length` tokens.
TokenRange Scorer::scored(std::int64_t request, std::size_t row, std::size_t length) const {
  TokenRange range = file_.scored[static_cast<std::size_t>(file_.first_sequence(request)) + row];
  range.end = std::min(range.end, static_cast<std::int64_t>(length));
  range.begin = std::min(range.begin, range.end);
  return range;
}

TokenScores Scorer::token_scores(std::int64_t request, const Rows& rows, const std::vector<Returned>& returned,
                                 const LastLogits* before) const {
  const at::NoGradGuard no_grad;
  TokenScores scores(rows.size());
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const TokenRange range = scored(request, row, rows[row].size());
    auto& values = scores[row];
    values.resize(static_cast<std::size_t>(range.end - range.begin));
    if (values.empty()) continue;
    for (const Returned& call : returned) {
      const TokenRange here = call.tokens.at(row);  // their logits score the tokens behind them
      const TokenRange part = {std::max(range.begin, here.begin + 1), std::min(range.end, here.end + 1)};
      if (part.begin >= part.end) continue;
      const at::Tensor logits = tensor_of(call.output, shape_.logits_output)[static_cast<std::int64_t>(row)];
      const at::Tensor found = log_likelihoods(logits, here.begin, rows[row], part);
      for (std::int64_t i = 0; i < found.size(0); ++i) {
        values[static_cast<std::size_t>(part.begin - range.begin + i)] = found.data_ptr<double>()[i];
      }
    }
    if (values.front() || before == nullptr || static_cast<std::int64_t>(before->ids.size()) != range.begin) continue;
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
  Best by_sum;
  Best per_byte;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const bool cut = file_.scored[first + row].end > static_cast<std::int64_t>(rows[row].size());
    if (cut && metric_ != Metric::kPerplexity) return {};
    double sum = 0;
    double count = 0;
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
  if (text.weight == 0 && !choices) return {};
  if (!choices) return {.first = text, .second = {}};
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
  if (metric_ == Metric::kSpearman) {
    const at::Tensor pair = tensor_of(output, shape_.pooled_output).to(at::kDouble);
    return {.first = Sample{at::cosine_similarity(pair[0], pair[1], 0).item<double>(),
                            static_cast<double>(file_.pair_score[static_cast<std::size_t>(request)])},
            .second = {}};
  }
  return {.first = classes(request, rows, output), .second = {}};
}

Sample Scorer::classes(std::int64_t request, const Rows& rows, const c10::IValue& output) const {
  const std::int64_t first = file_.first_sequence(request);
  const at::Tensor pooled = tensor_of(output, shape_.pooled_output).to(at::kCPU, at::kFloat).contiguous();
  const auto dims = static_cast<std::size_t>(pooled.size(1));
  Sample sample;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const std::span<const float> values(pooled.data_ptr<float>() + row * dims, dims);
    sample.value += probe_->classify(values) == file_.labels[static_cast<std::size_t>(first) + row] ? 1 : 0;
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

}  // namespace llmcache::bench
