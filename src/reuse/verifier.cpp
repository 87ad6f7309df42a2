#include "reuse/verifier.h"

#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/core.h>

#include <algorithm>
#include <limits>

#include "execute/clock.h"
#include "match/size_class.h"
#include "model/packing.h"
#include "model/tensors_of.h"

namespace llmcache {

/// Sizes that an answer has, for each mechanism that had a part in it.
struct AnswerSizes {
  std::vector<SizeCode> codes;
  bool reused = false;                    ///< something was not computed by the model as it is, for this batch
  bool checkable = false;                 ///< some row is to be what the plain model gives
  std::int64_t longest = 0, padding = 0;  ///< tokens of a row
};

namespace {

using Kind = SizeCode::Kind;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

bool is_checkable(const SequenceReport& sequence) {
  return sequence.tokens > 0 && (sequence.source == Source::kComputed || sequence.source == Source::kIdentical ||
                                 sequence.source == Source::kPrefix);
}

/// Largest difference relative to the largest magnitude; infinite if shapes, types or what is not finite differ.
double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return kInfinite;
  if (a.numel() == 0) return 0;
  if (!at::isFloatingType(b.scalar_type())) return at::equal(a, b) ? 0 : kInfinite;
  const auto finite = b.isfinite();
  if (!at::equal(a.isfinite(), finite) || !at::equal(a.isnan(), b.isnan())) return kInfinite;
  const auto x = at::where(finite, a, at::zeros({}, a.options())).to(at::kDouble);
  const auto y = at::where(finite, b, at::zeros({}, b.options())).to(at::kDouble);
  const double scale = std::max(y.abs().max().item<double>(), 1e-3);
  return (x - y).abs().max().item<double>() / scale;
}

AnswerSizes sizes_of(const Batch& batch, const Answers& answers) {
  const ForwardReport& report = answers.report();
  AnswerSizes sizes;
  sizes.codes = answers.sizes();
  sizes.reused = !sizes.codes.empty();
  const auto add = [&](Kind kind, std::int64_t a, std::int64_t b = 0) {
    sizes.codes.emplace_back(kind, size_class(a), size_class(b));
  };
  std::int64_t behind = 0;
  std::int64_t in_front = 0;
  for (std::size_t r = 0; r < report.sequences.size(); ++r) {
    const RowSpan& span = batch.spans[r];
    sizes.checkable = sizes.checkable || is_checkable(report.sequences[r]);
    sizes.longest = std::max(sizes.longest, span.tokens);
    if (span.tokens == 0) continue;
    in_front = std::max(in_front, span.first);
    behind = std::max(behind, batch.padded_length - span.first - span.tokens);
  }
  sizes.padding = std::max(behind, in_front);
  for (const Answers::Pass& pass : answers.passes()) {
    const bool packed = pass.result.report.execution == Execution::kPacked;
    add(packed ? Kind::kPackedLength : Kind::kDenseLength, batch.padded_length);
    add(packed ? Kind::kPackedRows : Kind::kDenseRows, batch.rows);
    sizes.reused = sizes.reused || (packed && sizes.padding > 0);
    if (!batch.source.inputs.empty()) add(Kind::kSource, batch.source.padded_length, batch.source.padded_length);
  }
  for (std::size_t r = 0; r < batch.source.tokens.size(); ++r) {
    // What is known of a row was computed with some padding behind its source, or with none.
    if (report.sequences[r].reused_tokens == 0 || batch.source.tokens[r] == batch.source.padded_length) continue;
    add(Kind::kSource, batch.source.tokens[r], batch.source.padded_length);
  }
  if (behind > 0) add(Kind::kPadding, behind + 1);
  if (in_front > 0) add(Kind::kLeftPadding, in_front + 1);
  if (batch.largest_mark > 1) add(Kind::kMarks, batch.largest_mark);
  for (const SequenceReport& sequence : report.sequences) {
    if (sequence.shared_tokens == 0 && sequence.source != Source::kPrefix) continue;
    add(Kind::kPrefix, sizes.longest, sequence.tokens);  // from a row of this batch, at most
    sizes.reused = true;
  }
  return sizes;
}

/// Where an answer differs from the plain one.
struct Difference {
  Mechanism mechanism = Mechanism::kDense;  ///< that it came from
  std::string what;
};

/// 0 if a tensor is what it is to be, up to the rounding of its type and of `rounding` (Model::rounding()).
double difference(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, std::size_t leaf,
                  at::ScalarType rounding) {
  const double off = leaf < a.size() ? relative_difference(a[leaf], b[leaf]) : kInfinite;
  return off <= std::max(answer_tolerance(b[leaf].scalar_type()), answer_tolerance(rounding)) ? 0 : off;
}

}  // namespace

