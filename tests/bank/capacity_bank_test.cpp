// What all banks have in common.
#include "bank/capacity_bank.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bank_adapters.h"
#include "every_allocation.h"

namespace llmcache::test {
namespace {

template <typename Adapter>
class EveryBank : public ::testing::Test {
 protected:
  static void insert(Adapter& adapter, int number, std::int64_t count = kTokens) { adapter.prepared(number, count)(); }
  static bool holds(Adapter& adapter, int number) {
    const Reader reader = adapter.read(number);
    EXPECT_TRUE(!reader || reader()) << number;
    return reader != nullptr;
  }
  static BankCounters counters(const Adapter& adapter) { return adapter.bank.counters(); }
};

TYPED_TEST_SUITE(EveryBank, Banks, BankNames);

TYPED_TEST(EveryBank, EmptyTakesNothing) {
  TypeParam adapter(1000);
  EXPECT_EQ(adapter.bank.capacity(), 1000U);
  EXPECT_FALSE(this->holds(adapter, 1));
  adapter.bank.clear();
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, 0U);
  EXPECT_EQ(counters.bytes, 0U);
  EXPECT_EQ(counters.peak_bytes, 0U);
}

TYPED_TEST(EveryBank, FindsWhatItKeeps) {
  TypeParam adapter(1 << 20);
  for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
  this->insert(adapter, 2);
  for (int number = 1; number <= 3; ++number) EXPECT_TRUE(this->holds(adapter, number)) << number;
  EXPECT_FALSE(this->holds(adapter, 4));
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, 3U) << "nothing is kept twice";
  EXPECT_EQ(counters.insertions, 3U);
  EXPECT_EQ(counters.evictions + counters.rejected, 0U);
  EXPECT_GE(counters.bytes, 3 * kEntryBytes);
  EXPECT_GE(counters.peak_bytes, counters.bytes);
}

TYPED_TEST(EveryBank, CapacityHoldsIndexIncluded) {
  for (std::size_t capacity = 0; capacity < 12 * kEntryBytes; capacity += 173) {
    SCOPED_TRACE(capacity);
    MemoryAccount total(capacity);
    TypeParam adapter(capacity, &total);
    for (int number = 1; number <= 12; ++number) {
      this->insert(adapter, number);
      const BankCounters counters = this->counters(adapter);
      ASSERT_LE(counters.bytes, capacity);
      ASSERT_LE(counters.peak_bytes, capacity);
      ASSERT_GE(counters.bytes, counters.entries * kEntryBytes);
      ASSERT_EQ(counters.insertions + counters.rejected, static_cast<std::uint64_t>(number));
      ASSERT_EQ(total.used(), counters.bytes);
      ASSERT_EQ(total.peak(), counters.peak_bytes);
      this->holds(adapter, number);
    }
    EXPECT_TRUE(capacity >= kEntryBytes || this->counters(adapter).rejected == 12U);
    adapter.bank.clear();
    ASSERT_EQ(this->counters(adapter).bytes, 0U);
  }
}

TYPED_TEST(EveryBank, LeastRecentlyUsedGoesFirst) {
  TypeParam adapter(64 << 10);
  std::vector<int> order;  // least recently used first
  std::mt19937 random(5);
  for (int number = 1; number <= 150; ++number) {
    for (int uses = static_cast<int>(random() % 3); uses > 0 && !order.empty(); --uses) {
      const auto used = order.begin() + static_cast<std::ptrdiff_t>(random() % order.size());
      ASSERT_TRUE(this->holds(adapter, *used));
      std::rotate(used, used + 1, order.end());
    }
    const auto before = this->counters(adapter).evictions;
    this->insert(adapter, number);
    const auto evicted = this->counters(adapter).evictions - before;
    ASSERT_LE(evicted, order.size());
    const std::vector<int> gone(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(evicted));
    order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(evicted));
    order.push_back(number);
    for (const int old : gone) ASSERT_FALSE(this->holds(adapter, old)) << old;
    for (const int held : order) ASSERT_TRUE(this->holds(adapter, held)) << held;
  }
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, order.size());
  EXPECT_EQ(counters.insertions, 150U);
  EXPECT_EQ(counters.evictions, 150U - order.size());
  EXPECT_EQ(counters.rejected, 0U);
  EXPECT_GT(order.size(), 5U);
  EXPECT_LT(order.size(), 70U);
}

TYPED_TEST(EveryBank, TooLargeIsRejectedWithoutEvicting) {
  TypeParam adapter(64 << 10);
  for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
  this->insert(adapter, 9, 4000);
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.rejected, 1U);
  EXPECT_EQ(counters.evictions, 0U);
  EXPECT_EQ(counters.entries, 3U);
  for (int number = 1; number <= 3; ++number) EXPECT_TRUE(this->holds(adapter, number)) << number;
  EXPECT_FALSE(this->holds(adapter, 9));
}

