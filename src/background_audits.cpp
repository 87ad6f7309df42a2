#include "background_audits.h"

#include <c10/core/GradMode.h>

#include <exception>
#include <utility>

namespace llmcache {

BackgroundAudits::BackgroundAudits() {
  thread_ = std::thread([this] { work(); });
}

BackgroundAudits::~BackgroundAudits() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void BackgroundAudits::add(Audit audit) {
  {
    const std::lock_guard lock(mutex_);
    if (audits_.size() >= kMostWaiting) {
      ++dropped_;
      return;
    }
    audits_.push_back(std::move(audit));
  }
  changed_.notify_all();
}

std::uint64_t BackgroundAudits::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

std::uint64_t BackgroundAudits::waiting() const {
  const std::lock_guard lock(mutex_);
  return audits_.size();
}

void BackgroundAudits::work() {
  const c10::NoGradGuard no_grad;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !audits_.empty(); });
    if (stopping_) return;
    const Audit& audit = audits_.front();  // a deque's elements stay where they are while others are added
    lock.unlock();
    try {
      audit();
    } catch (const std::exception&) {
      // Not known then, as if it had not been chosen. The request itself has been answered.
    }
    lock.lock();
    audits_.pop_front();
  }
}

}  // namespace llmcache