double answer_tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-8;
    case at::kBFloat16:
      return 0.15;
    case at::kHalf:
      return 3e-2;
    default:
      return 5e-4;
  }
}

/// An answer, as far as it outlives its call.
struct Verifier::Comparison {
  Verification::Due due;
  AnswerSizes sizes;
  std::shared_ptr<const Batch> batch;
  Output output;
  Execution execution;
  std::vector<SequenceReport> sequences;
  std::vector<Mechanism> mechanisms;  ///< by row
  at::ScalarType rounding;            ///< Model::rounding()

  /// Compares the rows that are to be what the plain model gives, up to rounding. One difference for each mechanism at
  /// most.
  [[nodiscard]] std::vector<Difference> differences(const c10::IValue& result, const c10::IValue& plain,
                                                    const OutputSpec& spec) const {
    std::vector<Difference> found;
    const auto add = [&](Mechanism mechanism, const std::string& what) {
      const auto same = [&](const Difference& known) { return known.mechanism == mechanism; };
      if (std::none_of(found.begin(), found.end(), same)) found.push_back({mechanism, what});
    };
    if (!spec.per_row) {
      const auto a = tensors_of(result);
      const auto b = tensors_of(plain);
      for (std::size_t i = 0; i < b.size(); ++i) {
        const double off = difference(a, b, i, rounding);
        if (off == 0) continue;
        add(execution == Execution::kPacked ? Mechanism::kPacked : Mechanism::kDense,
            fmt::format("tensor {} of a batch of {} rows of {} tokens is off by {:.2g} of its scale", i, batch->rows,
                        batch->padded_length, off));
      }
      return found;
    }
    for (std::int64_t row = 0; row < batch->rows; ++row) {
      const auto r = static_cast<std::size_t>(row);
      if (!is_checkable(sequences[r])) continue;
      const RowSpan& span = batch->spans[r];
      const bool whole = output == Output::kAll && batch->contiguous;
      const auto part = [&](const c10::IValue& value) {
        // What was cut has its tokens in front, and zeros behind them.
        return row_of(value, spec, row, whole ? span.first : 0, whole ? span.tokens : 0,
                      whole ? batch->padded_length : -1);
      };
      const auto a = part(result);
      const auto b = part(plain);
      for (std::size_t i = 0; i < b.size(); ++i) {
        const double off = difference(a, b, i, rounding);
        if (off == 0) continue;
        add(mechanisms[r], fmt::format("a sequence of {} tokens, {} of them known, in a batch of {} rows of {} is off "
                                       "by {:.2g} of its scale",
                                       sequences[r].tokens, sequences[r].reused_tokens + sequences[r].shared_tokens,
                                       batch->rows, batch->padded_length, off));
      }
    }
    return found;
  }

  [[nodiscard]] std::vector<std::int64_t> known_tokens() const {
    std::vector<std::int64_t> known;
    for (const SequenceReport& sequence : sequences) known.push_back(sequence.reused_tokens);
    return known;
  }
};

Verifier::Verifier(const WrappedModel& wrapped, const Options& options, Verification& verification, Cache cache)
    : wrapped_(wrapped),
      only_layers_(!wrapped.inputs.vocabulary_known || wrapped.profile.packed_weights > 0),
      cache_(std::move(cache)),
      verification_(verification) {
  if (options.verify_rate > 0 && options.verify_in_background)
    jobs_ = std::make_unique<BackgroundJobs>(wrapped.model->device());
}

