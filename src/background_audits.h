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
/// is dropped; an audit that throws counts as not chosen.
class BackgroundAudits {
 public:
  using Audit = std::function<void()>;

  BackgroundAudits();
  ~BackgroundAudits();
  BackgroundAudits(const BackgroundAudits&) = delete;
  BackgroundAudits& operator=(const BackgroundAudits&) = delete;

  /// Dropped, and counted so, where too many are waiting.
  void add(Audit audit);
  [[nodiscard]] std::uint64_t dropped() const;
  [[nodiscard]] std::uint64_t waiting() const;

 private:
  static constexpr std::size_t kMostWaiting = 256;
  void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Audit> audits_;  ///< the first is being made
  bool stopping_ = false;
  std::uint64_t dropped_ = 0;
  std::thread thread_;
};

}  // namespace llmcache
