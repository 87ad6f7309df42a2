#include "bank/token_entry.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "bank/tensor_bytes.h"

namespace llmcache {

std::size_t StateLayout::bytes(std::int64_t tokens) const {
  std::size_t sum = 0;
  for (const Spec& spec : specs) {
    std::size_t own = static_cast<std::size_t>(tokens) * spec.options.dtype().itemsize();
    for (const std::int64_t size : spec.sizes) own *= static_cast<std::size_t>(size);
    sum += own + kTensorOverhead;
  }
  return sum;
}

HeldTensor::HeldTensor(const at::Tensor& rows, BankFormat format) {
  const auto stored = StoredStates::bytes_for(rows.sizes(), rows.options(), format) + kTensorOverhead;
  // Where a row is short its scales take more than what the values save.
  if (format == BankFormat::kAsComputed || rows.dim() < 2 || stored >= rows.nbytes()) {
    rows_ = rows;
    return;
  }
  const c10::InferenceMode normal(false);
  stored_ = StoredStates::encode(rows, 0, format);
}

std::size_t HeldTensor::bytes() const {
  return rows_.defined() ? rows_.nbytes() + kTensorOverhead : stored_.bytes() + 2 * kTensorOverhead;
}

TokenDraft::TokenDraft(const StateLayout& layout, std::int64_t tokens, MemoryAccount& account, std::size_t bytes)
    : tokens_(tokens), final_(static_cast<std::size_t>(layout.hidden.back())), account_(account), bytes_(bytes) {
  for (const StateLayout::Spec& spec : layout.specs) {
    auto sizes = spec.sizes;
    sizes.insert(sizes.begin(), tokens);
    tensors_.push_back(at::empty(sizes, spec.options));
  }
}

TokenDraft::~TokenDraft() {
  tensors_.clear();
  account_.release(bytes_);
}

TokenEntry::TokenEntry(const StateLayout& layout, TokenDraft& draft, const TokenView& tokens,
                       const std::vector<std::uint16_t>& counts, MemoryAccount& account,
                       std::pmr::memory_resource* memory)
    : layout_(layout),
      values_(tokens.values.begin(), tokens.values.end(), memory),
      width_(tokens.width),
      counts_(counts.begin(), counts.end(), memory),
      held_(memory),
      account_(account) {
  held_.reserve(draft.tensors_.size());
  for (const at::Tensor& tensor : draft.tensors_) held_.emplace_back(tensor, layout.format);
  for (const HeldTensor& held : held_) bytes_ += held.bytes();
  // Nothing throws from here on: the draft was whole until now.
  draft.tensors_.clear();
  account_.release(draft.bytes_ - bytes_);
}

TokenEntry::~TokenEntry() {
  held_.clear();
  account_.release(bytes_);
}

at::Tensor TokenEntry::keys(std::int32_t layer, std::int64_t site, std::size_t input) const {
  return rows(layout_.first_key[static_cast<std::size_t>(layer)][static_cast<std::size_t>(site)] + input);
}

at::Tensor TokenEntry::hidden(std::int32_t layer) const {
  const int spec = layout_.hidden[static_cast<std::size_t>(layer)];
  return spec < 0 ? at::Tensor() : rows(static_cast<std::size_t>(spec));
}

}  // namespace llmcache
