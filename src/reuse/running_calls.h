// Which calls are running, and for whom.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

namespace llmcache {

/// Calls that are running, so that what one of them has begun for a tenant is not kept once that tenant was erased.
/// Thread-safe, but for Entry::erased(): reading it and erase() exclude each other by a lock of the owner's.
class RunningCalls {
 public:
  /// A call, for as long as it lives. The tenant's name must outlive it.
  class Entry {
   public:
    Entry(RunningCalls& calls, const std::string& tenant) noexcept : calls_(calls), tenant_(tenant) {
      const std::lock_guard lock(calls_.mutex_);
      next_ = calls_.first_;
      if (next_ != nullptr) next_->previous_ = this;
      calls_.first_ = this;
    }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    ~Entry() {
      const std::lock_guard lock(calls_.mutex_);
      (previous_ == nullptr ? calls_.first_ : previous_->next_) = next_;
      if (next_ != nullptr) next_->previous_ = previous_;
    }
    /// The tenant was erased since it began.
    [[nodiscard]] bool erased() const noexcept { return erased_; }

   private:
    friend class RunningCalls;
    RunningCalls& calls_;
    const std::string_view tenant_;
    Entry* previous_ = nullptr;
    Entry* next_ = nullptr;
    bool erased_ = false;
  };

  /// Marks the tenant's calls; returns how many there are.
  std::uint64_t erase(std::string_view tenant) noexcept {
    const std::lock_guard lock(mutex_);
    std::uint64_t count = 0;
    for (Entry* entry = first_; entry != nullptr; entry = entry->next_) {
      if (entry->tenant_ != tenant) continue;
      entry->erased_ = true;
      ++count;
    }
    return count;
  }

 private:
  std::mutex mutex_;
  Entry* first_ = nullptr;
};

}  // namespace llmcache
