#include "bank/capacity_bank.h"

#include <algorithm>
#include <utility>

#include "bank/tenant_key.h"

namespace llmcache {

// Nothing is allocated before the first insertion.
CapacityBank::CapacityBank(std::size_t capacity_bytes, const EvictionOptions& eviction, MemoryAccount* total,
                           std::size_t remembered)
    : account_(capacity_bytes, total), memory_(account_), policy_(eviction, &memory_), evicted_(remembered) {}

void CapacityBank::limit_tenants(const TenantOptions& options, std::size_t cache_capacity,
                                 std::function<double()> clock) {
  const std::lock_guard lock(mutex_);
  const double share = static_cast<double>(capacity()) / static_cast<double>(std::max<std::size_t>(cache_capacity, 1));
  ledger_.emplace(options, share, std::move(clock), &memory_);
}

std::size_t CapacityBank::room_for(std::string_view key) {
  const std::lock_guard lock(mutex_);
  const auto* const tenant = ledger_ ? ledger_->find(tenant_of(key)) : nullptr;
  return tenant == nullptr ? room() : std::min(room(), tenant->account.left());
}

std::optional<Reservation> CapacityBank::make_room(std::string_view key, std::size_t bytes, std::size_t beside,
                                                   double now_s) noexcept {
  const Asking asking(*this, key);
  refused_ = EvictedKeys::Cause::kRoom;
  if (!ledger_) return room_among_all(bytes, now_s);
  TenantLedger::Tenant* const tenant = record_of(key, now_s);
  if (tenant == nullptr) return std::nullopt;
  charged_ = tenant;
  std::optional<Reservation> reserved;
  if (charge(*tenant, bytes + beside)) {
    reserved = room_among_all(bytes, now_s);
    if (reserved) {
      reserved->charge_to(tenant->account, bytes + beside);
    } else {
      tenant->account.release(bytes + beside);
    }
  }
  charged_ = nullptr;
  return reserved;
}

bool CapacityBank::fits(std::string_view key, std::size_t bytes, std::size_t beside) noexcept {
  const auto* const tenant = ledger_ ? ledger_->find(tenant_of(key)) : nullptr;
  return bytes <= room() && (tenant == nullptr || bytes + beside <= tenant->account.left());
}

/// Null if there is no memory for one.
TenantLedger::Tenant* CapacityBank::record_of(std::string_view key, double now_s) noexcept {
  for (;;) {
    try {
      ledger_->forget_idle();
      return &ledger_->record(tenant_of(key));
    } catch (const std::bad_alloc&) {
      if (!evict_one(now_s)) return nullptr;
    }
  }
}

/// Evicts what is the tenant's own, for as long as its quota is used up.
bool CapacityBank::charge(TenantLedger::Tenant& tenant, std::size_t bytes) noexcept {
  while (!tenant.account.try_reserve(bytes)) {
    if (bytes > tenant.account.limit() || !evict_one_of(tenant)) {
      refused_ = EvictedKeys::Cause::kOwnQuota;
      return false;
    }
  }
  return true;
}

std::optional<Reservation> CapacityBank::room_among_all(std::size_t bytes, double now_s) noexcept {
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
      evict_for_others(slot);
      return true;
    }
    policy_.hit(*victim, now_s);
  }
  std::size_t seen = 0;
  for (std::uint32_t slot = 0; seen < policy_.size(); ++slot) {
    if (!policy_.contains(slot)) continue;
    ++seen;
    if (!is_idle(slot)) continue;
    evict_for_others(slot);
    return true;
  }
  return false;
}

