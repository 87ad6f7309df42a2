#include "bank/output_bank.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <exception>

#include "bank/tensor_bytes.h"

namespace llmcache {
namespace {

/// The policy of this bank, LRU, looks at no clock.
constexpr double kNoTime = 0;
/// What an entry takes beside its tensors and its key, with its places in index, policy and ledger.
constexpr std::size_t kOutputBeside = sizeof(OutputEntry) + 256;

}  // namespace

std::size_t OutputBank::Hash::operator()(std::string_view key) const noexcept {
  return XXH3_64bits(key.data(), key.size());
}

OutputBank::OutputBank(std::size_t capacity_bytes, MemoryAccount* total)
    : CapacityBank(capacity_bytes, {}, total), entries_(&memory_), slots_(&memory_) {}

const std::uint32_t* OutputBank::slot_of(std::string_view key) const {
  const auto it = slots_.find(key);
  return it == slots_.end() ? nullptr : &it->second;
}

std::shared_ptr<const OutputEntry> OutputBank::find(std::string_view key, bool exact) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const std::uint32_t* const slot = slot_of(key);
  if (slot == nullptr || (exact && !entries_[*slot]->exact())) return nullptr;
  touch(*slot, kNoTime);
  return entries_[*slot];
}

bool OutputBank::holds_as_good(std::string_view key, bool exact) const {
  const std::uint32_t* const slot = slot_of(key);
  return slot != nullptr && (entries_[*slot]->exact() || !exact);
}

bool OutputBank::holds(std::string_view key, bool exact) {
  const std::lock_guard lock(mutex_);
  drop_aged();
  return holds_as_good(key, exact);
}

void OutputBank::insert(std::string_view key, const std::vector<at::Tensor>& tensors, bool exact,
                        const BatchSize& computed_in, const std::vector<char>& own) {
  std::size_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += taken_bytes(tensor) + kTensorOverhead;
  std::optional<Reservation> reserved;
  {
    const std::lock_guard lock(mutex_);
    drop_aged();
    if (holds_as_good(key, exact)) return;
    reserved = make_room(key, bytes, key.size() + kOutputBeside, kNoTime);
    if (!reserved) {
      count_rejected(key);
      return;
    }
  }
  // Copying is the long part: done without the lock, with its bytes already reserved.
  std::vector<at::Tensor> copies;
  try {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const bool as_it_is = i < own.size() && own[i] != 0;
      copies.push_back(as_it_is ? tensors[i].variable_data() : tensors[i].clone(at::MemoryFormat::Preserve));
    }
  } catch (const std::exception&) {
    const std::lock_guard lock(mutex_);
    count_rejected(key);
    return;
  }
  const std::lock_guard lock(mutex_);
  if (holds_as_good(key, exact)) return;  // somebody was faster
  if (const std::uint32_t* const slot = slot_of(key)) remove(*slot);
  std::shared_ptr<const OutputEntry> entry;
  const bool kept = take_evicting(key, kNoTime, [&] {
    if (!entry) {
      const std::pmr::polymorphic_allocator<OutputEntry> allocator(&memory_);
      entry = std::allocate_shared<OutputEntry>(allocator, key, copies, exact, computed_in, *reserved, &memory_);
      copies.clear();
    }
    insert_indexed(entry);
  });
  if (kept) {
    ++insertions_;
  } else {
    count_rejected(key);
  }
}

void OutputBank::count_rejected(std::string_view key) noexcept {
  ++rejected_;
  evicted_.add(Hash{}(key), refused_);
}

void OutputBank::remember(std::uint32_t slot, EvictedKeys::Cause cause) noexcept {
  evicted_.add(Hash{}(entries_[slot]->key()), cause);
}

std::optional<EvictedKeys::Cause> OutputBank::why_gone(std::string_view key) const {
  const std::lock_guard lock(mutex_);
  if (evicted_.empty() || slot_of(key) != nullptr) return std::nullopt;
  return evicted_.find(Hash{}(key));
}

/// Makes the entry findable, or throws std::bad_alloc and changes nothing.
void OutputBank::insert_indexed(const std::shared_ptr<const OutputEntry>& entry) {
  const std::uint32_t slot = entries_.insert(entry);
  try {
    slots_.emplace(entry->key(), slot);
    enter(slot, entry->key(), {}, kNoTime);
  } catch (...) {
    remove(slot);
    throw;
  }
}

void OutputBank::remove(std::uint32_t slot) noexcept {
  slots_.erase(entries_[slot]->key());
  leave(slot);
  entries_.erase(slot);
}

void OutputBank::remove_all() noexcept {
  Slots(&memory_).swap(slots_);
  entries_.clear();
}

std::vector<std::weak_ptr<const OutputEntry>> OutputBank::listed() {
  const std::lock_guard lock(mutex_);
  drop_aged();
  const auto slots = policy_.order();
  std::vector<std::weak_ptr<const OutputEntry>> entries;
  for (auto slot = slots.rbegin(); slot != slots.rend(); ++slot) entries.emplace_back(entries_[*slot]);
  return entries;
}

BankCounters OutputBank::counters() const {
  const std::lock_guard lock(mutex_);
  return current();
}

}  // namespace llmcache
