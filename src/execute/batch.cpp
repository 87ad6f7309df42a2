#include "execute/batch.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <exception>

#include "bank/tenant_key.h"
#include "llmcache/error.h"
#include "model/index_tensor.h"
#include "model/wrapped_model.h"

namespace llmcache {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidInput, what); }

struct Range {
  std::int64_t least = 0, largest = 0;
};

/// Of all numbers of an input that is not empty, on the host.
Range range_of(const at::Tensor& numbers) {
  const std::int64_t* number = numbers.const_data_ptr<std::int64_t>();
  const auto [least, largest] = std::minmax_element(number, number + numbers.numel());
  return {*least, *largest};
}

/// Throws if a real token has a number that the embedding has no row for.
void refuse_outside(const Batch& batch, std::size_t input, const std::string& name, std::int64_t vocabulary,
                    int mask_argument) {
  const at::Tensor& numbers = batch.on_host[input];
  const std::int64_t length = numbers.size(1);
  const std::int64_t* number = numbers.const_data_ptr<std::int64_t>();
  const at::Tensor real = mask_argument >= 0 ? batch.on_host[static_cast<std::size_t>(mask_argument)] : at::Tensor();
  for (std::int64_t i = 0; i < numbers.numel(); ++i) {
    if (number[i] >= 0 && number[i] < vocabulary) continue;
    if (real.defined() && real.const_data_ptr<std::int64_t>()[i] == 0) continue;
    invalid(fmt::format("'{}' holds {} in row {} at position {}; the model's embedding has the ids 0 to {}", name,
                        number[i], i / length, i % length, vocabulary - 1));
  }
}

void refuse_too_long(const Batch& batch, const InputSpec& spec, const ModelProfile& profile) {
  const auto refuse_beyond = [](std::int64_t most, std::int64_t tokens, const char* what) {
    if (most <= 0 || tokens <= most) return;
    invalid(
        fmt::format("{} have {} tokens with their padding, the program was exported for at most {}; cut them, or "
                    "export it for more",
                    what, tokens, most));
  };
  const auto refuse = [&](const char* what, std::size_t row, std::int64_t tokens, std::int64_t most) {
    if (most <= 0 || tokens <= most) return;
    invalid(fmt::format("{} {} has {} tokens, the model has positions for {}; cut it, or split the text", what, row,
                        tokens, most));
  };
  refuse_beyond(spec.most_tokens, batch.padded_length, "rows");
  refuse_beyond(spec.most_source_tokens, batch.source.padded_length, "sources");
  for (std::size_t row = 0; row < batch.spans.size(); ++row) {
    refuse("row", row, batch.spans[row].tokens, profile.max_tokens);
  }
  for (std::size_t row = 0; row < batch.source.tokens.size(); ++row) {
    refuse("source", row, batch.source.tokens[row], profile.max_source_tokens);
  }
}

/// Numbers that no probe holds: what the library found out about the model says nothing about them.
void look_at_values(Batch& batch, const InputSpec& spec, const ModelProfile& profile) {
  for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
    if (!batch.on_host[i].defined() || batch.on_host[i].numel() == 0) continue;
    const int mask_argument = spec.is_source(i) ? profile.source_mask_argument : profile.mask_argument;
    const Range range = range_of(batch.on_host[i]);
    const std::int64_t vocabulary = spec.vocabulary_known && i < spec.vocabulary.size() ? spec.vocabulary[i] : 0;
    if (static_cast<int>(i) == mask_argument) {
      if (range.least >= 0 && range.largest <= 1) continue;
      batch.plain_only = fmt::format("the mask ('{}') holds other numbers than 0 and 1: {} to {}", spec.names[i],
                                     range.least, range.largest);
    } else if (vocabulary > 0 && (range.least < 0 || range.largest >= vocabulary)) {
      refuse_outside(batch, i, spec.names[i], vocabulary, mask_argument);
      batch.plain_only = fmt::format("'{}' holds {} at padding, the model's embedding has the ids 0 to {}",
                                     spec.names[i], range.least < 0 ? range.least : range.largest, vocabulary - 1);
    } else if (vocabulary == 0 && spec.vocabulary_known) {
      constexpr std::int64_t kMost = std::int64_t{1} << 40;
      batch.largest_mark =
          std::max({batch.largest_mark, std::min(range.largest, kMost), -std::max(range.least, -kMost)});
    }
  }
}

