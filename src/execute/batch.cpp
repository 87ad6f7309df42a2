#include "execute/batch.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "llmcache/error.h"

namespace llmcache {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidInput, what); }

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

Batch check_batch(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device) {
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
  return batch;
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
  return part;
}

}  // namespace llmcache
