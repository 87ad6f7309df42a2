// A store in this process whose failures a test decides.
#pragma once

#include <llmcache/store/state_store.h>
#include <llmcache/store/tier_counter.h>

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

namespace llmcache::test {

class MemoryStore final : public StateStore {
 public:
  std::string name() const override { return "memory"; }
  StoreValues get(std::span<const std::string> keys, StoreDeadline deadline) override {
    StoreValues found;
    found.values.resize(keys.size());
    found.outcome = outcome;
    if (outcome == StoreOutcome::kTimeout) std::this_thread::sleep_until(deadline);
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(delay_ms.load()));
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < keys.size() && outcome == StoreOutcome::kDone; ++i) {
      const auto place = values_.find(keys[i]);
      if (place != values_.end()) found.values[i] = place->second;
    }
    counter_.looked_up(found);
    counter_.ended(found.outcome, "as the test wants it");
    return found;
  }
  StoreOutcome put(std::span<const StoreItem> items, StoreDeadline /*deadline*/) override {
    const std::lock_guard lock(mutex_);
    if (put_outcome != StoreOutcome::kDone) return put_outcome;
    for (const StoreItem& item : items) values_[std::string(item.key)] = std::string(item.value);
    for (const StoreItem& item : items) counter_.written(item.value.size());
    return StoreOutcome::kDone;
  }
  std::vector<bool> exists(std::span<const std::string> keys, StoreDeadline /*deadline*/) override {
    const std::lock_guard lock(mutex_);
    std::vector<bool> known;
    for (const std::string& key : keys) known.push_back(values_.contains(key));
    return known;
  }
  StoreOutcome erase(std::span<const std::string> keys, StoreDeadline /*deadline*/) override {
    const std::lock_guard lock(mutex_);
    for (const std::string& key : keys) values_.erase(key);
    return StoreOutcome::kDone;
  }
  StoreOutcome erase_prefix(std::string_view prefix, StoreDeadline /*deadline*/) override {
    const std::lock_guard lock(mutex_);
    if (erase_outcome != StoreOutcome::kDone) return erase_outcome;
    std::erase_if(values_, [&](const auto& one) { return one.first.starts_with(prefix); });
    return StoreOutcome::kDone;
  }
  std::vector<TierStats> stats() const override {
    TierStats stats = counter_.stats();
    stats.name = name();
    return {stats};
  }

  [[nodiscard]] std::map<std::string, std::string> values() const {
    const std::lock_guard lock(mutex_);
    return values_;
  }
  void set(std::map<std::string, std::string> values) {
    const std::lock_guard lock(mutex_);
    values_ = std::move(values);
  }

  std::atomic<StoreOutcome> outcome = StoreOutcome::kDone;        ///< of get()
  std::atomic<StoreOutcome> put_outcome = StoreOutcome::kDone;    ///< of put()
  std::atomic<StoreOutcome> erase_outcome = StoreOutcome::kDone;  ///< of erase_prefix()
  std::atomic<double> delay_ms = 0;                               ///< of get()

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::string> values_;
  TierCounter counter_;
};

}  // namespace llmcache::test