at::Device device_of_inputs(const Inputs& inputs) {
  for (const c10::IValue& input : inputs) {
    if (input.isTensor()) return input.toTensor().device();
  }
  return at::kCPU;
}

/// Tensors of a device on the host, as int64, by one copy.
std::vector<at::Tensor> copied_to_host(const Inputs& inputs) {
  std::vector<at::Tensor> flat;
  for (const c10::IValue& input : inputs) {
    if (input.isTensor()) flat.push_back(input.toTensor().to(at::kLong).flatten());
  }
  if (flat.empty()) return std::vector<at::Tensor>(inputs.size());
  const at::Tensor all = (flat.size() == 1 ? flat[0] : at::cat(flat)).to(at::kCPU);
  std::vector<at::Tensor> copied;
  std::int64_t at = 0;
  for (const c10::IValue& input : inputs) {
    if (!input.isTensor()) {
      copied.emplace_back();
      continue;
    }
    const at::Tensor& own = input.toTensor();
    copied.push_back(all.narrow(0, at, own.numel()).view(own.sizes()));
    at += own.numel();
  }
  return copied;
}

void read_on_host(Batch& batch) {
  for (const c10::IValue& input : batch.inputs) {
    batch.types.push_back(input.isTensor() ? static_cast<char>(input.toTensor().scalar_type()) : static_cast<char>(-1));
  }
  if (!device_of_inputs(batch.inputs).is_cpu()) {
    batch.on_host = copied_to_host(batch.inputs);
    return;
  }
  for (const c10::IValue& input : batch.inputs) {
    batch.on_host.push_back(input.isTensor() ? input.toTensor().to(at::kLong).contiguous() : at::Tensor());
  }
}

void append_bytes(std::string& text, const void* data, std::size_t bytes) {
  text.append(static_cast<const char*>(data), bytes);
}

void append_number(std::string& text, std::int64_t number) { append_bytes(text, &number, sizeof(number)); }

/// Not the beginning of another tenant's.
std::string tenant_key(const std::string& tenant) {
  std::string key;
  append_tenant(key, tenant);
  return key;
}

const std::int64_t* row_on_host(const Batch& batch, std::size_t input, std::int64_t row) {
  const at::Tensor& all = batch.on_host[input];
  return all.defined() ? all.const_data_ptr<std::int64_t>() + row * all.size(1) : nullptr;
}

/// All of a row's source that decides anything, and how much that is.
void append_source(std::string& text, const Batch& batch, std::int64_t row) {
  const BatchSource& source = batch.source;
  if (source.inputs.empty()) return;
  const std::int64_t tokens = source.tokens[static_cast<std::size_t>(row)];
  append_number(text, tokens);
  for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
    const std::int64_t* values = source.has(i) ? row_on_host(batch, i, row) : nullptr;
    if (values != nullptr) append_bytes(text, values, static_cast<std::size_t>(tokens) * sizeof(std::int64_t));
  }
}

/// Tokens of each row's source up to the last real one. A row without any has all of them.
void find_source_tokens(Batch& batch, int mask_argument) {
  BatchSource& source = batch.source;
  if (source.inputs.empty()) return;
  source.tokens.assign(static_cast<std::size_t>(batch.rows), source.padded_length);
  if (mask_argument < 0) return;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const std::int64_t* cell = row_on_host(batch, static_cast<std::size_t>(mask_argument), row);
    if (cell == nullptr) return;
    std::int64_t end = source.padded_length;
    while (end > 0 && cell[end - 1] == 0) --end;
    if (end > 0) source.tokens[static_cast<std::size_t>(row)] = end;
  }
}

