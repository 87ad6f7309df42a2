#include "bank/token_entry.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <utility>

#include "bank/tensor_bytes.h"

namespace llmcache {

std::size_t StateLayout::bytes(std::int64_t tokens) const {
  std::size_t sum = 0;
  for (const Spec& spec : specs) {
    std::size_t own = static_cast<std::size_t>(tokens) * spec.options.dtype().itemsize();
    for (const std::int64_t size : spec.sizes) own *= static_cast<std::size_t>(size);
    sum += taken_bytes(own, spec.options.device()) + kTensorOverhead;
  }
  return sum;
}

EncodedTensor::EncodedTensor(const at::Tensor& rows, BankFormat format) {
  const auto stored = StoredStates::bytes_for(rows.sizes(), rows.options(), format) + kTensorOverhead;
  // Where a row is short its scales take more than what the values save.
  if (format == BankFormat::kAsComputed || rows.dim() < 2 || stored >= taken_bytes(rows)) {
    rows_ = rows;
    return;
  }
  const c10::InferenceMode normal(false);
  stored_ = StoredStates::encode(rows, 0, format);
}

std::size_t EncodedTensor::bytes() const {
  return rows_.defined() ? taken_bytes(rows_) + kTensorOverhead : stored_.bytes() + 2 * kTensorOverhead;
}

std::vector<at::Tensor> EncodedTensor::held() const {
  if (rows_.defined()) return {rows_};
  std::vector<at::Tensor> parts = {stored_.values()};
  if (stored_.scales().defined()) parts.push_back(stored_.scales());
  return parts;
}

PendingEntry::PendingEntry(const StateLayout& layout, std::int64_t tokens, Reservation reserved)
    : reserved_(std::move(reserved)), tokens_(tokens), final_(static_cast<std::size_t>(layout.hidden.back())) {
  for (const StateLayout::Spec& spec : layout.specs) {
    auto sizes = spec.sizes;
    sizes.insert(sizes.begin(), tokens);
    tensors_.push_back(at::empty(sizes, spec.options));
  }
}

TokenEntry::TokenEntry(const StateLayout& layout, PendingEntry& pending, const TokenView& tokens,
                       const std::vector<std::uint16_t>& counts, Reservation& reserved,
                       std::pmr::memory_resource* memory)
    : layout_(layout),
      values_(tokens.values.begin(), tokens.values.end(), memory),
      ids_per_token_(tokens.ids_per_token),
      counts_(counts.begin(), counts.end(), memory),
      encoded_(memory) {
  encoded_.reserve(pending.tensors_.size());
  std::size_t bytes = 0;
  for (const at::Tensor& tensor : pending.tensors_) bytes += encoded_.emplace_back(tensor, layout.format).bytes();
  // Nothing throws from here on: what is pending was whole until now.
  pending.tensors_.clear();
  reserved_ = std::move(reserved);
  reserved_.shrink_to(bytes);
}

TokenEntry::TokenEntry(const StateLayout& layout, std::vector<EncodedTensor> tensors, const TokenView& tokens,
                       const std::vector<std::uint16_t>& counts, Reservation& reserved,
                       std::pmr::memory_resource* memory)
    : layout_(layout),
      values_(tokens.values.begin(), tokens.values.end(), memory),
      ids_per_token_(tokens.ids_per_token),
      counts_(counts.begin(), counts.end(), memory),
      encoded_(tensors.begin(), tensors.end(), memory) {
  reserved_ = std::move(reserved);
}

at::Tensor TokenEntry::keys(std::int32_t layer, std::int64_t attention_op, std::size_t input) const {
  return rows(layout_.first_key[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)] + input);
}

at::Tensor TokenEntry::hidden(std::int32_t layer) const {
  const int spec = layout_.hidden[static_cast<std::size_t>(layer)];
  return spec < 0 ? at::Tensor() : rows(static_cast<std::size_t>(spec));
}

}  // namespace llmcache
