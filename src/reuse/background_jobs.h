// Work that is done after the answer was returned: audits and comparisons.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

namespace llmcache {

/// Does jobs one after another on a thread of its own, without gradients. Thread-safe. What is waiting when it goes
/// is dropped.
class BackgroundJobs {
 public:
  using Work = std::function<void()>;  ///< deals with its own failures: what it throws is lost

  /// A job is queued on the stream of `device` that was current for who added it.
  explicit BackgroundJobs(at::Device device);
  ~BackgroundJobs();
  BackgroundJobs(const BackgroundJobs&) = delete;
  BackgroundJobs& operator=(const BackgroundJobs&) = delete;

  /// `bytes`: of what it holds. False if it is dropped, and counted so, because too many, or too much, is waiting.
  [[nodiscard]] bool add(Work work, std::size_t bytes);
  [[nodiscard]] std::uint64_t dropped() const;
  [[nodiscard]] std::uint64_t waiting() const;

 private:
  static constexpr std::size_t kMostWaiting = 256;
  static constexpr std::size_t kMostBytes = std::size_t{64} << 20;
  struct Job {
    Work work;
    std::optional<c10::Stream> stream;
    std::size_t bytes = 0;
  };
  void run();

  const at::Device device_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;   ///< the first is being worked on
  std::size_t bytes_ = 0;  ///< that they hold
  bool stopping_ = false;
  std::uint64_t dropped_ = 0;
  std::thread thread_;
};

}  // namespace llmcache
