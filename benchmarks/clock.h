// Wall time.
#pragma once

#include <chrono>

namespace llmcache::bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
inline double ms_since(Clock::time_point start) { return 1000 * seconds_since(start); }

}  // namespace llmcache::bench
