#include "bank/tensor_record.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <array>
#include <cstring>
#include <utility>

namespace llmcache {
namespace {

constexpr std::array<std::pair<NumberType, at::ScalarType>, 10> kNumberTypes = {{
    {NumberType::kUInt8, at::kByte},
    {NumberType::kInt8, at::kChar},
    {NumberType::kInt16, at::kShort},
    {NumberType::kInt32, at::kInt},
    {NumberType::kInt64, at::kLong},
    {NumberType::kFloat16, at::kHalf},
    {NumberType::kBFloat16, at::kBFloat16},
    {NumberType::kFloat32, at::kFloat},
    {NumberType::kFloat64, at::kDouble},
    {NumberType::kBool, at::kBool},
}};

/// Of its numbers, wherever they lie.
std::size_t number_bytes(const at::Tensor& tensor) {
  return static_cast<std::size_t>(tensor.numel()) * tensor.element_size();
}

/// Gives the numbers of tensors, one after the other, to a sink. Copies one tensor at a time.
template <class Sink>
void give_numbers(const std::vector<at::Tensor>& tensors, const Sink& sink) {
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    const at::Tensor own = tensor.detach().to(at::kCPU).contiguous().resolve_conj().resolve_neg();
    sink(static_cast<const char*>(own.const_data_ptr()), number_bytes(own));
  }
}

/// A view of the record's bytes, which must live as long.
at::Tensor view_of(const TensorRecord& record) {
  // Nobody writes to it.
  return at::from_blob(const_cast<char*>(record.bytes.data()), record.sizes, at::dtype(type_of(record)));
}

}  // namespace

std::optional<TensorRecord> record_of(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_quantized()) return std::nullopt;
  for (const auto& [number, scalar] : kNumberTypes) {
    if (scalar == tensor.scalar_type()) return TensorRecord{number, tensor.sizes().vec(), {}};
  }
  return std::nullopt;
}

std::optional<std::vector<TensorRecord>> records_of(const std::vector<at::Tensor>& tensors) {
  std::vector<TensorRecord> records;
  for (const at::Tensor& tensor : tensors) {
    auto record = record_of(tensor);
    if (!record) return std::nullopt;
    records.push_back(std::move(*record));
  }
  return records;
}

void write_entry(SnapshotWriter& writer, FrameKind kind, const std::string& entry,
                 const std::vector<at::Tensor>& tensors) {
  std::uint64_t bytes = entry.size();
  for (const at::Tensor& tensor : tensors) bytes += number_bytes(tensor);
  writer.begin(kind, bytes);
  writer.add(entry);
  give_numbers(tensors, [&](const char* data, std::size_t size) { writer.add(data, size); });
  writer.end();
}

void append_entry(std::string& to, const std::string& entry, const std::vector<at::Tensor>& tensors) {
  std::size_t bytes = entry.size();
  for (const at::Tensor& tensor : tensors) bytes += number_bytes(tensor);
  to.reserve(to.size() + bytes);
  to += entry;
  give_numbers(tensors, [&](const char* data, std::size_t size) { to.append(data, size); });
}

bool has_form(const TensorRecord& record, at::IntArrayRef sizes, at::ScalarType type) {
  return type_of(record) == type && at::IntArrayRef(record.sizes) == sizes;
}

at::ScalarType type_of(const TensorRecord& record) {
  for (const auto& [number, scalar] : kNumberTypes) {
    if (number == record.type) return scalar;
  }
  return at::ScalarType::Undefined;
}

at::Tensor tensor_of(const TensorRecord& record, at::Device device) {
  const c10::InferenceMode normal(false);
  at::Tensor tensor = at::empty(record.sizes, at::dtype(type_of(record)).device(device));
  copy_record(record, tensor);
  return tensor;
}

void copy_record(const TensorRecord& record, const at::Tensor& target) {
  if (target.numel() == 0) return;
  if (target.is_cpu() && target.is_contiguous()) {
    std::memcpy(target.mutable_data_ptr(), record.bytes.data(), record.bytes.size());
  } else if (reinterpret_cast<std::uintptr_t>(record.bytes.data()) % target.element_size() == 0) {
    target.copy_(view_of(record));
  } else {
    const std::string aligned(record.bytes);
    TensorRecord moved = record;
    moved.bytes = aligned;
    target.copy_(view_of(moved));
  }
}

}  // namespace llmcache
