// Each eviction policy's own ways, and the choice among them when the program runs. No model and no LibTorch.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory_resource>
#include <optional>
#include <string>
#include <vector>

#include "eviction_support.h"
#include "llmcache/bank/eviction.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;

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

}  // namespace
}  // namespace llmcache::test
