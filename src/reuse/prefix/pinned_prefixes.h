// Prefixes that somebody holds on to, each for a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bank/prefix_bank.h"

namespace llmcache {

/// The pins of one cache. Thread-safe. It calls the bank, which must not call it; and must be closed before the bank
/// goes: a PinLease may keep it longer than that.
class PinnedPrefixes {
 public:
  /// `clock`: seconds; one that throws counts as one that stands still.
  explicit PinnedPrefixes(std::function<double()> clock) : clock_(std::move(clock)) {}

  /// Returns the number of the pin. Throws Error(kNotAvailable) where there are 4,096, and std::bad_alloc.
  std::uint64_t add(std::string tenant, double seconds, std::vector<PrefixLease> leases);
  /// Nothing happens if there is no pin of that number any more; renew() is false then.
  void remove(std::uint64_t id) noexcept;
  bool renew(std::uint64_t id, double seconds);
  [[nodiscard]] bool holds(std::uint64_t id);
  /// Drops those whose time is over. Cheap while there are none.
  void drop_late() noexcept;
  /// Drops those of a tenant; returns how many.
  std::uint64_t drop(const std::string& tenant) noexcept;
  void drop_all() noexcept;
  [[nodiscard]] std::uint64_t count();

 private:
  struct Pin {
    std::string tenant;
    double deadline;
    std::vector<PrefixLease> leases;
  };
  [[nodiscard]] double now() noexcept;
  void find_earliest() noexcept;

  const std::function<double()> clock_;
  std::mutex mutex_;
  std::map<std::uint64_t, Pin> pins_;
  std::uint64_t next_ = 1;
  double latest_now_ = 0;
  std::atomic<double> earliest_{std::numeric_limits<double>::infinity()};  ///< deadline
};

/// Throws Error(kInvalidOptions) unless a pin can be held for so long.
void check_pin_seconds(double seconds);

}  // namespace llmcache
