// What a tenant may hold, for how long, and what holds on to a prefix of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

namespace llmcache {

class PinnedPrefixes;

/// Limits of tenants (RequestOptions::tenant). A part of Options.
///
/// Quotas: the capacity is divided among kinds of banks (PrefixOptions::capacity_share and the like), and every quota
/// is divided likewise: of a quota of 100 MiB, a bank that has 0.9 of the capacity gives the tenant 90 MiB. A tenant
/// that needs more loses entries of its own, those first that it used longest ago; other tenants lose nothing by it.
/// What a tenant holds is counted with its keys and what the index takes for it, and at every moment. Where the quotas
/// of all together are more than the capacity, the eviction policy chooses among all tenants once the capacity is used
/// up.
struct TenantOptions {
  /// Bytes that each tenant may hold whose name is not in `quota_bytes`, tenants without a name among them. Default 0:
  /// no quota.
  std::size_t default_quota_bytes = 0;

  /// Bytes by name of the tenant. 0: no quota. Default: nobody has one of their own.
  std::map<std::string, std::size_t, std::less<>> quota_bytes = {};

  /// Seconds after which nothing that was kept is found any more, counted from when it was computed; using it does not
  /// prolong that. It then goes the next time that its bank is used. What was pinned stays until the pin ends, what a
  /// snapshot gives begins anew when it is loaded. RefreshOptions::clock tells the time; a clock that throws counts as
  /// one that stands still. 0 or more; default 0: no limit.
  double ttl_s = 0;

  /// Largest part that pinned prefixes (LayerCacheBase::pin()) may be of the capacity for prefixes, and those of a
  /// tenant of its quota for these. 0 to 1; default 0.25.
  double pinned_share = 0.25;

  /// True: it is kept who holds what (Stats::tenants, MissReason::kOtherTenant), about 200 bytes a tenant and bank and
  /// 16 an entry, within the capacity. With a quota or a TTL it is anyway. Default: not without them.
  bool keep_accounts = false;

  /// True if it is kept who holds what.
  [[nodiscard]] bool accounts() const noexcept {
    return keep_accounts || default_quota_bytes > 0 || !quota_bytes.empty() || ttl_s > 0;
  }
  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// What LayerCacheBase::erase_tenant() dropped.
struct TenantErasure {
  std::uint64_t entries = 0;  ///< of all banks
  std::size_t bytes = 0;      ///< that became free at once; what running calls read becomes free when they end
  std::uint64_t pins = 0;     ///< of prefixes
  std::uint64_t calls = 0;    ///< that are running for the tenant, of which nothing will be kept
  std::string store_failure;  ///< why the store below (Options::store) may hold something still; empty: it does not
};

/// Holds on to prefixes in the cache that LayerCacheBase::pin() was called on: nothing of them is evicted or expires
/// while it lives, at most for the time that it was given. Movable. It may outlive the cache. Not thread-safe itself;
/// leases of one cache may be used by many threads.
class PinLease {
 public:
  PinLease() = default;  ///< of nothing
  PinLease(PinLease&& other) noexcept;
  PinLease& operator=(PinLease&& other) noexcept;
  /// As release().
  ~PinLease();

  /// The prefixes may be evicted again. Does nothing if it holds none.
  void release() noexcept;
  /// Holds on for so many seconds from now, above 0. False if it held nothing any more. Throws Error(kInvalidOptions).
  bool renew(double seconds);
  /// False once the time is over, the cache is gone or was cleared, or the tenant erased.
  [[nodiscard]] bool held() const;
  /// Real tokens of the prefixes.
  [[nodiscard]] std::int64_t tokens() const noexcept { return tokens_; }

 private:
  friend class PrefixReuse;
  PinLease(std::weak_ptr<PinnedPrefixes> pins, std::uint64_t id, std::int64_t tokens) noexcept;

  std::weak_ptr<PinnedPrefixes> pins_;
  std::uint64_t id_ = 0;
  std::int64_t tokens_ = 0;
};

}  // namespace llmcache
