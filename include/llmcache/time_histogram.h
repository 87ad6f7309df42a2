// Counts of durations in fixed buckets, as monitoring systems take them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace llmcache {

/// Durations in seconds, in 19 buckets from 10 microseconds to 10 seconds and one for what is longer. Thread safety:
/// none.
struct TimeHistogram {
  /// Upper ends of the buckets, inclusive: 1, 2.5 and 5 of each power of ten.
  static constexpr std::array kBounds = {1e-5,   2.5e-5, 5e-5, 1e-4,   2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2,
                                         2.5e-2, 5e-2,   1e-1, 2.5e-1, 5e-1,   1.0,  2.5,  5.0,    10.0};

  std::array<std::uint64_t, kBounds.size() + 1> buckets{};  ///< durations in each, the last one beyond all bounds
  std::uint64_t count = 0;                                  ///< of all
  double sum = 0;                                           ///< seconds

  void add(double seconds) noexcept {
    std::size_t at = 0;
    while (at < kBounds.size() && seconds > kBounds[at]) ++at;
    ++buckets[at];
    ++count;
    sum += seconds;
  }
};

}  // namespace llmcache
