#include "bank/capacity_bank.h"

namespace llmcache {

// Nothing is allocated before the first insertion.
CapacityBank::CapacityBank(std::size_t capacity_bytes, const EvictionOptions& eviction, MemoryAccount* total,
                           std::size_t remembered)
    : account_(capacity_bytes, total), memory_(account_), policy_(eviction, &memory_), evicted_(remembered) {}

std::optional<Reservation> CapacityBank::make_room(std::size_t bytes, double now_s) noexcept {
  if (auto reserved = Reservation::of(account_, bytes)) return reserved;
  const std::size_t limit = account_.limit();
  if (bytes > limit || busy_bytes() > limit - bytes) return std::nullopt;
  while (evict_one(now_s)) {
    if (auto reserved = Reservation::of(account_, bytes)) return reserved;
  }
  return std::nullopt;
}

bool CapacityBank::evict_one(double now_s) noexcept {
  // An entry that must not go counts as used again, so that the policy names another one. How often is bounded: some
  // policies name it several times before they do.
  for (int attempts = 0; attempts < 64; ++attempts) {
    const auto victim = policy_.victim(now_s);
    if (!victim) return false;
    if (const std::uint32_t slot = idle_in_place_of(*victim); slot != kNoSlot) {
      evict(slot);
      return true;
    }
    policy_.hit(*victim, now_s);
  }
  std::size_t seen = 0;
  for (std::uint32_t slot = 0; seen < policy_.size(); ++slot) {
    if (!policy_.contains(slot)) continue;
    ++seen;
    if (!is_idle(slot)) continue;
    evict(slot);
    return true;
  }
  return false;
}

void CapacityBank::evict(std::uint32_t slot) noexcept {
  remember(slot);
  remove(slot);
  ++evictions_;
}

void CapacityBank::clear() {
  const std::lock_guard lock(mutex_);
  policy_.clear();
  evicted_.clear();
  remove_all();
}

void CapacityBank::reject() {
  const std::lock_guard lock(mutex_);
  ++rejected_;
}

BankCounters CapacityBank::current() const noexcept {
  return {policy_.size(), insertions_, evictions_, rejected_, account_.used(), account_.peak()};
}

}  // namespace llmcache
