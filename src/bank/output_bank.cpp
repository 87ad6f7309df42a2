#include "bank/output_bank.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include "bank/tensor_bytes.h"

namespace llmcache {

std::size_t OutputBank::Hash::operator()(std::string_view key) const noexcept {
  return XXH3_64bits(key.data(), key.size());
}

// The containers start empty and allocate nothing until the first insertion.
OutputBank::OutputBank(std::size_t capacity_bytes, MemoryAccount* total)
    : account_(capacity_bytes, total), memory_(account_), recency_(&memory_), index_(&memory_) {}

std::shared_ptr<const OutputEntry> OutputBank::find(std::string_view key, bool exact) {
  const std::lock_guard lock(mutex_);
  const auto it = index_.find(key);
  if (it == index_.end()) return nullptr;
  if (exact && !(*it->second)->exact()) return nullptr;
  recency_.splice(recency_.begin(), recency_, it->second);
  return *it->second;
}

void OutputBank::insert(std::string_view key, const std::vector<at::Tensor>& tensors, bool exact,
                        const BatchSize& computed_in) {
  std::size_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += tensor.nbytes() + kTensorOverhead;
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = index_.find(key); it != index_.end() && ((*it->second)->exact() || !exact)) return;
    if (!make_room(bytes)) {
      ++rejected_;
      return;
    }
  }
  // Copying is the long part: done without the lock, with its bytes already reserved.
  std::vector<at::Tensor> copies;
  try {
    for (const at::Tensor& tensor : tensors) copies.push_back(tensor.clone(at::MemoryFormat::Contiguous));
  } catch (const std::exception&) {
    copies.clear();
    account_.release(bytes);
    const std::lock_guard lock(mutex_);
    ++rejected_;
    return;
  }
  const std::lock_guard lock(mutex_);
  if (const auto it = index_.find(key); it != index_.end()) {
    if ((*it->second)->exact() || !exact) {  // somebody was faster
      copies.clear();
      account_.release(bytes);
      return;
    }
    erase(it->second);
  }
  std::shared_ptr<const OutputEntry> entry;
  for (;;) {
    try {
      if (!entry) {
        const std::pmr::polymorphic_allocator<OutputEntry> allocator(&memory_);
        entry =
            std::allocate_shared<OutputEntry>(allocator, key, copies, exact, computed_in, bytes, account_, &memory_);
        copies.clear();
      }
      recency_.push_front(entry);
      try {
        index_.emplace(entry->key(), recency_.begin());
      } catch (...) {
        recency_.pop_front();
        throw;
      }
      ++insertions_;
      return;
    } catch (const std::bad_alloc&) {
      if (evict_oldest()) continue;
      ++rejected_;
      if (!entry) {
        copies.clear();
        account_.release(bytes);
      }
      return;
    }
  }
}

void OutputBank::clear() {
  const std::lock_guard lock(mutex_);
  // New containers, so that the index gives back its memory too.
  index_ = std::pmr::unordered_map<std::string_view, Recency::iterator, Hash>(&memory_);
  recency_.clear();
}

OutputBank::Counters OutputBank::counters() const {
  const std::lock_guard lock(mutex_);
  return {insertions_, evictions_, rejected_, index_.size(), account_.used(), account_.peak()};
}

bool OutputBank::make_room(std::size_t bytes) {
  if (bytes > account_.limit()) return false;
  while (!account_.try_reserve(bytes)) {
    if (!evict_oldest()) return false;
  }
  return true;
}

bool OutputBank::evict_oldest() {
  if (recency_.empty()) return false;
  erase(std::prev(recency_.end()));
  ++evictions_;
  return true;
}

void OutputBank::erase(Recency::iterator it) {
  index_.erase((*it)->key());
  recency_.erase(it);
}

}  // namespace llmcache
