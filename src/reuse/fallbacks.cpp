#include "reuse/fallbacks.h"

#include <c10/util/Exception.h>

namespace llmcache {

void Fallbacks::add(const CallFallbacks& call) {
  for (const auto& [mechanism, reason] : call) {
    bool first = false;
    {
      const std::lock_guard lock(mutex_);
      FallbackStats& own = by_mechanism_[mechanism];
      first = own.count == 0;
      own.mechanism = mechanism;
      own.last_reason = reason;
      ++own.count;
    }
    if (first) {
      TORCH_WARN("llmcache: ", mechanism, " could not serve a request, which was computed more plainly: ", reason,
                 ". Stats::fallbacks counts further ones");
    }
  }
}

void Fallbacks::fill(std::vector<FallbackStats>& stats) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [_, own] : by_mechanism_) stats.push_back(own);
}

}  // namespace llmcache