/// The one that the tenant used longest ago, of those that may go.
bool CapacityBank::evict_one_of(TenantLedger::Tenant& tenant) noexcept {
  for (int attempts = 0; attempts < 64 && !tenant.held.empty(); ++attempts) {
    if (const std::uint32_t slot = idle_in_place_of(tenant.held.first); slot != kNoSlot) {
      evict(slot, EvictedKeys::Cause::kOwnQuota);
      return true;
    }
    ledger_->touch(tenant.held.first);
  }
  for (std::uint32_t slot = tenant.held.first; slot != kNoSlot; slot = ledger_->next_of(slot)) {
    if (!is_idle(slot)) continue;
    evict(slot, EvictedKeys::Cause::kOwnQuota);
    return true;
  }
  return false;
}

void CapacityBank::evict_for_others(std::uint32_t slot) noexcept {
  const bool other = ledger_ && asking_ && tenant_of(key_of(slot)) != tenant_of(*asking_);
  evict(slot, other ? EvictedKeys::Cause::kOtherTenant : EvictedKeys::Cause::kRoom);
}

void CapacityBank::evict(std::uint32_t slot, EvictedKeys::Cause cause) noexcept {
  remember(slot, cause);
  remove(slot);
  ++evictions_;
  if (cause == EvictedKeys::Cause::kOwnQuota) ++quota_evictions_;
  if (ledger_) ledger_->forget_idle(charged_);
}

void CapacityBank::enter(std::uint32_t slot, std::string_view key, const EntryCost& cost, double now_s) {
  policy_.insert(slot, cost, now_s);
  if (!ledger_) return;
  try {
    ledger_->enter(slot, tenant_of(key));
  } catch (...) {
    policy_.erase(slot);
    throw;
  }
}

void CapacityBank::touch(std::uint32_t slot, double now_s) noexcept {
  policy_.hit(slot, now_s);
  if (ledger_) ledger_->touch(slot);
}

void CapacityBank::leave(std::uint32_t slot) noexcept {
  policy_.erase(slot);
  if (ledger_) ledger_->leave(slot);
}

void CapacityBank::make_as_old(std::uint32_t slot, std::uint32_t as) noexcept {
  if (ledger_) ledger_->make_as_old(slot, as);
}

void CapacityBank::drop_aged() noexcept {
  if (!ledger_) return;
  std::uint32_t passed_over = kNoSlot;
  bool dropped = false;
  while (const auto slot = ledger_->aged(passed_over)) {
    if (is_kept(*slot)) {
      passed_over = *slot;
      continue;
    }
    // What is behind it in a sequence goes first, and cannot be found without it.
    const std::uint32_t last = last_below(*slot);
    remember(last, EvictedKeys::Cause::kAge);
    remove(last);
    ++aged_;
    dropped = true;
  }
  if (dropped) ledger_->forget_idle();
}

TenantErasure CapacityBank::erase_tenant(std::string_view tenant) {
  const std::lock_guard lock(mutex_);
  TenantErasure erased;
  const std::size_t before = account_.used();
  const auto slots = policy_.order();
  // Nothing fails from here on.
  for (const std::uint32_t slot : slots) {
    if (!policy_.contains(slot) || tenant_of(key_of(slot)) != tenant) continue;
    while (policy_.contains(slot)) {
      remove(last_below(slot));
      ++erased.entries;
    }
  }
  evicted_.clear();
  if (ledger_) ledger_->forget_idle();
  const std::size_t after = account_.used();
  erased.bytes = before - std::min(before, after);
  return erased;
}

void CapacityBank::add_to(TenantUsages& usages) const {
  const std::lock_guard lock(mutex_);
  if (ledger_) ledger_->add_to(usages);
}

void CapacityBank::clear() {
  const std::lock_guard lock(mutex_);
  policy_.clear();
  evicted_.clear();
  remove_all();
  if (ledger_) ledger_->clear();
}

void CapacityBank::reject() {
  const std::lock_guard lock(mutex_);
  ++rejected_;
}

BankCounters CapacityBank::current() const noexcept {
  return {policy_.size(),  insertions_,     evictions_,       rejected_,
          account_.used(), account_.peak(), quota_evictions_, aged_};
}

}  // namespace llmcache
