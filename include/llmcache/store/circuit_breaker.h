// Leaves a store alone that has failed, and finds out behind the requests when it works again.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace llmcache {

/// Open: nobody asks the store. A thread of the breaker, which lives while there is a breaker that was opened once,
/// tries the store after a pause, and closes the breaker when that succeeds. Pauses double from failure to failure, and
/// are short again once a call has succeeded. Thread-safe.
class CircuitBreaker {
 public:
  struct Pauses {
    double first_ms = 100;
    double longest_ms = 5'000;
  };

  /// `probe`: true if the store works. It is called by the breaker's thread, must come back, and must not throw.
  explicit CircuitBreaker(std::function<bool()> probe) : CircuitBreaker(std::move(probe), Pauses{}) {}
  CircuitBreaker(std::function<bool()> probe, Pauses pauses)
      : probe_(std::move(probe)), pauses_(pauses), pause_ms_(pauses.first_ms) {}
  CircuitBreaker(const CircuitBreaker&) = delete;
  CircuitBreaker& operator=(const CircuitBreaker&) = delete;
  /// Waits for a probe that runs. Whoever owns it must do so before what the probe uses goes.
  ~CircuitBreaker() { stop(); }

  [[nodiscard]] bool open() const noexcept { return open_.load(std::memory_order_acquire); }
  [[nodiscard]] std::uint64_t openings() const noexcept { return openings_.load(std::memory_order_relaxed); }

  /// A call has failed.
  void trip() {
    const std::lock_guard lock(mutex_);
    if (open() || stopping_) return;
    open_.store(true, std::memory_order_release);
    openings_.fetch_add(1, std::memory_order_relaxed);
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    changed_.notify_all();
  }
  /// A call has succeeded.
  void succeeded() noexcept {
    if (pause_ms_.load(std::memory_order_relaxed) != pauses_.first_ms && !open()) pause_ms_.store(pauses_.first_ms);
  }
  /// No probe runs any more, and none begins.
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || open(); });
      if (stopping_) return;
      const double pause = pause_ms_.load();
      pause_ms_.store(std::min(2 * pause, pauses_.longest_ms));
      changed_.wait_for(lock, std::chrono::duration<double, std::milli>(pause), [this] { return stopping_; });
      if (stopping_) return;
      lock.unlock();
      const bool works = probe_();
      lock.lock();
      if (works) open_.store(false, std::memory_order_release);
    }
  }

  const std::function<bool()> probe_;
  const Pauses pauses_;
  std::atomic<double> pause_ms_;
  std::atomic<bool> open_{false};
  std::atomic<std::uint64_t> openings_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  ///< guarded by mutex_
  std::thread thread_;     ///< likewise
};

}  // namespace llmcache
