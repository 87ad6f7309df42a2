// What all banks have in common: a capacity that holds at every moment, the choice of who goes when room is needed, and
// counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory_resource>
#include <mutex>
#include <new>
#include <optional>
#include <string_view>

#include "bank/evicted_keys.h"
#include "bank/memory.h"
#include "bank/tenant_ledger.h"
#include "llmcache/bank/eviction.h"

namespace llmcache {

/// Of one bank, or of several together. `entries` and `bytes` are what is held now, all else goes up only.
struct BankCounters {
  std::uint64_t entries = 0;
  std::uint64_t insertions = 0;
  std::uint64_t evictions = 0;        ///< for room
  std::uint64_t rejected = 0;         ///< for which there was no room
  std::size_t bytes = 0;              ///< with those of entries that have left and are read still
  std::size_t peak_bytes = 0;         ///< the most that there ever were at once; never above the capacity
  std::uint64_t quota_evictions = 0;  ///< of the evictions, for the quota of their tenant
  std::uint64_t aged = 0;             ///< dropped because they were kept for as long as a tenant's may be
};

/// A bank keeps entries under slots (slot_table.h), known to its policy from insertion to removal. It locks mutex_, and
/// calls what is protected here with it held.
///
/// Keys and partitions begin with the tenant (tenant_key.h). A bank with a ledger also holds its quotas: room is made
/// among the tenant's own entries first, for as long as it has too much.
///
/// Memory: whatever an entry takes is reserved in account_ before it is taken: tensors by a Reservation, which the
/// entry holds, containers by memory_. So the account is right whenever an entry goes, and whatever throws.
class CapacityBank {
 public:
  CapacityBank(const CapacityBank&) = delete;
  CapacityBank& operator=(const CapacityBank&) = delete;

  /// Drops every entry. Those that are read just now count until their readers are done.
  void clear();
  [[nodiscard]] std::size_t capacity() const noexcept { return account_.limit(); }
  /// What it may still take without evicting.
  [[nodiscard]] std::size_t room() const noexcept { return account_.left(); }
  /// The same for an entry with that key, whose tenant may have a quota.
  [[nodiscard]] std::size_t room_for(std::string_view key);

  /// From now on it goes by these limits, which must outlive it. `cache_capacity`: that the quotas are parts of. To be
  /// called once, before there is an entry.
  void limit_tenants(const TenantOptions& options, std::size_t cache_capacity, std::function<double()> clock);
  /// Drops every entry of a tenant, in use or not, and what is remembered of entries that went, of all tenants. Throws
  /// std::bad_alloc; then nothing has changed.
  TenantErasure erase_tenant(std::string_view tenant);
  /// What tenants hold, by class; nothing without limit_tenants().
  void add_to(TenantUsages& usages) const;

 protected:
  /// `total`: the account that the bank's is part of; null: of none. `remembered`: of evicted_. Throws
  /// Error(kInvalidOptions).
  CapacityBank(std::size_t capacity_bytes, const EvictionOptions& eviction, MemoryAccount* total,
               std::size_t remembered = std::size_t{1} << 15);
  virtual ~CapacityBank() = default;

  /// Takes an entry out of every container, the policy too; also one that was only half put into them.
  virtual void remove(std::uint32_t slot) noexcept = 0;
  /// Empties every container, so that it gives back its memory; the policy is empty already.
  virtual void remove_all() noexcept = 0;
  /// Puts into evicted_ what an entry that is about to go was found by.
  virtual void remember(std::uint32_t /*slot*/, EvictedKeys::Cause /*cause*/) noexcept {}
  /// What an entry begins with to whom it belongs: its key or its partition.
  [[nodiscard]] virtual std::string_view key_of(std::uint32_t slot) const noexcept = 0;
  /// The entry that has to go before this one can, or this one.
  [[nodiscard]] virtual std::uint32_t last_below(std::uint32_t slot) const noexcept { return slot; }
  /// True: it does not become too old now.
  [[nodiscard]] virtual bool is_kept(std::uint32_t /*slot*/) const noexcept { return false; }
  /// False: the entry must not be evicted now.
  [[nodiscard]] virtual bool is_idle(std::uint32_t /*slot*/) const noexcept { return true; }
  /// The idle entry that goes where the policy names this one; kNoSlot: none.
  [[nodiscard]] virtual std::uint32_t idle_in_place_of(std::uint32_t slot) const noexcept {
    return is_idle(slot) ? slot : kNoSlot;
  }
  /// Of the bytes in use, those that no eviction would give back now.
  [[nodiscard]] virtual std::size_t busy_bytes() const noexcept { return 0; }

