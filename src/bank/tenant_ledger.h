// Who holds what of a bank: quotas, entries by tenant, and their age.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>

#include "bank/memory.h"
#include "llmcache/bank/slot_table.h"
#include "llmcache/refresh/ttl.h"
#include "llmcache/tenants.h"

namespace llmcache {

/// Tenants as statistics tell them apart.
enum class TenantClass { kUnnamed, kListed, kOthers };
inline constexpr std::size_t kTenantClasses = 3;
/// What the tenants of a class hold.
struct TenantUsage {
  std::uint64_t entries = 0;
  std::size_t bytes = 0;
};
using TenantUsages = std::array<TenantUsage, kTenantClasses>;

/// The book that a bank keeps of its tenants. A tenant has a record as long as it holds something, an entry that
/// somebody reads still among it.
///
/// Every operation is O(1), but for finding a record by name, O(log tenants), and usage(). Memory: from the resource
/// given, about 200 bytes a tenant and 16 an entry (40 with a TTL); where it throws std::bad_alloc nothing has changed.
/// Thread safety: none; the bank locks. Reservations charged to a record may go from any thread.
class TenantLedger {
 public:
  static constexpr std::size_t kNoQuota = std::numeric_limits<std::size_t>::max();

  struct Tenant {
    Tenant(std::size_t quota, TenantClass kind) : account(quota), of_class(kind) {}
    MemoryAccount account;  ///< what is charged to it: of no total, the bank's own has the same bytes
    const TenantClass of_class;
    SlotList held;  ///< entries, least recently used first
    std::uint64_t entries = 0;
    std::size_t kept_bytes = 0;  ///< of it, pinned
    const std::pmr::string* name = nullptr;
    Tenant* next_idle = nullptr;
    bool is_idle = false;
  };

  /// `share`: of every quota, what this bank gives. Options and resource must outlive the ledger.
  TenantLedger(const TenantOptions& options, double share, std::function<double()> clock,
               std::pmr::memory_resource* memory);

  /// The record of a tenant, made if there is none. Throws std::bad_alloc.
  [[nodiscard]] Tenant& record(std::string_view name);
  /// Null: it holds nothing.
  [[nodiscard]] Tenant* find(std::string_view name) noexcept;

  /// A new entry, of a slot that is not held. Throws std::bad_alloc.
  void enter(std::uint32_t slot, std::string_view name);
  /// The entry was used. A slot that is not held is ignored.
  void touch(std::uint32_t slot) noexcept;
  /// The entry is gone. A slot that is not held is ignored.
  void leave(std::uint32_t slot) noexcept;
  /// Both are held: the first one is as old as the other.
  void make_as_old(std::uint32_t slot, std::uint32_t as) noexcept;
  /// The oldest entry that is too old, behind `after` in age where that is given; empty: there is none.
  [[nodiscard]] std::optional<std::uint32_t> aged(std::uint32_t after = kNoSlot) noexcept;
  /// True if entries become too old.
  [[nodiscard]] bool ages() const noexcept { return ttl_.limited(); }
  /// Behind a slot in its tenant's list.
  [[nodiscard]] std::uint32_t next_of(std::uint32_t slot) noexcept { return slots_.at(slot).next; }

  /// Drops the records of those that hold nothing any more, but one.
  void forget_idle(const Tenant* but = nullptr) noexcept;
  /// Every entry is gone.
  void clear() noexcept;

  /// Records.
  [[nodiscard]] std::size_t size() const noexcept { return tenants_.size(); }
  void add_to(TenantUsages& usages) const noexcept;

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
    Tenant* tenant;
  };
  using Tenants = std::pmr::map<std::pmr::string, Tenant, std::less<>>;

  [[nodiscard]] std::size_t quota_of(std::string_view name, TenantClass& kind) const;
  [[nodiscard]] double now() const noexcept;
  void await(Tenant& tenant) noexcept;

  const TenantOptions& options_;
  const double share_;
  const std::function<double()> clock_;
  std::pmr::memory_resource* const memory_;
  Tenants tenants_;
  Tenant* idle_ = nullptr;  ///< those without an entry, to be forgotten once nothing is charged to them
  SlotTable<Node> slots_;
  TtlQueue ttl_;
};

}  // namespace llmcache
