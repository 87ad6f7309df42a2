// Work behind the answers of requests, bounded by the bytes that it holds or is going to hold.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace llmcache {

/// Does one piece of work after another on a thread of its own, which begins with the first. What is waiting when it
/// goes is dropped. Thread-safe.
class WriteQueue {
 public:
  using Work = std::function<void()>;  ///< must not throw

  /// `most_bytes`: that all work waiting may hold.
  explicit WriteQueue(std::size_t most_bytes) : most_bytes_(most_bytes) {}
  ~WriteQueue() { stop(); }
  WriteQueue(const WriteQueue&) = delete;
  WriteQueue& operator=(const WriteQueue&) = delete;

  /// False if it is dropped, because with it too many bytes, or pieces of work, would be waiting.
  [[nodiscard]] bool add(Work work, std::size_t bytes);
  [[nodiscard]] std::uint64_t waiting() const;
  /// Waits until all that was added is done.
  void flush();
  /// Drops what waits, and waits for what runs.
  void stop();

 private:
  static constexpr std::size_t kMostWaiting = 100'000;
  struct Piece {
    Work work;
    std::size_t bytes = 0;
  };
  void run();

  const std::size_t most_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> waiting_;
  std::size_t bytes_ = 0;  ///< of what waits and what runs
  bool running_ = false;   ///< a piece of work
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace llmcache
