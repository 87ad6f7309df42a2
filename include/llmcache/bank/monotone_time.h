// Time that never goes backwards.
#pragma once

#include <algorithm>
#include <cmath>

namespace llmcache {

/// Turns the readings of a clock into seconds since the first reading. A reading before the latest one, or one that is
/// not finite, counts as the latest one: time stands still until the clock has caught up.
/// Thread safety: none.
class MonotoneTime {
 public:
  /// The longest time that is told apart, about 31,700 years.
  static constexpr double kLongest = 1e12;

  /// Seconds since the first finite reading, from 0 to kLongest, never less than before.
  double advance(double now_s) noexcept {
    if (!std::isfinite(now_s)) return elapsed_;
    if (!started_) {
      started_ = true;
      origin_ = now_s;
    }
    elapsed_ = std::clamp(now_s - origin_, elapsed_, kLongest);
    return elapsed_;
  }

 private:
  double origin_ = 0;
  double elapsed_ = 0;
  bool started_ = false;
};

}  // namespace llmcache
