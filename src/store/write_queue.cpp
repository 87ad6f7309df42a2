#include "store/write_queue.h"

#include <utility>

namespace llmcache {

bool WriteQueue::add(Work work, std::size_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || waiting_.size() >= kMostWaiting || bytes > most_bytes_ || bytes_ > most_bytes_ - bytes) {
      return false;
    }
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    waiting_.push_back({std::move(work), bytes});
    bytes_ += bytes;
  }
  changed_.notify_all();
  return true;
}

std::uint64_t WriteQueue::waiting() const {
  const std::lock_guard lock(mutex_);
  return waiting_.size() + (running_ ? 1 : 0);
}

void WriteQueue::flush() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || (waiting_.empty() && !running_); });
}

void WriteQueue::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    waiting_.clear();
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void WriteQueue::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    if (stopping_) return;
    Piece piece = std::move(waiting_.front());
    waiting_.pop_front();
    running_ = true;
    lock.unlock();
    piece.work();
    piece.work = nullptr;  // what it holds goes before its bytes are free again
    lock.lock();
    bytes_ -= piece.bytes;
    running_ = false;
    changed_.notify_all();
  }
}

}  // namespace llmcache
