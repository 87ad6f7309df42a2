// Eviction policies and the TTL queue. No model and no LibTorch.
#include "llmcache/bank/eviction.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory_resource>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "llmcache/error.h"
#include "llmcache/refresh/ttl.h"

namespace llmcache {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Slot = std::uint32_t;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr EntryCost kPlain{1000, 1.0};

/// Counts bytes, and refuses allocations when told to.
class CountingResource final : public std::pmr::memory_resource {
 public:
  std::size_t used = 0;
  std::size_t allocations = 0;
  std::optional<std::size_t> allocations_left;  ///< before std::bad_alloc

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (allocations_left) {
      if (*allocations_left == 0) throw std::bad_alloc();
      --*allocations_left;
    }
    void* memory = std::pmr::new_delete_resource()->allocate(bytes, alignment);
    used += bytes;
    ++allocations;
    return memory;
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    used -= bytes;
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

void expect_error(const std::function<void()>& function, const std::string& part) {
  try {
    function();
    FAIL() << "no Error; expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidOptions);
    EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

/// Evicts everything; the slots in order.
template <typename Policy>
std::vector<Slot> drain(Policy& policy, double now_s) {
  std::vector<Slot> order;
  while (const auto slot = policy.victim(now_s)) {
    order.push_back(*slot);
    policy.erase(*slot);
    if (order.size() > 10'000'000) break;
  }
  return order;
}

/// Evicts one; fails the test if nothing is held.
template <typename Policy>
Slot evict(Policy& policy, double now_s = 0) {
  const auto slot = policy.victim(now_s);
  EXPECT_TRUE(slot.has_value());
  if (!slot) return kNoSlot;
  policy.erase(*slot);
  return *slot;
}

// ---- Plain models of the policies: slow, and written from the papers, not from the code.
// -----------------------------

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

// ---- What holds for every policy.
// ------------------------------------------------------------------------------------

template <typename Policy>
class EvictionPolicies : public ::testing::Test {
 protected:
  CountingResource memory_;
  Policy policy_{typename Policy::Config{}, &memory_};
};

using Policies = ::testing::Types<LruPolicy, DecayPolicy, S3FifoPolicy, GdsfPolicy>;

class PolicyNames {
 public:
  template <typename Policy>
  static std::string GetName(int /*index*/) {
    return Policy::kName;
  }
};

TYPED_TEST_SUITE(EvictionPolicies, Policies, PolicyNames);

TYPED_TEST(EvictionPolicies, EmptyHasNoVictimAndTakesNoMemory) {
  EXPECT_EQ(this->policy_.victim(0), std::nullopt);
  EXPECT_EQ(this->policy_.size(), 0U);
  EXPECT_EQ(this->memory_.allocations, 0U);
}

TYPED_TEST(EvictionPolicies, UnknownSlotsAreIgnored) {
  this->policy_.hit(7, 0);
  this->policy_.erase(7);
  this->policy_.insert(3, kPlain, 0);
  this->policy_.hit(7, 1);
  this->policy_.erase(7);
  this->policy_.hit(kNoSlot, 1);
  this->policy_.erase(kNoSlot);
  EXPECT_EQ(this->policy_.size(), 1U);
  EXPECT_FALSE(this->policy_.contains(7));
  EXPECT_EQ(this->policy_.victim(1), 3U);
}

TYPED_TEST(EvictionPolicies, InsertOfAHeldSlotReplacesIt) {
  this->policy_.insert(0, kPlain, 0);
  for (int i = 0; i < 5; ++i) this->policy_.hit(0, 0);
  this->policy_.insert(1, kPlain, 0);
  this->policy_.hit(1, 0);
  this->policy_.hit(1, 0);
  this->policy_.insert(0, kPlain, 0);  // its hits are forgotten
  EXPECT_EQ(this->policy_.size(), 2U);
  if constexpr (std::is_same_v<TypeParam, LruPolicy>) {
    EXPECT_THAT(drain(this->policy_, 0), ElementsAre(1, 0));
  } else {
    EXPECT_THAT(drain(this->policy_, 0), ElementsAre(0, 1));
  }
  EXPECT_EQ(this->policy_.size(), 0U);
}

TYPED_TEST(EvictionPolicies, WithoutHitsTheOldestOfEqualsGoesFirst) {
  for (Slot slot = 0; slot < 50; ++slot) this->policy_.insert((slot * 7) % 50, kPlain, slot);
  const auto order = drain(this->policy_, 50);
  ASSERT_EQ(order.size(), 50U);
  for (Slot i = 0; i < 50; ++i) EXPECT_EQ(order[i], (i * 7) % 50);
}

TYPED_TEST(EvictionPolicies, WhatIsUsedAgainAndAgainStays) {
  this->policy_.insert(0, kPlain, 0);
  for (Slot slot = 1; slot < 1000; ++slot) {
    this->policy_.hit(0, slot);
    this->policy_.hit(0, slot);
    this->policy_.insert(slot, kPlain, slot);
    if (this->policy_.size() > 10) {
      EXPECT_NE(evict(this->policy_, slot), 0U);
    }
  }
  EXPECT_TRUE(this->policy_.contains(0));
}

TYPED_TEST(EvictionPolicies, OrderIsThatInWhichEntriesGo) {
  std::mt19937 generator(7);
  CountingResource memory;
  TypeParam policy({}, &memory);
  EXPECT_TRUE(policy.order().empty());
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 60; ++i) {
      const Slot slot = generator() % 40;
      const double now = round * 60 + i;
      if (policy.contains(slot) && i % 3 != 0) {
        policy.hit(slot, now);
      } else {
        policy.insert(slot, {100 + generator() % 900, static_cast<double>(generator() % 50), slot + 1}, now);
      }
    }
    auto order = policy.order();
    ASSERT_EQ(order.size(), policy.size());
    if constexpr (std::is_same_v<TypeParam, S3FifoPolicy>) {
      // Which queue gives the next victim depends on how full both are by then: only the first is certain.
      const auto hot = policy.order().back();
      EXPECT_NE(hot, *policy.victim(0));
      EXPECT_THAT(order, ::testing::UnorderedElementsAreArray(drain(policy, 0)));
    } else {
      EXPECT_EQ(order, drain(policy, 0));
    }
  }
}

TYPED_TEST(EvictionPolicies, VictimIsHeldAndStaysTheSameUntilErased) {
  std::mt19937 random(1);
  std::set<Slot> held;
  for (int i = 0; i < 30'000; ++i) {
    const Slot slot = random() % 300;
    const double now = i * 0.5;
    switch (random() % 4) {
      case 0:
        this->policy_.insert(slot, {1 + random() % 5000, static_cast<double>(random() % 100), random() % 500}, now);
        held.insert(slot);
        break;
      case 1:
        this->policy_.hit(slot, now);
        break;
      case 2:
        this->policy_.erase(slot);
        held.erase(slot);
        break;
      default:
        const auto victim = this->policy_.victim(now);
        ASSERT_EQ(victim.has_value(), !held.empty());
        if (!victim) break;
        ASSERT_TRUE(held.contains(*victim));
        ASSERT_EQ(this->policy_.victim(now), victim);
        if (random() % 2 == 0) {
          this->policy_.erase(*victim);
          held.erase(*victim);
        }
    }
    ASSERT_EQ(this->policy_.size(), held.size());
    ASSERT_EQ(this->policy_.contains(slot), held.contains(slot));
  }
  const auto order = drain(this->policy_, 1e6);
  EXPECT_EQ(std::set<Slot>(order.begin(), order.end()), held);
  EXPECT_EQ(order.size(), held.size());
  EXPECT_EQ(this->memory_.used, 0U);
}

TYPED_TEST(EvictionPolicies, AgreesWithAPlainModel) {
  for (const unsigned seed : {1U, 2U, 3U}) {
    std::mt19937 random(seed);
    TypeParam policy({}, &this->memory_);
    Model<TypeParam> model;
    std::set<Slot> held;
    double now = 0;
    for (int i = 0; i < 6000; ++i) {
      now += random() % 100 == 0 ? 3000 : random() % 30;
      const Slot slot = random() % 60;
      const auto action = random() % 8;
      if (action < 2) {
        const EntryCost cost{100 + random() % 900, 1.0 + static_cast<double>(random() % 50), 1 + random() % 150};
        policy.insert(slot, cost, now);
        model.insert(slot, cost, now);
        held.insert(slot);
      } else if (action < 6) {
        policy.hit(slot, now);
        if (held.contains(slot)) model.hit(slot, now);
      } else if (action == 6 && random() % 4 == 0) {
        policy.erase(slot);
        if (held.erase(slot) != 0) model.erase(slot, false);
      } else if (!held.empty() && (held.size() > 40 || random() % 2 == 0)) {
        const auto victim = policy.victim(now);
        ASSERT_TRUE(victim && held.contains(*victim));
        model.check(*victim, now);
        if (::testing::Test::HasFailure()) FAIL() << "seed " << seed << ", step " << i;
        policy.erase(*victim);
        model.erase(*victim, true);
        held.erase(*victim);
      }
    }
    EXPECT_GT(held.size(), 0U);
  }
}

TYPED_TEST(EvictionPolicies, TakesAnyCost) {
  const std::vector<EntryCost> costs = {{0, 1},
                                        {0, 0},
                                        {1, kNan},
                                        {1, -5},
                                        {1, kInfinity},
                                        {1, -kInfinity},
                                        {std::numeric_limits<std::size_t>::max(), 1},
                                        {std::numeric_limits<std::size_t>::max(), kInfinity},
                                        {1, std::numeric_limits<double>::denorm_min()},
                                        {1, std::numeric_limits<double>::max()},
                                        kPlain};
  for (int round = 0; round < 3; ++round) {
    for (Slot slot = 0; slot < costs.size(); ++slot) {
      this->policy_.insert(slot, costs[slot], 0);
      this->policy_.hit(slot, 0);
    }
    const auto order = drain(this->policy_, 0);
    EXPECT_EQ(std::set<Slot>(order.begin(), order.end()).size(), costs.size());
    EXPECT_EQ(this->memory_.used, 0U);
  }
}

TYPED_TEST(EvictionPolicies, TakesAnyClock) {
  const std::vector<double> times = {100,   50,  -1e300, kNan, kInfinity, -kInfinity, 101, 1e9,
                                     1e300, 0.0, 1e15,   -1,   kNan,      102,        1e12};
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    const Slot slot = random() % 40;
    this->policy_.insert(slot, kPlain, times[random() % times.size()]);
    this->policy_.hit(random() % 40, times[random() % times.size()]);
    if (round % 3 == 0) evict(this->policy_, times[random() % times.size()]);
  }
  const std::size_t size = this->policy_.size();
  EXPECT_EQ(drain(this->policy_, kNan).size(), size);
  EXPECT_EQ(this->memory_.used, 0U);
}

TYPED_TEST(EvictionPolicies, AClockThatGoesBackStandsStill) {
  TypeParam twin({}, &this->memory_);
  const std::vector<double> real = {1000, 1300, 20, 400, 1299, 1600, 2, 1700};
  const std::vector<double> still = {1000, 1300, 1300, 1300, 1300, 1600, 1600, 1700};
  for (Slot slot = 0; slot < 40; ++slot) {
    for (auto [policy, times] : {std::pair{&this->policy_, &real}, std::pair{&twin, &still}}) {
      const double now = (*times)[slot % times->size()] + 2000 * (slot / times->size());
      policy->insert(slot, kPlain, now);
      policy->hit((slot * slot) % 17, now);
      policy->hit(slot / 2, now);
    }
  }
  EXPECT_EQ(drain(this->policy_, 1), drain(twin, 1e5));
}

TYPED_TEST(EvictionPolicies, GivesAllMemoryBack) {
  for (Slot slot = 0; slot < 5000; ++slot) this->policy_.insert(slot * 3, {10, 1, slot + 1U}, slot);
  EXPECT_GT(this->memory_.used, 0U);
  for (int i = 0; i < 1000; ++i) evict(this->policy_, 5000);
  this->policy_.clear();
  EXPECT_EQ(this->policy_.size(), 0U);
  EXPECT_EQ(this->policy_.victim(5000), std::nullopt);
  EXPECT_EQ(this->memory_.used, 0U);

  for (Slot slot = 0; slot < 5000; ++slot) this->policy_.insert(slot, {10, 1, slot + 1U}, 6000);
  const std::size_t full = this->memory_.used;
  for (Slot slot = 0; slot < 4900; ++slot) this->policy_.erase(slot);
  EXPECT_LT(this->memory_.used, full / 2) << "memory is to go with the entries, not only with the last one";
  EXPECT_EQ(drain(this->policy_, 6000).size(), 100U);
  EXPECT_EQ(this->memory_.used, 0U);
}

TYPED_TEST(EvictionPolicies, AnInsertThatFindsNoMemoryChangesNothing) {
  int failures = 0;
  for (std::size_t allowed = 0; allowed < 12; ++allowed) {
    for (const Slot held : {0U, 1U, 127U, 128U, 300U}) {
      CountingResource memory;
      TypeParam policy({}, &memory);
      TypeParam twin({}, std::pmr::new_delete_resource());
      for (Slot slot = 0; slot < held; ++slot) {
        for (auto* each : {&policy, &twin}) {
          each->insert(slot, {10 + slot, 1, slot + 1U}, slot);
          each->hit(slot / 3, slot);
        }
      }
      const std::size_t before = memory.used;
      memory.allocations_left = allowed;
      bool failed = false;
      try {
        policy.insert(held + 100'000, kPlain, 500);
      } catch (const std::bad_alloc&) {
        failed = true;
        ++failures;
      }
      memory.allocations_left.reset();
      if (failed) {
        EXPECT_EQ(policy.size(), held);
        EXPECT_FALSE(policy.contains(held + 100'000));
        if (held == 0) {
          EXPECT_EQ(memory.used, before);
        }
        EXPECT_EQ(drain(policy, 600), drain(twin, 600));
      } else {
        EXPECT_EQ(policy.size(), held + 1);
      }
    }
  }
  EXPECT_GE(failures, 5);
}

TYPED_TEST(EvictionPolicies, OnlyInsertNeedsMemory) {
  for (Slot slot = 0; slot < 500; ++slot) this->policy_.insert(slot, {10, 1.0 + slot, slot + 1U}, slot);
  this->memory_.allocations_left = 0;
  for (Slot slot = 0; slot < 500; ++slot) {
    this->policy_.hit(slot, 500 + 20 * slot);
    this->policy_.hit(slot / 2, 500 + 20 * slot);
  }
  this->policy_.insert(3, kPlain, 11'000);  // held already
  EXPECT_EQ(drain(this->policy_, 12'000).size(), 500U);
}

TYPED_TEST(EvictionPolicies, CostOfAnOperationDoesNotGrowWithTheEntries) {
  std::vector<double> steps_per_call;
  for (const Slot entries : {10'000U, 1'000'000U}) {
    std::mt19937 random(9);
    TypeParam policy({}, &this->memory_);
    double now = 0;
    std::uint64_t calls = 0;
    const auto tick = [&] {
      ++calls;
      return now += 0.01;
    };
    const auto cost = [&](std::uint64_t key) {
      return EntryCost{1000 + random() % 100'000, static_cast<double>(random() % 1000), key};
    };
    for (Slot slot = 0; slot < entries; ++slot) policy.insert(slot, cost(slot + 1U), tick());
    for (Slot i = 0; i < entries; ++i) policy.hit(random() % entries, tick());
    for (Slot i = 0; i < entries; ++i) {
      const auto victim = policy.victim(tick());
      ASSERT_TRUE(victim);
      policy.erase(*victim);
      policy.insert(*victim, cost(random() % (4 * entries) + 1), tick());
      ++calls;  // erase
    }
    EXPECT_EQ(policy.size(), entries);
    steps_per_call.push_back(static_cast<double>(policy.steps()) / static_cast<double>(calls));
    policy.clear();
    EXPECT_EQ(this->memory_.used, 0U);
  }
  EXPECT_LT(steps_per_call[1], 25);
  EXPECT_LT(steps_per_call[1], 1.5 * steps_per_call[0] + 1);
}

// ---- Each policy's own ways.
// -----------------------------------------------------------------------------------------

TEST(EvictionLru, EvictsInOrderOfLastUse) {
  LruPolicy policy({}, std::pmr::new_delete_resource());
  for (Slot slot = 0; slot < 5; ++slot) policy.insert(slot, kPlain, 0);
  policy.hit(0, 0);
  policy.hit(3, 0);
  policy.hit(0, 0);
  EXPECT_THAT(drain(policy, 0), ElementsAre(1, 2, 4, 3, 0));
}

/// Inserts and hits `hot` slots, lets `scan` others pass that nobody asks for again, holds `capacity`; how many of the
/// hot ones are left.
template <typename Policy>
std::size_t survivors(Policy& policy, Slot hot, Slot scan, std::size_t capacity) {
  for (Slot slot = 0; slot < hot; ++slot) policy.insert(slot, {1, 1, slot + 1U}, 0);
  for (int round = 0; round < 3; ++round) {
    for (Slot slot = 0; slot < hot; ++slot) policy.hit(slot, 1);
  }
  for (Slot slot = hot; slot < hot + scan; ++slot) {
    policy.insert(slot, {1, 1, slot + 1U}, 2);
    while (policy.size() > capacity) evict(policy, 2);
  }
  std::size_t left = 0;
  for (Slot slot = 0; slot < hot; ++slot) left += policy.contains(slot) ? 1 : 0;
  return left;
}

TEST(EvictionS3Fifo, AScanDoesNotFlushIt) {
  S3FifoPolicy s3_fifo({}, std::pmr::new_delete_resource());
  LruPolicy lru({}, std::pmr::new_delete_resource());
  EXPECT_EQ(survivors(s3_fifo, 90, 5000, 100), 90U);
  EXPECT_EQ(survivors(lru, 90, 5000, 100), 0U);
}

TEST(EvictionS3Fifo, AnEntryThatComesBackSoonGoesToTheMainQueue) {
  for (const bool known : {true, false}) {
    S3FifoPolicy policy({}, std::pmr::new_delete_resource());
    for (Slot slot = 0; slot < 100; ++slot) policy.insert(slot, {1, 1, slot + 1U}, 0);
    EXPECT_EQ(evict(policy), 0U);
    EXPECT_EQ(policy.ghosts(), 1U);
    policy.insert(0, {1, 1, known ? 1U : 1000U}, 0);  // content of key 1 was evicted
    EXPECT_EQ(policy.ghosts(), known ? 0U : 1U);
    for (Slot slot = 100; slot < 300; ++slot) {
      policy.insert(slot, {1, 1, slot + 5000U}, 0);
      evict(policy);
    }
    EXPECT_EQ(policy.contains(0), known) << "200 others have passed through the small queue";
  }
}

TEST(EvictionS3Fifo, OnlyEvictionsWithAKeyAreRemembered) {
  S3FifoPolicy policy({}, std::pmr::new_delete_resource());
  for (Slot slot = 0; slot < 20; ++slot) policy.insert(slot, {1, 1, slot < 10 ? slot + 1U : 0U}, 0);
  policy.erase(5);
  EXPECT_EQ(policy.ghosts(), 0U) << "dropped, not evicted";
  ASSERT_EQ(policy.victim(0), 0U);
  policy.hit(0, 0);
  policy.erase(0);
  EXPECT_EQ(policy.ghosts(), 0U) << "used after it was named a victim";
  EXPECT_EQ(evict(policy), 1U);
  EXPECT_EQ(policy.ghosts(), 1U);
  for (Slot slot : {2U, 3U, 4U, 6U, 7U, 8U, 9U}) EXPECT_EQ(evict(policy), slot);
  EXPECT_EQ(policy.ghosts(), 8U);
  EXPECT_EQ(evict(policy), 10U);
  EXPECT_EQ(policy.ghosts(), 8U) << "no key";
  EXPECT_EQ(evict(policy), 11U);
  EXPECT_EQ(policy.ghosts(), 7U) << "nine of ten of the eight that are held";
}

TEST(EvictionS3Fifo, AHitSparesAnEntryOfTheMainQueueOnce) {
  S3FifoPolicy policy({}, std::pmr::new_delete_resource());
  for (Slot slot = 0; slot < 3; ++slot) {
    policy.insert(slot, {1, 1, slot + 1U}, 0);
    policy.hit(slot, 0);
    policy.hit(slot, 0);
  }
  ASSERT_EQ(policy.victim(0), 0U);  // all three have moved to the main queue, and lost their hits
  policy.hit(0, 0);
  EXPECT_THAT(drain(policy, 0), ElementsAre(1, 2, 0));
}

TEST(EvictionS3Fifo, TheSmallQueueHasItsShareInBytes) {
  S3FifoPolicy policy({}, std::pmr::new_delete_resource());
  policy.insert(0, {1000, 1, 1}, 0);
  policy.hit(0, 0);
  policy.hit(0, 0);
  policy.insert(1, {90, 1, 2}, 0);
  ASSERT_EQ(policy.victim(0), 0U) << "90 of 1,090 bytes are the small queue's share";
  policy.insert(2, {90, 1, 3}, 0);
  EXPECT_EQ(policy.victim(0), 1U) << "180 of 1,180 bytes are more";
}

TEST(EvictionS3Fifo, GhostsThatFindNoMemoryAreDoneWithout) {
  CountingResource memory;
  S3FifoPolicy policy({}, &memory);
  for (Slot slot = 0; slot < 100; ++slot) policy.insert(slot, {1, 1, slot + 1U}, 0);
  for (std::size_t allowed = 0; allowed < 6; ++allowed) {
    memory.allocations_left = allowed;
    evict(policy);
  }
  memory.allocations_left.reset();
  EXPECT_EQ(policy.size(), 94U);
  EXPECT_GT(policy.ghosts(), 0U);
  EXPECT_LT(policy.ghosts(), 6U);
  EXPECT_EQ(drain(policy, 0).size(), 94U);
  EXPECT_EQ(memory.used, 0U);
}

class EvictionDecay : public ::testing::Test {
 protected:
  DecayPolicy policy{{.half_life_s = 10}, std::pmr::new_delete_resource()};
};

TEST_F(EvictionDecay, ScoreIsTheSumOfHalvedUses) {
  policy.insert(0, kPlain, 100);
  policy.hit(0, 110);
  policy.hit(0, 120);
  EXPECT_DOUBLE_EQ(policy.score(0, 120), 1.75);
  EXPECT_DOUBLE_EQ(policy.score(0, 130), 0.875);
  EXPECT_DOUBLE_EQ(policy.score(0, 100), 1.75) << "time does not go back";
  EXPECT_EQ(policy.score(1, 130), 0);
}

TEST_F(EvictionDecay, PrefersFrequentAmongEquallyRecent) {
  policy.insert(0, kPlain, 0);
  policy.insert(1, kPlain, 0);
  policy.insert(2, kPlain, 0);
  for (int i = 0; i < 6; ++i) policy.hit(0, 1);
  for (int i = 0; i < 3; ++i) policy.hit(2, 1);
  policy.hit(1, 2);
  EXPECT_THAT(drain(policy, 2), ElementsAre(1, 2, 0));
}

TEST_F(EvictionDecay, OldFameFades) {
  policy.insert(0, kPlain, 0);
  for (int i = 0; i < 7; ++i) policy.hit(0, 0);  // 8 uses: worth one new use after 3 half-lives
  policy.insert(1, kPlain, 29);
  ASSERT_EQ(policy.victim(29), 1U);
  policy.erase(1);
  policy.insert(2, kPlain, 31);
  EXPECT_EQ(policy.victim(31), 0U);
}

TEST_F(EvictionDecay, AHalfLifeCanMakeItLruOrLfu) {
  for (const double half_life : {1e-3, 1e12}) {
    DecayPolicy any({.half_life_s = half_life}, std::pmr::new_delete_resource());
    for (Slot slot = 0; slot < 10; ++slot) {
      any.insert(slot, kPlain, slot);
      for (Slot i = 10; i > slot; --i) any.hit(slot, slot + 0.5);
    }
    const auto order = drain(any, 10);
    ASSERT_EQ(order.size(), 10U);
    EXPECT_EQ(order.front(), half_life < 1 ? 0U : 9U);
    EXPECT_EQ(order.back(), half_life < 1 ? 9U : 0U);
  }
}

TEST_F(EvictionDecay, OrderSurvivesIdleYearsAndLongRuns) {
  for (Slot slot = 0; slot < 100; ++slot) policy.insert(slot, kPlain, 3.0 * ((slot * 37) % 100));
  double now = 0;
  for (int year = 1; year <= 50; ++year) {
    now = year * 3.15e7;
    policy.insert(1000, kPlain, now);
    policy.hit(1000, now + 1);
    policy.insert(1001, kPlain, now + 1);
    ASSERT_NE(policy.victim(now + 1), 1000U);
    policy.erase(1001);
    policy.erase(1000);
  }
  // Time stood still at 0, 3 * 37, ... whenever an insertion was older than one before it.
  const auto order = drain(policy, now);
  ASSERT_EQ(order.size(), 100U);
  std::vector<double> times;
  double latest = 0;
  std::vector<double> inserted(100);
  for (Slot slot = 0; slot < 100; ++slot) inserted[slot] = latest = std::max(latest, 3.0 * ((slot * 37) % 100));
  for (const Slot slot : order) times.push_back(inserted[slot]);
  EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
}

TEST_F(EvictionDecay, TheTopOfTheBucketsIsABound) {
  DecayPolicy slow({.half_life_s = 1e12}, std::pmr::new_delete_resource());
  slow.insert(0, kPlain, 0);
  slow.insert(1, kPlain, 0);
  for (int i = 0; i < 3'000'000; ++i) slow.hit(0, 0);
  for (int i = 0; i < 2'000'000; ++i) slow.hit(1, 0);
  EXPECT_DOUBLE_EQ(slow.score(0, 0), 3'000'001);
  EXPECT_EQ(slow.victim(0), 1U);
}

class EvictionGdsf : public ::testing::Test {
 protected:
  /// Inserts, evicts the victim if more than `capacity` are held, and says which that was.
  Slot replace(Slot slot, const EntryCost& cost) {
    policy.insert(slot, cost, 0);
    return evict(policy);
  }
  GdsfPolicy policy{{}, std::pmr::new_delete_resource()};
};

TEST_F(EvictionGdsf, PrefersCostlyAndSmall) {
  policy.insert(0, {1000, 10}, 0);
  policy.insert(1, {1000, 20}, 0);  // costlier
  policy.insert(2, {250, 10}, 0);   // smaller
  policy.insert(3, {4000, 10}, 0);  // larger
  EXPECT_THAT(drain(policy, 0), ElementsAre(3, 0, 1, 2));
}

TEST_F(EvictionGdsf, UsesCountLikeCost) {
  policy.insert(0, {1000, 10}, 0);
  policy.insert(1, {1000, 25}, 0);
  policy.hit(0, 0);
  policy.hit(0, 0);
  EXPECT_THAT(drain(policy, 0), ElementsAre(1, 0));
}

TEST_F(EvictionGdsf, UsesCanBeBounded) {
  GdsfPolicy size_only({.most_uses = 1}, std::pmr::new_delete_resource());
  size_only.insert(0, {1000, 10}, 0);
  size_only.insert(1, {1000, 25}, 0);
  for (int i = 0; i < 10; ++i) size_only.hit(0, 0);
  EXPECT_THAT(drain(size_only, 0), ElementsAre(0, 1));
}

TEST_F(EvictionGdsf, CostlyEntriesAgeToo) {
  policy.insert(0, {1, 8}, 0);
  policy.insert(1, {1, 1}, 0);
  // One cheap entry is held beside the one that comes in, so the clock moves by 1 with every other eviction.
  int evictions = 0;
  for (Slot slot = 2; policy.contains(0) && evictions < 100; ++evictions) replace(slot++, {1, 1});
  EXPECT_GE(evictions, 13);
  EXPECT_LE(evictions, 18);
}

TEST_F(EvictionGdsf, AnErasureThatIsNoEvictionMovesNoClock) {
  policy.insert(0, {1, 4}, 0);
  policy.insert(1, {1, 2}, 0);
  for (Slot i = 10; i < 20; ++i) {
    policy.insert(i, {1, 1}, 0);
    policy.erase(i);  // not asked for a victim
  }
  policy.insert(2, {1, 1}, 0);
  EXPECT_THAT(drain(policy, 0), ElementsAre(2, 1, 0));
}

TEST_F(EvictionGdsf, SmallWorthsAgeAfterVeryLargeOnes) {
  constexpr double kLarge = 0x1p20;
  constexpr double kSmall = 0x1p-38;
  policy.insert(0, {1, 4 * kLarge}, 0);
  policy.insert(1, {1, kLarge}, 0);
  EXPECT_EQ(evict(policy), 1U);  // the clock is at 2^20, where 2^-38 is nothing
  policy.insert(2, {1, kSmall}, 0);
  EXPECT_EQ(replace(3, {1, kSmall}), 2U);
  policy.insert(4, {1, 4 * kSmall}, 0);
  int evictions = 0;
  Slot slot = 100;
  for (; policy.contains(4) && evictions < 100; ++evictions) replace(slot++, {1, kSmall});
  EXPECT_GE(evictions, 5);
  EXPECT_LE(evictions, 12);
  EXPECT_TRUE(policy.contains(0));
}

TEST_F(EvictionGdsf, RoundingMixesNoWorthsThatDifferByMoreThanASixteenth) {
  for (const double worth : {0x1p-39, 1e-9, 3e-5, 0.7, 1.0, 5.3e4, 0x1p23}) {
    policy.insert(0, {1, worth * 1.07}, 0);
    policy.insert(1, {1, worth}, 0);
    EXPECT_THAT(drain(policy, 0), ElementsAre(1, 0)) << worth;
  }
}

// ---- The choice when the program runs.
// -------------------------------------------------------------------------------

TEST(EvictionOptionsTest, NamesAreReadBack) {
  for (const auto* name : {"lru", "decay", "s3fifo", "gdsf"}) {
    const Eviction eviction = eviction_from_string(name);
    EXPECT_STREQ(to_string(eviction), name);
    EvictionPolicy policy({.policy = eviction}, std::pmr::new_delete_resource());
    EXPECT_STREQ(policy.name(), name);
    policy.insert(1, kPlain, 0);
    policy.insert(2, kPlain, 0);
    policy.hit(1, 0);
    policy.hit(1, 0);
    EXPECT_TRUE(policy.contains(1));
    EXPECT_GE(policy.steps(), 3U);
    EXPECT_THAT(drain(policy, 0), ElementsAre(2, 1));
    policy.insert(1, kPlain, 0);
    policy.clear();
    EXPECT_EQ(policy.size(), 0U);
  }
  expect_error([] { eviction_from_string("LRU"); }, "'LRU' is no eviction policy");
}

TEST(EvictionOptionsTest, BadFieldsAreNamed) {
  EXPECT_NO_THROW(EvictionOptions{}.validate());
  const auto refused = [](const std::function<void(EvictionOptions&)>& change, const std::string& part) {
    EvictionOptions options;
    change(options);
    expect_error([&] { options.validate(); }, part);
    expect_error([&] { EvictionPolicy(options, std::pmr::new_delete_resource()); }, part);
  };
  refused([](auto& o) { o.policy = static_cast<Eviction>(9); }, "EvictionOptions.policy is 9");
  for (const double bad : {0.0, -1.0, kNan, kInfinity, 1e13}) {
    refused([&](auto& o) { o.decay.half_life_s = bad; }, "half_life_s");
  }
  for (const double bad : {-0.1, 1.1, kNan}) {
    refused([&](auto& o) { o.s3_fifo.small_share = bad; }, "small_share");
  }
  for (const double bad : {-0.1, 101.0, kNan}) {
    refused([&](auto& o) { o.s3_fifo.ghost_share = bad; }, "ghost_share");
  }
  refused([](auto& o) { o.s3_fifo.hits_to_stay = 0; }, "hits_to_stay");
  refused([](auto& o) { o.s3_fifo.most_hits = 1; }, "most_hits");
  refused([](auto& o) { o.gdsf.most_uses = 0; }, "most_uses");
}

// ---- Time to live.
// ---------------------------------------------------------------------------------------------------

class EvictionTtl : public ::testing::Test {
 protected:
  CountingResource memory;
  TtlQueue queue{60, &memory};
};

TEST_F(EvictionTtl, EntriesExpireInTheOrderTheyCame) {
  queue.insert(5, 1000);
  queue.insert(2, 1010);
  queue.insert(9, 1020);
  EXPECT_EQ(queue.expired(1059.9), std::nullopt);
  EXPECT_EQ(queue.expired(1060), 5U);
  EXPECT_EQ(queue.expired(1060), 5U) << "held until it is erased";
  queue.erase(5);
  EXPECT_EQ(queue.expired(1060), std::nullopt);
  queue.erase(2);
  EXPECT_EQ(queue.expired(1075), std::nullopt);
  EXPECT_EQ(queue.expired(5000), 9U);
  EXPECT_EQ(queue.size(), 1U);
}

TEST_F(EvictionTtl, ASecondInsertionStartsAnew) {
  queue.insert(1, 0);
  queue.insert(2, 10);
  queue.insert(1, 30);
  EXPECT_EQ(queue.size(), 2U);
  EXPECT_EQ(queue.expired(75), 2U);
  queue.erase(2);
  EXPECT_EQ(queue.expired(75), std::nullopt);
  EXPECT_EQ(queue.expired(90), 1U);
}

TEST_F(EvictionTtl, AClockThatGoesBackExpiresNothingEarly) {
  queue.insert(1, 1000);
  EXPECT_EQ(queue.expired(-1e6), std::nullopt);
  queue.insert(2, 10);  // the clock was set back; time stands still at 1000
  EXPECT_EQ(queue.expired(500), std::nullopt);
  EXPECT_EQ(queue.expired(kNan), std::nullopt);
  EXPECT_EQ(queue.expired(kInfinity), std::nullopt);
  EXPECT_EQ(queue.expired(1059), std::nullopt);
  EXPECT_EQ(queue.expired(1060), 1U);
  queue.erase(1);
  EXPECT_EQ(queue.expired(1060), 2U);
}

TEST_F(EvictionTtl, WithoutLimitNothingExpires) {
  for (const double ttl : {0.0, kInfinity}) {
    TtlQueue never(ttl, &memory);
    EXPECT_FALSE(never.limited());
    never.insert(1, 0);
    EXPECT_EQ(never.expired(1e12), std::nullopt);
    EXPECT_EQ(memory.used, 0U);
  }
  EXPECT_TRUE(queue.limited());
  expect_error([&] { TtlQueue(kNan, &memory); }, "ttl_seconds");
  expect_error([&] { TtlQueue(-1, &memory); }, "ttl_seconds");
}

TEST_F(EvictionTtl, UnknownSlotsAreIgnoredAndMemoryComesBack) {
  queue.erase(3);
  EXPECT_EQ(queue.expired(0), std::nullopt);
  for (Slot slot = 0; slot < 1000; ++slot) queue.insert(slot, slot);
  queue.erase(5000);
  for (Slot slot = 0; slot < 1000; slot += 2) queue.erase(slot);
  EXPECT_EQ(queue.size(), 500U);
  EXPECT_EQ(queue.expired(1e6), 1U);
  queue.clear();
  EXPECT_EQ(queue.expired(1e6), std::nullopt);
  EXPECT_EQ(memory.used, 0U);
}

TEST_F(EvictionTtl, AnInsertThatFindsNoMemoryChangesNothing) {
  queue.insert(1, 0);
  memory.allocations_left = 0;
  EXPECT_THROW(queue.insert(1000, 50), std::bad_alloc);
  EXPECT_NO_THROW(queue.insert(2, 50));  // room in the page that is there
  EXPECT_EQ(queue.size(), 2U);
  EXPECT_EQ(queue.expired(60), 1U);
  queue.erase(1);
  EXPECT_EQ(queue.expired(110), 2U);
}

}  // namespace
}  // namespace llmcache
