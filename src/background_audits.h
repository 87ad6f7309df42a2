// Audits that are made after the answer was returned.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace llmcache {

/// Makes audits one after another on a thread of its own, without gradients. Thread-safe. What is waiting when it goes
/// is dropped.
class BackgroundAudits {
 public:
  using Audit = std::function<void()>;  ///< deals with its own failures: what it throws is lost

  BackgroundAudits();
  ~BackgroundAudits();
  BackgroundAudits(const BackgroundAudits&) = delete;
  BackgroundAudits& operator=(const BackgroundAudits&) = delete;

  /// `bytes`: of what it holds. False if it is dropped, and counted so, because too many, or too much, is waiting.
  [[nodiscard]] bool add(Audit audit, std::size_t bytes);
  [[nodiscard]] std::uint64_t dropped() const;
  [[nodiscard]] std::uint64_t waiting() const;

 private:
  static constexpr std::size_t kMostWaiting = 256;
  static constexpr std::size_t kMostBytes = std::size_t{64} << 20;
  struct Job {
    Audit audit;
    std::size_t bytes = 0;
  };
  void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;   ///< the first is being worked on
  std::size_t bytes_ = 0;  ///< that they hold
  bool stopping_ = false;
  std::uint64_t dropped_ = 0;
  std::thread thread_;
};

}  // namespace llmcache