TYPED_TEST(EveryBank, ClearForgetsAndReleasesButCountsOn) {
  TypeParam adapter(32 << 10);
  for (int round = 1; round <= 3; ++round) {
    for (int number = 1; number <= 20; ++number) this->insert(adapter, number);
    const BankCounters before = this->counters(adapter);
    adapter.bank.clear();
    const BankCounters after = this->counters(adapter);
    EXPECT_EQ(after.entries, 0U);
    EXPECT_EQ(after.bytes, 0U);
    EXPECT_EQ(after.insertions, static_cast<std::uint64_t>(20 * round));
    EXPECT_EQ(after.evictions, before.evictions) << "what is cleared is not evicted";
    EXPECT_EQ(after.peak_bytes, before.peak_bytes);
    for (int number = 1; number <= 20; ++number) EXPECT_FALSE(this->holds(adapter, number)) << number;
  }
}

TYPED_TEST(EveryBank, PeakOfTheTotalIsTheMostAtOnce) {
  MemoryAccount total(128 << 10);
  TypeParam a(64 << 10, &total);
  TypeParam b(64 << 10, &total);
  for (int number = 1; number <= 8; ++number) this->insert(a, number);
  a.bank.clear();
  this->insert(b, 1);
  EXPECT_EQ(total.used(), this->counters(b).bytes);
  EXPECT_EQ(total.peak(), this->counters(a).peak_bytes) << "not the sum of peaks at different moments";
  for (int number = 1; number <= 8; ++number) this->insert(a, number);
  EXPECT_EQ(total.used(), this->counters(a).bytes + this->counters(b).bytes);
  EXPECT_GT(total.peak(), this->counters(a).peak_bytes);
  EXPECT_LE(total.peak(), this->counters(a).peak_bytes + this->counters(b).peak_bytes);
}

TYPED_TEST(EveryBank, AnEntryCountsUntilItsReadersAreDone) {
  TypeParam adapter(64 << 10);
  this->insert(adapter, 1);
  auto reader = adapter.read(1);
  ASSERT_TRUE(reader);
  for (int number = 2; number <= 100; ++number) {
    this->insert(adapter, number);
    ASSERT_LE(this->counters(adapter).peak_bytes, std::size_t{64} << 10);
  }
  adapter.bank.clear();
  EXPECT_FALSE(this->holds(adapter, 1));
  EXPECT_TRUE(reader());
  EXPECT_GE(this->counters(adapter).bytes, kEntryBytes) << "it still takes memory";
  reader = nullptr;
  EXPECT_EQ(this->counters(adapter).bytes, 0U);
}

TYPED_TEST(EveryBank, FailedAllocationsLeaveNothingHalfDone) {
  for (const std::size_t capacity : {std::size_t{1} << 20, std::size_t{24} << 10}) {
    TypeParam adapter(capacity);
    std::uint64_t turns = 3;
    for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
    std::function<void()> keep = adapter.prepared(static_cast<int>(++turns));
    at_every_allocation([&] { keep(); },
                        [&](bool threw) {
                          EXPECT_FALSE(threw);
                          const BankCounters counters = this->counters(adapter);
                          EXPECT_EQ(counters.insertions + counters.rejected, turns);
                          EXPECT_EQ(counters.insertions - counters.evictions, counters.entries);
                          EXPECT_LE(counters.peak_bytes, capacity);
                          std::uint64_t held = 0;
                          for (int number = 1; number <= static_cast<int>(turns); ++number)
                            held += this->holds(adapter, number) ? 1 : 0;
                          EXPECT_EQ(held, counters.entries);
                          keep = adapter.prepared(static_cast<int>(++turns));
                        });
    EXPECT_TRUE(this->holds(adapter, static_cast<int>(turns - 1))) << "the last one had all its memory";
    keep = nullptr;
    adapter.bank.clear();
    EXPECT_EQ(this->counters(adapter).bytes, 0U);
  }
}

TYPED_TEST(EveryBank, ThreadsInsertFindEvictAndClear) {
  constexpr std::size_t kCapacity = 48 << 10;
  TypeParam adapter(kCapacity);
  std::atomic<int> wrong{0};
  std::atomic<int> found{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 400; ++step) {
      const int number = 1 + static_cast<int>(random() % 30);
      if (random() % 100 == 0) adapter.bank.clear();
      if (random() % 2 == 0) {
        this->insert(adapter, number);
      } else if (this->holds(adapter, number)) {
        ++found;
      }
      if (this->counters(adapter).bytes > kCapacity) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, seed);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(found, 50);
  EXPECT_LE(this->counters(adapter).peak_bytes, kCapacity);
  adapter.bank.clear();
  EXPECT_EQ(this->counters(adapter).bytes, 0U) << "nothing is counted twice or forgotten";
}

}  // namespace
}  // namespace llmcache::test