void find_spans(Batch& batch, int mask_argument) {
  batch.spans.assign(static_cast<std::size_t>(batch.rows), {0, batch.padded_length});
  batch.tokens = batch.rows * batch.padded_length;
  if (mask_argument < 0 || batch.tokens == 0) return;
  const at::Tensor& mask = batch.on_host[static_cast<std::size_t>(mask_argument)];
  if (!mask.defined()) return;
  const std::int64_t* cell = mask.const_data_ptr<std::int64_t>();
  const auto is_real = [](std::int64_t value) { return value != 0; };
  batch.tokens = 0;
  for (RowSpan& span : batch.spans) {
    const std::int64_t* end = cell + batch.padded_length;
    const std::int64_t* first = std::find_if(cell, end, is_real);
    const std::int64_t count = std::count_if(first, end, is_real);
    span = {count == 0 ? 0 : first - cell, count};
    if (count > 0) {
      const std::int64_t* hole = std::find(first, end, 0);
      if (hole - first != count) batch.contiguous = false;
      if (first != cell) batch.right_padded = false;
    }
    if (count != batch.padded_length) batch.padded = true;
    batch.tokens += count;
    cell = end;
  }
}

}  // namespace

namespace {

/// Throws unless it is a tensor of ids, marks or the like.
void check_tensor(const c10::IValue& value, const std::string& described, bool only_int64, at::Device device) {
  if (!value.isTensor()) {
    invalid(fmt::format("{} is a {}, a tensor [batch, tokens] is expected", described, value.tagKind()));
  }
  const at::Tensor& tensor = value.toTensor();
  if (!tensor.defined()) invalid(described + " is an undefined tensor, a tensor [batch, tokens] is expected");
  const auto type = tensor.scalar_type();
  if (!at::isIntegralType(type, /*includeBool=*/true)) {
    invalid(fmt::format("{} has type {}, an integer type (int64) is expected", described, c10::toString(type)));
  }
  if (only_int64 && type != at::kLong) {
    invalid(fmt::format("{} has type {}, the program was exported for int64 (Long); convert it", described,
                        c10::toString(type)));
  }
  if (tensor.layout() != at::kStrided || tensor.is_nested()) {
    invalid(
        fmt::format("{} is {}; a dense tensor is expected (to_dense(), to_padded_tensor())", described,
                    tensor.is_nested() ? "a nested tensor" : fmt::format("of layout {}", c10::str(tensor.layout()))));
  }
  if (tensor.dim() != 2) {
    invalid(fmt::format("{} has {} dimensions [{}], 2 are expected: [batch, tokens]", described, tensor.dim(),
                        fmt::join(tensor.sizes().vec(), ", ")));
  }
  if (tensor.device() != device) {
    invalid(fmt::format("{} is on {}, the model on {}; move the input there", described, tensor.device().str(),
                        device.str()));
  }
}

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
  if (spec.has_source()) batch.source.inputs.assign(spec.source.begin(), spec.source.end());
  std::size_t first_of_source = declared;
  for (std::size_t round = 0; round < declared; ++round) {
    // The ids first: the others must have their shape.
    const std::size_t i = round == 0 ? ids : round <= ids ? round - 1 : round;
    const c10::IValue& value = batch.inputs[i];
    if (value.isNone()) {
      if (!spec.optional[i] || i == ids) invalid(describe(i) + " is None, a tensor [batch, tokens] is expected");
      continue;
    }
    check_tensor(value, describe(i), spec.only_int64, device);
    const at::Tensor& tensor = value.toTensor();
    const bool of_source = spec.is_source(i);
    if (i == ids) {
      batch.rows = tensor.size(0);
      batch.padded_length = tensor.size(1);
    } else if (of_source && first_of_source == declared && tensor.size(0) == batch.rows) {
      first_of_source = i;
      batch.source.padded_length = tensor.size(1);
    } else if (tensor.size(0) != batch.rows ||
               tensor.size(1) != (of_source ? batch.source.padded_length : batch.padded_length)) {
      const bool rows_only = of_source && first_of_source == declared;
      const std::size_t like = of_source && !rows_only ? first_of_source : ids;
      invalid(fmt::format("{} is [{}, {}], but {} is [{}, {}]; both must have {}", describe(i), tensor.size(0),
                          tensor.size(1), describe(like), batch.rows, batch.inputs[like].toTensor().size(1),
                          rows_only ? "as many rows" : "one entry a token"));
    }
  }
  read_on_host(batch);
  find_spans(batch, profile.mask_argument);
  find_source_tokens(batch, profile.source_mask_argument);
  refuse_too_long(batch, spec, profile);
  look_at_values(batch, spec, profile);
  return batch;
}

}  // namespace

