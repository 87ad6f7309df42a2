#include "answer_check.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <limits>

#include "match/size_class.h"
#include "model/packing.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

using Kind = SizeCode::Kind;

bool is_checkable(const SequenceReport& sequence) {
  return sequence.tokens > 0 && (sequence.source == Source::kComputed || sequence.source == Source::kIdentical ||
                                 sequence.source == Source::kPrefix);
}

Mechanism mechanism_of(const SequenceReport& sequence, Execution execution) {
  if (sequence.source == Source::kIdentical && sequence.resumed_layer < 0 && sequence.entry < 0) {
    return Mechanism::kExactMatch;
  }
  if (sequence.source != Source::kComputed || sequence.shared_tokens > 0) return Mechanism::kPrefix;
  return execution == Execution::kPacked ? Mechanism::kPacked : Mechanism::kDense;
}

/// Largest difference relative to the largest magnitude; infinite if shapes, types or what is not finite differ.
double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
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

AnswerSizes sizes_of(const Batch& batch, const KnownRows& known, const std::vector<PrefixUse>& uses,
                     const ForwardReport& report) {
  AnswerSizes sizes;
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
    behind = std::max(behind, batch.width - span.first - span.tokens);
  }
  sizes.padding = std::max(behind, in_front);
  if (report.execution != Execution::kNone) {
    const bool packed = report.execution == Execution::kPacked;
    add(packed ? Kind::kPackedWidth : Kind::kDenseWidth, batch.width);
    add(packed ? Kind::kPackedRows : Kind::kDenseRows, batch.rows);
    sizes.reused = packed && sizes.padding > 0;
  }
  if (behind > 0) add(Kind::kPadding, behind + 1);
  if (in_front > 0) add(Kind::kLeftPadding, in_front + 1);
  if (batch.largest_mark > 1) add(Kind::kMarks, batch.largest_mark);
  for (const PrefixUse& use : uses) {
    const auto served = size_class(batch.spans[static_cast<std::size_t>(use.row)].tokens);
    sizes.codes.emplace_back(Kind::kPrefix, use.shortest, served);
    sizes.codes.emplace_back(Kind::kPrefix, use.longest, served);
    sizes.reused = true;
  }
  for (std::size_t r = 0; r < report.sequences.size(); ++r) {
    const SequenceReport& sequence = report.sequences[r];
    if (sequence.shared_tokens > 0 || sequence.source == Source::kPrefix) {
      add(Kind::kPrefix, sizes.longest, sequence.tokens);  // from a row of this batch, at most
      sizes.reused = true;
    }
    const auto* entry = known.entries.empty() ? nullptr : known.entries[r].get();
    if (entry == nullptr) continue;
    const bool same_call = batch.rows == 1 && entry->rows() == 1 && entry->width() == batch.width;
    if (same_call) continue;  // the plain model would be given just what it was given then
    sizes.codes.emplace_back(Kind::kMatchRows, entry->rows_class(), size_class(batch.rows));
    sizes.codes.emplace_back(Kind::kMatchWidth, entry->width_class(), size_class(batch.width));
    sizes.reused = true;
  }
  return sizes;
}

std::vector<Difference> differences(const c10::IValue& answer, const c10::IValue& plain, const OutputSpec& spec,
                                    const Batch& batch, Output output, const ForwardReport& report) {
  std::vector<Difference> found;
  const auto add = [&](Mechanism mechanism, const std::string& what) {
    const bool known = std::any_of(found.begin(), found.end(), [&](const auto& d) { return d.mechanism == mechanism; });
    if (!known) found.push_back({mechanism, what});
  };
  if (!spec.per_row) {
    const auto a = tensors_of(answer);
    const auto b = tensors_of(plain);
    for (std::size_t i = 0; i < b.size(); ++i) {
      const double off = i < a.size() ? relative_difference(a[i], b[i]) : std::numeric_limits<double>::infinity();
      if (off > answer_tolerance(b[i].scalar_type())) {
        add(report.execution == Execution::kPacked ? Mechanism::kPacked : Mechanism::kDense,
            fmt::format("tensor {} of a batch of {} rows of {} tokens is off by {:.2g} of its scale", i, batch.rows,
                        batch.width, off));
      }
    }
    return found;
  }
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const auto r = static_cast<std::size_t>(row);
    const SequenceReport& sequence = report.sequences[r];
    if (!is_checkable(sequence)) continue;
    const RowSpan& span = batch.spans[r];
    const bool whole = output == Output::kAll && batch.contiguous;
    const auto part = [&](const c10::IValue& result) {
      // What was cut has its tokens in front, and zeros behind them.
      return row_of(result, spec, row, whole ? span.first : 0, whole ? span.tokens : 0, whole ? batch.width : -1);
    };
    const auto a = part(answer);
    const auto b = part(plain);
    for (std::size_t i = 0; i < b.size(); ++i) {
      const double off = i < a.size() ? relative_difference(a[i], b[i]) : std::numeric_limits<double>::infinity();
      if (off <= answer_tolerance(b[i].scalar_type())) continue;
      add(mechanism_of(sequence, report.execution),
          fmt::format("a sequence of {} tokens, {} of them known, in a batch of {} rows of {} is off by {:.2g} of its "
                      "scale",
                      sequence.tokens, sequence.reused_tokens + sequence.shared_tokens, batch.rows, batch.width, off));
    }
  }
  return found;
}

}  // namespace llmcache
