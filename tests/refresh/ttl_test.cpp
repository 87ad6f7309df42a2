// The queue that tells which entries have expired. No model and no LibTorch.
#include "llmcache/refresh/ttl.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <vector>

#include "eviction_support.h"

namespace llmcache::test {
namespace {

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

TEST_F(EvictionTtl, OneMayBeMadeAsOldAsAnother) {
  queue.insert(1, 0);
  queue.insert(2, 10);
  queue.insert(3, 20);
  queue.make_as_old(3, 2);
  queue.make_as_old(3, 3);
  queue.make_as_old(3, 77);
  queue.make_as_old(77, 3);
  EXPECT_EQ(queue.size(), 3U);
  EXPECT_EQ(queue.expired(69), 1U);
  EXPECT_EQ(queue.expired(69, 1), std::nullopt) << "behind the first";
  EXPECT_EQ(queue.expired(70, 1), 3U);
  EXPECT_EQ(queue.expired(70, 3), 2U);
  EXPECT_EQ(queue.expired(70, 2), std::nullopt);
  EXPECT_EQ(queue.expired(70, 77), 1U) << "it is not held: from the start";
  queue.make_as_old(2, 1);  // to the front
  queue.erase(1);
  EXPECT_EQ(queue.expired(70), 2U);
  queue.erase(2);
  EXPECT_EQ(queue.expired(70), 3U);
  queue.erase(3);
  EXPECT_EQ(queue.expired(70), std::nullopt);
  EXPECT_EQ(memory.used, 0U);
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
}  // namespace llmcache::test
