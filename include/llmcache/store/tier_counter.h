// What a store counts, whichever it is.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "llmcache/store/state_store.h"

namespace llmcache {

/// Thread-safe.
class TierCounter {
 public:
  /// A look-up that has come back.
  void looked_up(const StoreValues& found) {
    const std::lock_guard lock(mutex_);
    stats_.lookups += found.values.size();
    for (const auto& value : found.values) {
      if (value) {
        ++stats_.hits;
        stats_.bytes_read += value->size();
      } else if (found.outcome == StoreOutcome::kDone) {
        ++stats_.misses;
      }
    }
  }
  void written(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    ++stats_.writes;
    stats_.bytes_written += bytes;
  }
  void not_written(std::size_t values) {
    const std::lock_guard lock(mutex_);
    stats_.writes_failed += values;
  }
  /// How a call ended, and, unless it was done, why.
  void ended(StoreOutcome outcome, const std::string& why) {
    if (outcome == StoreOutcome::kDone) return;
    const std::lock_guard lock(mutex_);
    if (outcome == StoreOutcome::kTimeout) ++stats_.timeouts;
    if (outcome == StoreOutcome::kFailed) ++stats_.failures;
    if (outcome == StoreOutcome::kRefused) ++stats_.refused;
    if (!why.empty()) stats_.last_failure = why;
  }
  void damaged() {
    const std::lock_guard lock(mutex_);
    ++stats_.damaged;
  }
  void evicted() {
    const std::lock_guard lock(mutex_);
    ++stats_.evictions;
  }
  [[nodiscard]] TierStats stats() const {
    const std::lock_guard lock(mutex_);
    return stats_;
  }

 private:
  mutable std::mutex mutex_;
  TierStats stats_;
};

}  // namespace llmcache