c10::IValue Verifier::verified(const Call& call, Answers& answers, c10::IValue result) {
  for (const Answers::Pass& pass : answers.passes()) {
    if (!pass.result.verified) return result;
  }
  ForwardReport& report = answers.report();
  Comparison comparison{Verification::Due::kNo,
                        sizes_of(call.batch, answers),
                        nullptr,
                        call.request.output,
                        report.execution,
                        report.sequences,
                        {},
                        wrapped_.model->rounding()};
  const AnswerSizes& sizes = comparison.sizes;
  const bool nothing_to_compare = only_layers_ && report.execution == Execution::kDense && !sizes.reused;
  if (!sizes.checkable || nothing_to_compare) return result;
  comparison.due = verification_.due(sizes.codes, sizes.reused);
  if (comparison.due == Verification::Due::kNo) return result;
  for (std::int64_t row = 0; row < call.batch.rows; ++row) comparison.mechanisms.push_back(answers.mechanism(row));
  if (jobs_) {
    verify_later(call, std::move(comparison), result);
    return result;
  }
  Stopwatch clock;
  try {
    comparison.batch = std::shared_ptr<const Batch>(std::shared_ptr<const Batch>(), &call.batch);
    auto plain = plain_answer(comparison);
    const bool same = compare(comparison, result, plain);
    report.verified = true;
    report.verify_ms = clock.lap();
    if (comparison.due == Verification::Due::kSample) verification_.add_time(0, report.verify_ms);
    if (same) return result;
    answers.writes() = {};
    report.replaced = true;
    answers.fallbacks().emplace_back("verification", "the answer differed from the plain model's, which was returned");
    cache_.drop();
    return plain;
  } catch (const std::exception&) {
    verification_.failed();  // the plain model may lack memory for what the packed one had enough for
    report.verify_ms = clock.lap();
    return result;
  }
}

c10::IValue Verifier::plain_answer(const Comparison& comparison) const {
  return cut_output(wrapped_.model->plain(comparison.batch->inputs), wrapped_.output, *comparison.batch,
                    comparison.known_tokens(), comparison.output);
}

bool Verifier::compare(const Comparison& comparison, const c10::IValue& result, const c10::IValue& plain) {
  const auto found = comparison.differences(result, plain, wrapped_.output);
  if (found.empty()) {
    const AnswerSizes& sizes = comparison.sizes;
    verification_.agreed(comparison.due, sizes.codes);
    verification_.envelope().add_sizes(sizes.longest, comparison.batch->rows, sizes.padding);
    return true;
  }
  for (const Difference& one : found) {
    for (const std::string& closed : verification_.differed(comparison.due, one.mechanism, one.what)) {
      TORCH_WARN("llmcache: an answer differed from the plain model's; what it came from is closed for good. ", closed);
    }
  }
  return false;
}

void Verifier::verify_later(const Call& call, Comparison comparison, const c10::IValue& result) {
  std::size_t bytes = 0;
  const auto copy = [&](const at::Tensor& tensor) {
    bytes += tensor.nbytes();
    return tensor.clone();
  };
  auto batch = std::make_shared<Batch>(call.batch);
  for (c10::IValue& input : batch->inputs) input = map_tensors(input, copy);
  batch->on_host.clear();  // may be the caller's memory
  comparison.batch = std::move(batch);
  auto job = [this, comparison = std::move(comparison), answer = map_tensors(result, copy), epoch = call.epoch,
              state = at::ThreadLocalState()] {
    const at::ThreadLocalStateGuard guard(state);
    const c10::NoGradGuard no_grad;
    Stopwatch clock;
    try {
      if (cache_.check_weights() != epoch) return;  // it was made with other weights, or from what was dropped
      const auto plain = plain_answer(comparison);
      const bool same = compare(comparison, answer, plain);
      if (comparison.due == Verification::Due::kSample) verification_.add_time(0, clock.lap());
      if (!same) cache_.drop();
    } catch (const std::exception&) {
      verification_.failed();
    }
  };
  if (!jobs_->add(std::move(job), bytes)) return;  // counted as dropped: another answer of the size is compared
}

void Verifier::fill(VerificationStats& stats) const {
  verification_.fill(stats);
  if (!jobs_) return;
  stats.waiting = jobs_->waiting();
  stats.dropped = jobs_->dropped();
}

}  // namespace llmcache
