// What all calls did together: one lock, so that whoever reads sees the same calls in every number.
#pragma once

#include <mutex>

#include "llmcache/report.h"

namespace llmcache {

/// Thread-safe.
class CallTotals {
 public:
  /// A call that has returned. Its total_ms is set.
  void add(const ForwardReport& report) noexcept;
  /// Sets the fields of Stats that calls add to.
  void fill(Stats& stats) const;

 private:
  mutable std::mutex mutex_;
  Stats sums_;  ///< only those fields
};

}  // namespace llmcache