  /// To the policy, and to the ledger: a new entry with that key, one that was used, one that is gone. The first throws
  /// std::bad_alloc, and then nothing has changed; the others ignore a slot that is not held.
  void enter(std::uint32_t slot, std::string_view key, const EntryCost& cost, double now_s);
  void touch(std::uint32_t slot, double now_s) noexcept;
  void leave(std::uint32_t slot) noexcept;
  /// The first entry is as old as the other one.
  void make_as_old(std::uint32_t slot, std::uint32_t as) noexcept;
  /// Removes what is too old. To be called before anything is looked for.
  void drop_aged() noexcept;

  /// Reserves bytes for an entry with that key, and evicts for them; empty if there is no room, and refused_ says why.
  /// Evicts nothing of others where that would not be enough. `beside`: what its tenant is charged beside these bytes,
  /// for what the containers take.
  [[nodiscard]] std::optional<Reservation> make_room(std::string_view key, std::size_t bytes, std::size_t beside,
                                                     double now_s) noexcept;
  /// True if make_room() would evict nothing.
  [[nodiscard]] bool fits(std::string_view key, std::size_t bytes, std::size_t beside) noexcept;
  /// Removes one entry for room. False if none is left that may go.
  bool evict_one(double now_s) noexcept;
  /// Removes an entry, and counts it as evicted.
  void evict(std::uint32_t slot, EvictedKeys::Cause cause = EvictedKeys::Cause::kRoom) noexcept;
  /// Takes a step, for an entry with that key, that changes nothing where it throws std::bad_alloc: then an entry is
  /// evicted, and it is taken again. False if none is left.
  template <typename Step>
  bool take_evicting(std::string_view key, double now_s, const Step& step) {
    const Asking asking(*this, key);
    refused_ = EvictedKeys::Cause::kRoom;
    for (;;) {
      try {
        step();
        return true;
      } catch (const std::bad_alloc&) {
        if (!evict_one(now_s)) return false;
      }
    }
  }
  [[nodiscard]] BankCounters current() const noexcept;
  /// Counts what found no room. Locks by itself.
  void reject();

  MemoryAccount account_;
  AccountedResource memory_;
  mutable std::mutex mutex_;
  EvictionPolicy policy_;
  EvictedKeys evicted_;  ///< as far as a bank tells it; and of what found no room. Forgotten by clear()
  EvictedKeys::Cause refused_ = EvictedKeys::Cause::kRoom;  ///< why make_room() or take_evicting() found no room
  std::optional<TenantLedger> ledger_;                      ///< none without limit_tenants()
  std::uint64_t insertions_ = 0;
  std::uint64_t rejected_ = 0;

 private:
  /// While it lives, what goes for room goes for an entry with that key.
  class Asking {
   public:
    Asking(CapacityBank& bank, std::string_view key) noexcept : bank_(bank), before_(bank.asking_) {
      bank.asking_ = key;
    }
    Asking(const Asking&) = delete;
    Asking& operator=(const Asking&) = delete;
    ~Asking() { bank_.asking_ = before_; }

   private:
    CapacityBank& bank_;
    const std::optional<std::string_view> before_;
  };
  [[nodiscard]] TenantLedger::Tenant* record_of(std::string_view key, double now_s) noexcept;
  [[nodiscard]] std::optional<Reservation> room_among_all(std::size_t bytes, double now_s) noexcept;
  [[nodiscard]] bool charge(TenantLedger::Tenant& tenant, std::size_t bytes) noexcept;
  bool evict_one_of(TenantLedger::Tenant& tenant) noexcept;
  void evict_for_others(std::uint32_t slot) noexcept;

  std::optional<std::string_view> asking_;   ///< key of the entry for which room is made
  TenantLedger::Tenant* charged_ = nullptr;  ///< whose record is in use, and not to be forgotten
  std::uint64_t evictions_ = 0;
  std::uint64_t quota_evictions_ = 0;
  std::uint64_t aged_ = 0;
};

/// Is given one bank after another.
using BankVisitor = std::function<void(CapacityBank&)>;

}  // namespace llmcache