Batch check_batch(const Inputs& inputs, const InputSpec& spec, const ModelProfile& profile, at::Device device) {
  try {
    return checked(inputs, spec, profile, device);
  } catch (const c10::Error& error) {
    // Memory, or a kind of tensor whose values cannot be read.
    std::throw_with_nested(
        Error(ErrorCode::kInvalidInput, fmt::format("the inputs cannot be read: {}", error.what_without_backtrace())));
  }
}

Batch check_batch(const Inputs& inputs, const WrappedModel& wrapped) {
  Batch batch = check_batch(inputs, wrapped.inputs, wrapped.profile, wrapped.model->device());
  try {
    const at::Tensor positions = wrapped.model->read_positions(batch.inputs);
    if (!positions.defined()) return batch;
    const std::int64_t* first = positions.const_data_ptr<std::int64_t>();
    batch.read_at.assign(first, first + positions.numel());
  } catch (const std::exception&) {
    batch.read_at.assign(static_cast<std::size_t>(batch.rows), -1);  // the model raises it too, for its caller
  }
  return batch;
}

bool Batch::reads_real_token(std::int64_t row) const {
  if (read_at.empty()) return true;
  const RowSpan& span = spans[static_cast<std::size_t>(row)];
  const std::int64_t position = read_at[static_cast<std::size_t>(row)];
  return position >= span.first && position < span.first + span.tokens;
}

bool Batch::reads_real_tokens() const {
  for (std::int64_t row = 0; row < rows; ++row) {
    if (spans[static_cast<std::size_t>(row)].tokens > 0 && !reads_real_token(row)) return false;
  }
  return true;
}

Plan Batch::full_plan(std::int32_t layers) const {
  Plan plan{rows, padded_length, layers, {}};
  for (std::int64_t row = 0; row < rows; ++row) {
    const RowSpan& span = spans[static_cast<std::size_t>(row)];
    if (span.tokens > 0) plan.sequences.push_back(compute_all(row, span.first, span.tokens, layers));
  }
  return plan;
}

Inputs Batch::model_inputs() const {
  Inputs all = inputs;
  if (!source.values.empty()) all.emplace_back(source.values);
  return all;
}

std::size_t Batch::input_bytes() const {
  std::size_t bytes = 0;
  for (const c10::IValue& input : inputs) bytes += input.isTensor() ? input.toTensor().nbytes() : 0;
  return bytes;
}

