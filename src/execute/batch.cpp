#include "execute/batch.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <exception>

#include "llmcache/error.h"

namespace llmcache {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidInput, what); }

struct Range {
  std::int64_t least = 0, largest = 0;
};

/// Of all numbers of an input that is not empty.
Range range_of(const at::Tensor& tensor) {
  const auto numbers = tensor.to(at::kCPU, at::kLong).contiguous();
  const std::int64_t* number = numbers.const_data_ptr<std::int64_t>();
  Range range{number[0], number[0]};
  for (std::int64_t i = 1, n = numbers.numel(); i < n; ++i) {
    range.least = std::min(range.least, number[i]);
    range.largest = std::max(range.largest, number[i]);
  }
  return range;
}

/// Numbers that no probe holds: what the library found out about the model says nothing about them.
void look_at_values(Batch& batch, const InputSpec& spec, int mask_argument) {
  if (batch.rows * batch.width == 0) return;
  for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
    if (!batch.inputs[i].isTensor()) continue;
    const Range range = range_of(batch.inputs[i].toTensor());
    const std::int64_t vocabulary = spec.vocabulary_known && i < spec.vocabulary.size() ? spec.vocabulary[i] : 0;
    if (static_cast<int>(i) == mask_argument) {
      if (range.least >= 0 && range.largest <= 1) continue;
      batch.plain_only = fmt::format("the mask ('{}') holds other numbers than 0 and 1: {} to {}", spec.names[i],
                                     range.least, range.largest);
    } else if (vocabulary > 0 && (range.least < 0 || range.largest >= vocabulary)) {
      batch.plain_only = fmt::format("'{}' holds {}, the model's embedding has the ids 0 to {}", spec.names[i],
                                     range.least < 0 ? range.least : range.largest, vocabulary - 1);
    } else if (vocabulary == 0 && spec.vocabulary_known) {
      constexpr std::int64_t kMost = std::int64_t{1} << 40;
      batch.largest_mark = std::max({batch.largest_mark, std::min(range.largest, kMost), -std::max(range.least, -kMost)});
    }
  }
}

void find_spans(Batch& batch, int mask_argument) {
  batch.spans.assign(static_cast<std::size_t>(batch.rows), {0, batch.width});
  batch.tokens = batch.rows * batch.width;
  if (mask_argument < 0 || batch.tokens == 0) return;
  const c10::IValue& given = batch.inputs[static_cast<std::size_t>(mask_argument)];
  if (given.isNone()) return;
  const auto real = given.toTensor().ne(0).cpu().contiguous();
  const bool* cell = real.const_data_ptr<bool>();
  batch.tokens = 0;
  for (RowSpan& span : batch.spans) {
    const bool* end = cell + batch.width;
    const bool* first = std::find(cell, end, true);
    const std::int64_t count = std::count(first, end, true);
    span = {count == 0 ? 0 : first - cell, count};
    if (count > 0) {
      const bool* hole = std::find(first, end, false);
      if (hole - first != count) batch.contiguous = false;
      if (first != cell) batch.right_padded = false;
    }
    if (count != batch.width) batch.padded = true;
    batch.tokens += count;
    cell = end;
  }
}

}  // namespace

