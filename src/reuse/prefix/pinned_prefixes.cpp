#include "reuse/prefix/pinned_prefixes.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "llmcache/error.h"
#include "llmcache/tenants.h"

namespace llmcache {
namespace {

/// Of one cache: pins of a prefix that is pinned already take no room that a share bounds.
constexpr std::size_t kMostPins = 4096;

}  // namespace

std::uint64_t PinnedPrefixes::add(std::string tenant, double seconds, std::vector<PrefixLease> leases) {
  drop_late();
  const std::lock_guard lock(mutex_);
  if (pins_.size() >= kMostPins) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("{} pins are held, and no more may be: release some, or renew one", pins_.size()));
  }
  const std::uint64_t id = next_++;
  pins_.emplace(id, Pin{std::move(tenant), now() + seconds, std::move(leases)});
  find_earliest();
  return id;
}

void PinnedPrefixes::remove(std::uint64_t id) noexcept {
  const std::lock_guard lock(mutex_);
  pins_.erase(id);
  find_earliest();
}

bool PinnedPrefixes::renew(std::uint64_t id, double seconds) {
  drop_late();
  const std::lock_guard lock(mutex_);
  const auto it = pins_.find(id);
  if (it == pins_.end()) return false;
  it->second.deadline = now() + seconds;
  find_earliest();
  return true;
}

bool PinnedPrefixes::holds(std::uint64_t id) {
  drop_late();
  const std::lock_guard lock(mutex_);
  return pins_.contains(id);
}

void PinnedPrefixes::drop_late() noexcept {
  if (earliest_.load(std::memory_order_relaxed) == std::numeric_limits<double>::infinity()) return;
  const std::lock_guard lock(mutex_);
  const double time = now();
  std::erase_if(pins_, [time](const auto& pin) { return pin.second.deadline <= time; });
  find_earliest();
}

std::uint64_t PinnedPrefixes::drop(const std::string& tenant) noexcept {
  const std::lock_guard lock(mutex_);
  const auto dropped = std::erase_if(pins_, [&](const auto& pin) { return pin.second.tenant == tenant; });
  find_earliest();
  return dropped;
}

void PinnedPrefixes::drop_all() noexcept {
  const std::lock_guard lock(mutex_);
  pins_.clear();
  find_earliest();
}

std::uint64_t PinnedPrefixes::count() {
  drop_late();
  const std::lock_guard lock(mutex_);
  return pins_.size();
}

/// Never less than it was.
double PinnedPrefixes::now() noexcept {
  try {
    const double time = clock_();
    if (std::isfinite(time)) latest_now_ = std::max(latest_now_, time);
  } catch (...) {  // the caller's clock
  }
  return latest_now_;
}

void PinnedPrefixes::find_earliest() noexcept {
  double earliest = std::numeric_limits<double>::infinity();
  for (const auto& [id, pin] : pins_) earliest = std::min(earliest, pin.deadline);
  earliest_.store(earliest, std::memory_order_relaxed);
}

PinLease::PinLease(std::weak_ptr<PinnedPrefixes> pins, std::uint64_t id, std::int64_t tokens) noexcept
    : pins_(std::move(pins)), id_(id), tokens_(tokens) {}

PinLease::PinLease(PinLease&& other) noexcept
    : pins_(std::exchange(other.pins_, {})), id_(other.id_), tokens_(std::exchange(other.tokens_, 0)) {}

PinLease& PinLease::operator=(PinLease&& other) noexcept {
  if (this == &other) return *this;
  release();
  pins_ = std::exchange(other.pins_, {});
  id_ = other.id_;
  tokens_ = std::exchange(other.tokens_, 0);
  return *this;
}

PinLease::~PinLease() { release(); }

void PinLease::release() noexcept {
  if (const auto pins = std::exchange(pins_, {}).lock()) pins->remove(id_);
}

bool PinLease::renew(double seconds) {
  check_pin_seconds(seconds);
  const auto pins = pins_.lock();
  return pins && pins->renew(id_, seconds);
}

bool PinLease::held() const {
  const auto pins = pins_.lock();
  return pins && pins->holds(id_);
}

void check_pin_seconds(double seconds) {
  if (seconds > 0 && std::isfinite(seconds)) return;
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("a prefix is to be pinned for {} seconds; a finite number above 0 is expected", seconds));
}

}  // namespace llmcache