Batch Batch::select(const std::vector<std::int64_t>& chosen) const {
  Batch part;
  part.rows = static_cast<std::int64_t>(chosen.size());
  part.padded_length = padded_length;
  part.types = types;
  const auto index = index_tensor(chosen, at::kCPU);
  const auto index_there = index.to(device_of_inputs(inputs), /*non_blocking=*/true);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].isTensor()) {
      part.inputs.push_back(inputs[i]);
      part.on_host.emplace_back();
      continue;
    }
    const at::Tensor& tensor = inputs[i].toTensor();
    part.inputs.emplace_back(tensor.index_select(0, index_there));
    const bool shared = tensor.is_cpu() && tensor.scalar_type() == at::kLong;
    part.on_host.push_back(shared ? part.inputs.back().toTensor() : on_host[i].index_select(0, index));
  }
  for (const std::int64_t row : chosen) {
    const RowSpan& span = spans[static_cast<std::size_t>(row)];
    part.spans.push_back(span);
    part.tokens += span.tokens;
    part.padded = part.padded || span.tokens != padded_length;
    part.right_padded = part.right_padded && (span.tokens == 0 || span.first == 0);
  }
  part.contiguous = contiguous;
  part.plain_only = plain_only;
  part.source.inputs = source.inputs;
  part.source.padded_length = source.padded_length;
  for (const at::Tensor& value : source.values) {
    part.source.values.push_back(value.index_select(0, index_there));
  }
  for (const std::int64_t row : chosen) {
    if (!source.tokens.empty()) part.source.tokens.push_back(source.tokens[static_cast<std::size_t>(row)]);
    if (!read_at.empty()) part.read_at.push_back(read_at[static_cast<std::size_t>(row)]);
  }
  part.largest_mark = largest_mark;
  return part;
}

std::vector<RowKey> Batch::keys(const std::string& tenant, const std::vector<char>& left_out) const {
  std::vector<std::size_t> used;
  std::string used_types;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (source.has(i) || (!left_out.empty() && left_out[i])) continue;
    used.push_back(i);
    used_types.push_back(types[i]);
  }
  std::vector<RowKey> all;
  for (std::int64_t row = 0; row < rows; ++row) {
    const RowSpan& span = spans[static_cast<std::size_t>(row)];
    if (span.tokens == 0) continue;
    RowKey& key = all.emplace_back();
    key.row = row;
    key.span = span;
    key.ids_per_token = used.size();
    key.tokens.resize(static_cast<std::size_t>(span.tokens) * used.size(), 0);
    key.partition = source.inputs.empty() ? tenant_key(tenant) : source_key(row, tenant);
    key.partition += used_types;
    // Padding in front decides positions, in some models by what it holds.
    append_number(key.partition, span.first);
    for (std::size_t u = 0; u < used.size(); ++u) {
      const std::int64_t* values = row_on_host(*this, used[u], row);
      if (values == nullptr) continue;
      append_bytes(key.partition, values, static_cast<std::size_t>(span.first) * sizeof(std::int64_t));
      for (std::int64_t t = 0; t < span.tokens; ++t) {
        key.tokens[static_cast<std::size_t>(t) * used.size() + u] = values[span.first + t];
      }
    }
  }
  return all;
}

std::string Batch::source_key(std::int64_t row, const std::string& tenant) const {
  // The type of the target's inputs may decide numbers of the source.
  std::string key = tenant_key(tenant) + types;
  append_source(key, *this, row);
  return key;
}

std::string Batch::whole_key(std::int64_t row, const std::string& tenant, bool padding) const {
  const RowSpan& span = spans[static_cast<std::size_t>(row)];
  const std::int64_t first = padding ? 0 : span.first;
  const std::int64_t count = padding ? padded_length : span.tokens;
  std::string key;
  append_tenant(key, tenant);
  append_number(key, first);
  append_number(key, count);
  // What stands behind its tokens may decide where it is read.
  if (!read_at.empty()) append_number(key, read_at[static_cast<std::size_t>(row)]);
  key += types;
  append_source(key, *this, row);
  // Padding in front is part of it: ids there may decide positions. Padding behind is not.
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::int64_t* values = source.has(i) ? nullptr : row_on_host(*this, i, row);
    if (values != nullptr) append_bytes(key, values, static_cast<std::size_t>(first + count) * sizeof(std::int64_t));
  }
  return key;
}

}  // namespace llmcache
