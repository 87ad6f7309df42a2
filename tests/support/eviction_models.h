// Plain models of the eviction policies: slow, and written from the papers, not from the code.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "eviction_support.h"

namespace llmcache::test {

/// A policy's plain model has insert, hit, erase, evict (erase of the victim) and `check`, which says whether a victim
/// is one that the policy may choose.
template <typename Policy>
class Model;

template <>
class Model<LruPolicy> {
 public:
  void insert(Slot slot, const EntryCost&, double) { use(slot); }
  void hit(Slot slot, double) { use(slot); }
  void erase(Slot slot, bool /*evicted*/) { std::erase(order_, slot); }
  void check(Slot victim, double) { EXPECT_EQ(victim, order_.front()); }

 private:
  void use(Slot slot) {
    std::erase(order_, slot);
    order_.push_back(slot);
  }
  std::vector<Slot> order_;
};

template <>
class Model<DecayPolicy> {
 public:
  void insert(Slot slot, const EntryCost&, double now) { uses_[slot] = {now}; }
  void hit(Slot slot, double now) { uses_[slot].push_back(now); }
  void erase(Slot slot, bool /*evicted*/) { uses_.erase(slot); }
  void check(Slot victim, double now) {
    double lowest = kInfinity;
    for (const auto& [slot, times] : uses_) lowest = std::min(lowest, score(times, now));
    EXPECT_LE(score(uses_.at(victim), now), lowest * std::exp2(1.0 / 32) * (1 + 1e-9));
  }

 private:
  static double score(const std::vector<double>& times, double now) {
    double sum = 0;
    for (const double time : times) sum += std::exp2(-(now - time) / DecayPolicy::Config{}.half_life_s);
    return sum;
  }
  std::map<Slot, std::vector<double>> uses_;
};

template <>
class Model<S3FifoPolicy> {
 public:
  void insert(Slot slot, const EntryCost& cost, double) {
    forget(slot);
    const auto ghost = std::find(ghosts_.begin(), ghosts_.end(), cost.key);
    const bool known = ghost != ghosts_.end();
    if (known) ghosts_.erase(ghost);
    (known ? main_ : small_).push_back({slot, cost.key, cost.bytes, 0});
  }
  void hit(Slot slot, double) {
    for (auto* queue : {&small_, &main_}) {
      for (Entry& entry : *queue) {
        if (entry.slot == slot) entry.hits = std::min(entry.hits + 1, 3);
      }
    }
  }
  void erase(Slot slot, bool evicted) {
    for (const Entry& entry : small_) {
      if (entry.slot != slot || !evicted) continue;
      std::erase(ghosts_, entry.key);
      ghosts_.push_back(entry.key);
    }
    forget(slot);
    while (static_cast<double>(ghosts_.size()) > 0.9 * static_cast<double>(small_.size() + main_.size())) {
      ghosts_.pop_front();
    }
  }
  void check(Slot victim, double) {
    for (;;) {
      const double small = bytes(small_);
      const bool from_small = main_.empty() || (!small_.empty() && small > 0.1 * (small + bytes(main_)));
      Entry entry = from_small ? small_.front() : main_.front();
      if (from_small ? entry.hits < 2 : entry.hits == 0) {
        EXPECT_EQ(victim, entry.slot);
        return;
      }
      (from_small ? small_ : main_).pop_front();
      entry.hits = from_small ? 0 : entry.hits - 1;
      main_.push_back(entry);
    }
  }

 private:
  struct Entry {
    Slot slot;
    std::uint64_t key;
    std::size_t bytes;
    int hits;
  };
  using Queue = std::deque<Entry>;

  static double bytes(const Queue& queue) {
    double sum = 0;
    for (const Entry& entry : queue) sum += static_cast<double>(entry.bytes);
    return sum;
  }
  void forget(Slot slot) {
    for (auto* queue : {&small_, &main_}) {
      std::erase_if(*queue, [&](const Entry& entry) { return entry.slot == slot; });
    }
  }
  Queue small_;
  Queue main_;
  std::deque<std::uint64_t> ghosts_;
};

template <>
class Model<GdsfPolicy> {
 public:
  void insert(Slot slot, const EntryCost& cost, double) {
    entries_[slot] = {cost.saved_ms / static_cast<double>(cost.bytes), 1, 0};
    rank(slot);
  }
  void hit(Slot slot, double) {
    ++entries_[slot].uses;
    rank(slot);
  }
  void erase(Slot slot, bool evicted) {
    if (evicted) clock_ = entries_.at(slot).priority;
    entries_.erase(slot);
    if (entries_.empty()) clock_ = 0;
  }
  void check(Slot victim, double) {
    double lowest = kInfinity;
    for (const auto& [slot, entry] : entries_) lowest = std::min(lowest, entry.priority);
    EXPECT_NEAR(entries_.at(victim).priority, lowest, 1e-9 * lowest);
  }

 private:
  struct Entry {
    double worth;
    int uses;
    double priority;
  };
  /// Down to a sixteenth of an octave.
  static double rounded(double worth) {
    double octave = 1;
    while (octave > worth) octave /= 2;
    while (octave * 2 <= worth) octave *= 2;
    return octave * (1 + std::floor((worth / octave - 1) * 16) / 16);
  }
  void rank(Slot slot) {
    Entry& entry = entries_.at(slot);
    entry.priority = clock_ + rounded(entry.worth * entry.uses);
  }
  std::map<Slot, Entry> entries_;
  double clock_ = 0;
};

}  // namespace llmcache::test
