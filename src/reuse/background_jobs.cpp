#include "reuse/background_jobs.h"

#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>

#include <utility>

#include "model/stream_fence.h"

namespace llmcache {

BackgroundJobs::BackgroundJobs(at::Device device) : device_(device) {
  thread_ = std::thread([this] { run(); });
}

BackgroundJobs::~BackgroundJobs() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

bool BackgroundJobs::add(Work work, std::size_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (jobs_.size() >= kMostWaiting || (!jobs_.empty() && bytes_ + bytes > kMostBytes)) {
      ++dropped_;
      return false;
    }
    jobs_.push_back({std::move(work), current_stream(device_), bytes});
    bytes_ += bytes;
  }
  changed_.notify_all();
  return true;
}

std::uint64_t BackgroundJobs::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

std::uint64_t BackgroundJobs::waiting() const {
  const std::lock_guard lock(mutex_);
  return jobs_.size();
}

void BackgroundJobs::run() {
  const c10::NoGradGuard no_grad;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job& job = jobs_.front();  // a deque's elements stay where they are while others are added
    lock.unlock();
    try {
      const c10::OptionalStreamGuard guard(job.stream);
      job.work();
    } catch (...) {
      // The request itself has been answered, and the job has told whom it concerns.
    }
    lock.lock();
    bytes_ -= job.bytes;
    jobs_.pop_front();
  }
}

}  // namespace llmcache
