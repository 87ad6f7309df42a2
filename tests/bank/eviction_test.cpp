// What holds for every eviction policy. No model and no LibTorch.
#include "llmcache/bank/eviction.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <new>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "eviction_models.h"
#include "eviction_support.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;

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

}  // namespace
}  // namespace llmcache::test
