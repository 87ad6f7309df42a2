// What a call learnt, and keeps only once it has succeeded.
#pragma once

#include <cstddef>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

namespace llmcache {

/// Steps that put what a call computed into banks and counters, collected while it runs and taken when nothing of it
/// can fail any more. Until then the banks are as they were: nothing is evicted, nothing becomes known, nothing is
/// counted. What a step holds (tensors, leases, pinned entries) lives until the list goes.
///
/// Belongs to one call and its thread. Must not outlive the banks that its steps name.
class DeferredWrites {
 public:
  /// `step`: callable without arguments; it may be movable only.
  template <class Step>
  void add(Step step) {
    steps_.push_back(std::make_unique<Typed<Step>>(std::move(step)));
  }
  [[nodiscard]] std::size_t size() const noexcept { return steps_.size(); }
  /// Drops those behind the first `steps`.
  void cut(std::size_t steps) noexcept {
    steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(steps), steps_.end());
  }
  /// Takes the steps in the order in which they were added, once. One that throws keeps nothing; the others go on.
  void commit() noexcept {
    for (const auto& step : steps_) step->take();
    steps_.clear();
  }

 private:
  struct Any {
    Any() = default;
    Any(const Any&) = delete;
    Any& operator=(const Any&) = delete;
    virtual ~Any() = default;
    virtual void take() noexcept = 0;
  };
  template <class Step>
  struct Typed final : Any {
    explicit Typed(Step&& given) : step(std::move(given)) {}
    void take() noexcept override {
      try {
        step();
      } catch (const std::exception&) {  // no memory to keep it; the call has its answer all the same
        return;
      }
    }
    Step step;
  };

  std::vector<std::unique_ptr<Any>> steps_;
};

}  // namespace llmcache
