// Objects that a graph finds by their number.
#pragma once

#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace llmcache {

/// Those of one kind that live. Thread-safe.
template <class T>
class Numbered {
 public:
  std::int64_t add(const T* object) {
    const std::unique_lock lock(mutex_);
    objects_.emplace(++last_, object);
    return last_;
  }
  void remove(std::int64_t number) {
    const std::unique_lock lock(mutex_);
    objects_.erase(number);
  }
  /// Null if it is gone.
  [[nodiscard]] const T* find(std::int64_t number) const {
    const std::shared_lock lock(mutex_);
    const auto found = objects_.find(number);
    return found == objects_.end() ? nullptr : found->second;
  }
  /// Outlives every model, static ones included.
  static Numbered& all() {
    static auto* const made = new Numbered;
    return *made;
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::int64_t, const T*> objects_;
  std::int64_t last_ = 0;
};

}  // namespace llmcache
