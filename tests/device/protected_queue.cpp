#include "protected_queue.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <limits>
#include <utility>

namespace llmcache::test {

DelayedWork& DelayedWork::instance() {
  static auto* const work = new DelayedWork();  // outlives every tensor
  return *work;
}

void DelayedWork::delay(bool on) {
  delays_ = on;
  if (on) return;
  StreamOrder::Clock all;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [stream, pieces] : waiting_) all[stream] = std::numeric_limits<std::int64_t>::max();
  }
  run(all);
}

void DelayedWork::add(const StreamOrder::Place& stream, std::int64_t time, std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  waiting_[stream].push_back({time, std::move(work)});
}

void DelayedWork::run(const StreamOrder::Clock& until) {
  const std::lock_guard lock(mutex_);
  const c10::InferenceMode inference(false);  // as the thread that gave it may have been
  const c10::NoGradGuard no_grad;
  for (const auto& [stream, time] : until) {
    const auto found = waiting_.find(stream);
    if (found == waiting_.end()) continue;
    auto& pieces = found->second;
    while (!pieces.empty() && pieces.front().time <= time) {
      const Piece next = std::move(pieces.front());
      pieces.pop_front();
      next.work();
    }
  }
}

}  // namespace llmcache::test
