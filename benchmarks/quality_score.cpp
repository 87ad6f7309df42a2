#include "quality_score.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

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
      return logits ? std::optional(Metric::kAnswerNll) : std::nullopt;
    case Task::kDuplicates:
    case Task::kNone:
      break;
  }
  return std::nullopt;
}

at::Tensor output_of(const c10::IValue& output, std::int64_t number) {
  const auto tensors = tensors_of(output);
  if (number >= static_cast<std::int64_t>(tensors.size())) {
    throw Failure(fmt::format("the model returned {} tensors, expected more than {}", tensors.size(), number));
  }
  return tensors[static_cast<std::size_t>(number)];
}

}  // namespace

double log_likelihood(const at::Tensor& logits, std::span<const std::int32_t> ids, TokenRange range) {
  if (range.begin >= range.end) return 0;
  const std::int64_t count = range.end - range.begin;
  const at::Tensor tokens = at::empty({count, 1}, at::kLong);
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.data_ptr<std::int64_t>()[i] = ids[static_cast<std::size_t>(range.begin + i)];
  }
  const at::Tensor log_probabilities = logits.narrow(0, range.begin - 1, count).to(at::kFloat).log_softmax(-1);
  return log_probabilities.gather(1, tokens.to(logits.device())).sum(at::kDouble).item<double>();
}

Scorer::Scorer(const TokenFile& file, const OutputShape& shape, std::int64_t vocabulary, std::optional<Probe> probe)
    : file_(file),
      shape_(shape),
      probe_(std::move(probe)),
      metric_(find_metric(file, shape, vocabulary, probe_.has_value())) {
  if (metric_ == Metric::kAccuracy && probe_->dims != shape_.pooled_dims) {
    throw Failure(fmt::format("the probe for {} on {} has {} dimensions, the model's pooled output {}; fit it again",
                              probe_->model, probe_->workload, probe_->dims, shape_.pooled_dims));
  }
}

std::optional<Sample> Scorer::score(std::int64_t request, const std::vector<std::span<const std::int32_t>>& rows,
                                    const c10::IValue& output) const {
  if (!metric_) return std::nullopt;
  const at::NoGradGuard no_grad;
  const std::int64_t first = file_.first_sequence(request);
  if (metric_ == Metric::kSpearman) {
    const at::Tensor pair = output_of(output, shape_.pooled_output).to(at::kDouble);
    return Sample{at::cosine_similarity(pair[0], pair[1], 0).item<double>(),
                  static_cast<double>(file_.pair_score[static_cast<std::size_t>(request)])};
  }
  if (metric_ == Metric::kAccuracy) {
    const at::Tensor pooled = output_of(output, shape_.pooled_output).to(at::kCPU, at::kFloat).contiguous();
    const auto dims = static_cast<std::size_t>(pooled.size(1));
    Sample sample;
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const std::span<const float> values(pooled.data_ptr<float>() + row * dims, dims);
      sample.value += probe_->classify(values) == file_.labels[static_cast<std::size_t>(first) + row] ? 1 : 0;
      sample.weight += 1;
    }
    return sample;
  }

  // The rest reads logits.
  const at::Tensor logits = output_of(output, shape_.logits_output);
  Sample sample;
  double best = 0;
  std::int64_t best_row = -1;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    TokenRange range = file_.scored[static_cast<std::size_t>(first) + row];
    const auto length = static_cast<std::int64_t>(rows[row].size());
    if (range.end > length && metric_ != Metric::kPerplexity) return std::nullopt;
    range.end = std::min(range.end, length);
    if (range.begin >= range.end) continue;
    const double sum = log_likelihood(logits[static_cast<std::int64_t>(row)], rows[row], range);
    if (metric_ == Metric::kChoiceAccuracy) {
      if (best_row < 0 || sum > best) {
        best = sum;
        best_row = static_cast<std::int64_t>(row);
      }
    } else {
      sample.value -= sum;
      sample.weight += static_cast<double>(range.end - range.begin);
    }
  }
  if (metric_ == Metric::kChoiceAccuracy) {
    return Sample{best_row >= 0 && file_.labels[static_cast<std::size_t>(first + best_row)] == 1 ? 1.0 : 0.0, 1};
  }
  if (sample.weight == 0) return std::nullopt;
  return sample;
}

}  // namespace llmcache::bench
