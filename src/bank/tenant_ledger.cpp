#include "bank/tenant_ledger.h"

#include <limits>
#include <utility>

namespace llmcache {

TenantLedger::TenantLedger(const TenantOptions& options, double share, std::function<double()> clock,
                           std::pmr::memory_resource* memory)
    : options_(options),
      share_(share),
      clock_(std::move(clock)),
      memory_(memory),
      tenants_(memory),
      slots_(memory),
      ttl_(options.ttl_s, memory) {}

std::size_t TenantLedger::quota_of(std::string_view name, TenantClass& kind) const {
  const auto own = options_.quota_bytes.find(name);
  const bool listed = own != options_.quota_bytes.end();
  kind = listed ? TenantClass::kListed : name.empty() ? TenantClass::kUnnamed : TenantClass::kOthers;
  const std::size_t quota = listed ? own->second : options_.default_quota_bytes;
  if (quota == 0) return kNoQuota;
  const double part = static_cast<double>(quota) * share_;
  return part >= static_cast<double>(kNoQuota) ? kNoQuota : static_cast<std::size_t>(part);
}

TenantLedger::Tenant* TenantLedger::find(std::string_view name) noexcept {
  const auto it = tenants_.find(name);
  return it == tenants_.end() ? nullptr : &it->second;
}

TenantLedger::Tenant& TenantLedger::record(std::string_view name) {
  if (Tenant* const known = find(name)) return *known;
  TenantClass kind{};
  const std::size_t quota = quota_of(name, kind);
  const auto made = tenants_.try_emplace(std::pmr::string(name, memory_), quota, kind).first;
  made->second.name = &made->first;
  await(made->second);
  return made->second;
}

void TenantLedger::enter(std::uint32_t slot, std::string_view name) {
  Tenant& tenant = record(name);
  slots_.add(slot).tenant = &tenant;
  try {
    ttl_.insert(slot, now());
  } catch (...) {
    slots_.remove(slot);
    throw;
  }
  tenant.held.push_back(slots_, slot);
  ++tenant.entries;
}

void TenantLedger::touch(std::uint32_t slot) noexcept {
  Node* const node = slots_.find(slot);
  if (node == nullptr) return;
  node->tenant->held.unlink(slots_, slot);
  node->tenant->held.push_back(slots_, slot);
}

void TenantLedger::leave(std::uint32_t slot) noexcept {
  Node* const node = slots_.find(slot);
  if (node == nullptr) return;
  Tenant& tenant = *node->tenant;
  tenant.held.unlink(slots_, slot);
  slots_.remove(slot);
  ttl_.erase(slot);
  if (--tenant.entries == 0) await(tenant);
}

void TenantLedger::make_as_old(std::uint32_t slot, std::uint32_t as) noexcept { ttl_.make_as_old(slot, as); }

std::optional<std::uint32_t> TenantLedger::aged(std::uint32_t after) noexcept {
  return ttl_.size() == 0 ? std::nullopt : ttl_.expired(now(), after);
}

double TenantLedger::now() const noexcept {
  if (!ttl_.limited()) return 0;
  try {
    return clock_();
  } catch (...) {  // the caller's clock: to the queue it stands still
    return std::numeric_limits<double>::quiet_NaN();
  }
}

void TenantLedger::await(Tenant& tenant) noexcept {
  if (std::exchange(tenant.is_idle, true)) return;
  tenant.next_idle = std::exchange(idle_, &tenant);
}

void TenantLedger::forget_idle(const Tenant* but) noexcept {
  for (Tenant** link = &idle_; *link != nullptr;) {
    Tenant& tenant = **link;
    const bool empty = tenant.entries == 0 && tenant.account.used() == 0 && &tenant != but;
    if (tenant.entries == 0 && !empty) {
      link = &tenant.next_idle;
      continue;
    }
    *link = tenant.next_idle;
    tenant.is_idle = false;
    if (empty) tenants_.erase(tenants_.find(*tenant.name));
  }
}

void TenantLedger::clear() noexcept {
  for (auto& [name, tenant] : tenants_) {
    tenant.held = {};
    tenant.entries = 0;
    await(tenant);
  }
  slots_.clear();
  ttl_.clear();
  forget_idle();
}

void TenantLedger::add_to(TenantUsages& usages) const noexcept {
  for (const auto& [name, tenant] : tenants_) {
    TenantUsage& usage = usages[static_cast<std::size_t>(tenant.of_class)];
    usage.entries += tenant.entries;
    usage.bytes += tenant.account.used();
  }
}

}  // namespace llmcache
