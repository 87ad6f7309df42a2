// Requests that a mechanism could not serve: counted, with the reason, and told once.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "llmcache/report.h"

namespace llmcache {

/// Of one call: added to the totals only if it returns.
using CallFallbacks = std::vector<std::pair<std::string, std::string>>;  // mechanism, reason

/// Thread-safe.
class Fallbacks {
 public:
  /// Warns of the first one of each mechanism.
  void add(const CallFallbacks& call);
  void fill(std::vector<FallbackStats>& stats) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, FallbackStats> by_mechanism_;
};

}  // namespace llmcache
