// What all banks have in common: a capacity that holds at every moment, the choice of who goes when room is needed, and
// counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <mutex>
#include <new>
#include <optional>

#include "bank/evicted_keys.h"
#include "bank/memory.h"
#include "llmcache/bank/eviction.h"

namespace llmcache {

/// Of one bank, or of several together. `entries` and `bytes` are what is held now, all else goes up only.
struct BankCounters {
  std::uint64_t entries = 0;
  std::uint64_t insertions = 0;
  std::uint64_t evictions = 0;  ///< for room
  std::uint64_t rejected = 0;   ///< for which there was no room
  std::size_t bytes = 0;        ///< with those of entries that have left and are read still
  std::size_t peak_bytes = 0;   ///< the most that there ever were at once; never above the capacity
};

/// A bank keeps entries under slots (slot_table.h), known to its policy from insertion to removal. It locks mutex_, and
/// calls what is protected here with it held.
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
  /// Puts into evicted_ what an entry that is about to be evicted was found by.
  virtual void remember(std::uint32_t /*slot*/) noexcept {}
  /// False: the entry must not be evicted now.
  [[nodiscard]] virtual bool is_idle(std::uint32_t /*slot*/) const noexcept { return true; }
  /// The idle entry that goes where the policy names this one; kNoSlot: none.
  [[nodiscard]] virtual std::uint32_t idle_in_place_of(std::uint32_t slot) const noexcept {
    return is_idle(slot) ? slot : kNoSlot;
  }
  /// Of the bytes in use, those that no eviction would give back now.
  [[nodiscard]] virtual std::size_t busy_bytes() const noexcept { return 0; }

  /// Reserves bytes, and evicts for them; empty if there is no room. Evicts nothing where that would not be enough.
  [[nodiscard]] std::optional<Reservation> make_room(std::size_t bytes, double now_s) noexcept;
  /// Removes one entry for room. False if none is left that may go.
  bool evict_one(double now_s) noexcept;
  /// Removes an entry, and counts it as evicted.
  void evict(std::uint32_t slot) noexcept;
  /// Takes a step that changes nothing where it throws std::bad_alloc: then an entry is evicted, and it is taken again.
  /// False if none is left.
  template <typename Step>
  bool take_evicting(double now_s, const Step& step) {
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
  std::uint64_t insertions_ = 0;
  std::uint64_t rejected_ = 0;

 private:
  std::uint64_t evictions_ = 0;
};

}  // namespace llmcache