namespace {

Batch checked(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device) {
  const std::size_t declared = spec.names.size();
  std::size_t required = declared;
  while (required > 0 && spec.optional[required - 1]) --required;
  if (inputs.size() < required || inputs.size() > declared) {
    invalid(fmt::format("{} inputs given, {} expected: {}", inputs.size(),
                        required == declared ? std::to_string(declared) : fmt::format("{} to {}", required, declared),
                        fmt::join(spec.names, ", ")));
  }
  Batch batch;
  batch.inputs = inputs;
  batch.inputs.resize(declared);
  const auto describe = [&](std::size_t i) { return fmt::format("input {} ('{}')", i, spec.names[i]); };
  const auto ids = static_cast<std::size_t>(profile.ids_argument);
  for (std::size_t turn = 0; turn < declared; ++turn) {
    // The ids first: the others must have their shape.
    const std::size_t i = turn == 0 ? ids : turn <= ids ? turn - 1 : turn;
    const c10::IValue& value = batch.inputs[i];
    if (value.isNone()) {
      if (!spec.optional[i] || i == ids) invalid(describe(i) + " is None, a tensor [batch, tokens] is expected");
      continue;
    }
    if (!value.isTensor()) {
      invalid(fmt::format("{} is a {}, a tensor [batch, tokens] is expected", describe(i), value.tagKind()));
    }
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined()) invalid(describe(i) + " is an undefined tensor, a tensor [batch, tokens] is expected");
    const auto type = tensor.scalar_type();
    if (!at::isIntegralType(type, /*includeBool=*/true)) {
      invalid(fmt::format("{} has type {}, an integer type (int64) is expected", describe(i), c10::toString(type)));
    }
    if (tensor.layout() != at::kStrided || tensor.is_nested()) {
      invalid(fmt::format("{} is {}; a dense tensor is expected (to_dense(), to_padded_tensor())", describe(i),
                          tensor.is_nested() ? "a nested tensor" : fmt::format("of layout {}", c10::str(tensor.layout()))));
    }
    if (tensor.dim() != 2) {
      invalid(fmt::format("{} has {} dimensions [{}], 2 are expected: [batch, tokens]", describe(i), tensor.dim(),
                          fmt::join(tensor.sizes().vec(), ", ")));
    }
    if (tensor.device() != device) {
      invalid(fmt::format("{} is on {}, the model on {}; move the input there", describe(i), tensor.device().str(),
                          device.str()));
    }
    if (i == ids) {
      batch.rows = tensor.size(0);
      batch.width = tensor.size(1);
    } else if (tensor.size(0) != batch.rows || tensor.size(1) != batch.width) {
      invalid(fmt::format("{} is [{}, {}], but {} is [{}, {}]; both must have one entry a token", describe(i),
                          tensor.size(0), tensor.size(1), describe(ids), batch.rows, batch.width));
    }
  }
  find_spans(batch, profile.mask_argument);
  look_at_values(batch, spec, profile.mask_argument);
  return batch;
}

}  // namespace

Batch check_batch(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device) {
  try {
    return checked(inputs, spec, profile, device);
  } catch (const c10::Error& error) {
    // Memory, or a kind of tensor whose values cannot be read.
    std::throw_with_nested(Error(ErrorCode::kInvalidInput, fmt::format("the inputs cannot be read: {}",
                                                                       error.what_without_backtrace())));
  }
}

Plan Batch::full_plan(std::int32_t layers) const {
  Plan plan{rows, width, layers, {}};
  for (std::int64_t row = 0; row < rows; ++row) {
    const RowSpan& span = spans[static_cast<std::size_t>(row)];
    if (span.tokens > 0) plan.sequences.push_back(compute_all(row, span.first, span.tokens, layers));
  }
  return plan;
}

std::size_t Batch::input_bytes() const {
  std::size_t bytes = 0;
  for (const c10::IValue& input : inputs) bytes += input.isTensor() ? input.toTensor().nbytes() : 0;
  return bytes;
}

Batch Batch::select(const std::vector<std::int64_t>& chosen) const {
  Batch part;
  part.rows = static_cast<std::int64_t>(chosen.size());
  part.width = width;
  for (const c10::IValue& input : inputs) {
    if (!input.isTensor()) {
      part.inputs.push_back(input);
      continue;
    }
    const at::Tensor& tensor = input.toTensor();
    const auto index = at::tensor(chosen, at::TensorOptions().dtype(at::kLong)).to(tensor.device());
    part.inputs.emplace_back(tensor.index_select(0, index));
  }
  for (const std::int64_t row : chosen) {
    const RowSpan& span = spans[static_cast<std::size_t>(row)];
    part.spans.push_back(span);
    part.tokens += span.tokens;
    part.padded = part.padded || span.tokens != width;
    part.right_padded = part.right_padded && (span.tokens == 0 || span.first == 0);
  }
  part.contiguous = contiguous;
  part.plain_only = plain_only;
  part.largest_mark = largest_mark;
  return part;
}

}  // namespace llmcache
