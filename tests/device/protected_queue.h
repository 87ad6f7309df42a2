// Work of the protected device that waits for its turn: what makes a missing wait show as a wrong result.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

#include "protected_streams.h"

namespace llmcache::test {

/// What streams were given and have not begun. It begins when the host waits for it, or another stream is made to wait
/// for it, and not before. Until then its results hold nonsense, so that who reads them without a wait gets that.
/// Thread-safe; one piece of work runs at a time.
class DelayedWork {
 public:
  static DelayedWork& instance();

  /// Off, as it is at first: what waits is run, and all work runs at once.
  void delay(bool on);
  [[nodiscard]] bool delays() const { return delays_; }
  /// The next piece of `stream`, whose clock says `time`.
  void add(const StreamOrder::Place& stream, std::int64_t time, std::function<void()> work);
  /// Runs what streams have up to these times, each in its order.
  void run(const StreamOrder::Clock& until);

 private:
  struct Piece {
    std::int64_t time = 0;
    std::function<void()> work;
  };

  std::atomic<bool> delays_{false};
  std::recursive_mutex mutex_;  ///< work frees tensors, which may be what other work waits for
  std::map<StreamOrder::Place, std::deque<Piece>> waiting_;
};

}  // namespace llmcache::test
