// PrefixBank: which entries go where there is no room for all. No model.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bank/prefix_bank.h"
#include "prefix_bank_support.h"

namespace llmcache::test {
namespace {

class PrefixEviction : public PrefixBanks, public ::testing::WithParamInterface<Eviction> {};
INSTANTIATE_TEST_SUITE_P(All, PrefixEviction,
                         ::testing::Values(Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf),
                         [](const auto& param) { return to_string(param.param); });

TEST_P(PrefixEviction, LeavesGoBeforeWhatIsAboveThem) {
  PrefixBank bank(settings(64 << 10, GetParam()));
  // Three levels of prefixes; then sequences of their own, until the first ones are gone.
  const Tokens root = iota(20);
  for (std::int64_t i = 0; i < 4; ++i) {
    for (std::int64_t j = 0; j < 4; ++j) add(bank, "s", joined(joined(root, iota(20, 100 * i)), iota(20, 1000 * j)));
  }
  ASSERT_EQ(bank.counters().evictions, 0U);
  const auto whole = [&bank, &root](std::int64_t i, std::int64_t j, double now_s) {
    return known(bank, "s", joined(joined(root, iota(20, 100 * i)), iota(20, 1000 * j)), now_s);
  };
  for (std::int64_t n = 0; n < 1000; ++n) {
    const auto now_s = static_cast<double>(n);
    add(bank, "t", iota(50, 10000 * n), now_s);
    // A part of a prefix is never missing: nodes go whole, and only without children.
    if (n % 10 == 0) {
      const std::int64_t i = n / 10 % 4;
      const std::int64_t length = whole(i, n / 40 % 4, now_s);
      ASSERT_TRUE(length % 20 == 0) << length;
    }
    ASSERT_LE(bank.counters().bytes, 64U << 10);
  }
  EXPECT_GT(bank.counters().evictions, 900U);
  EXPECT_EQ(bank.counters().rejected, 0U);
  EXPECT_LE(bank.counters().peak_bytes, 64U << 10);
}

TEST_P(PrefixEviction, WhatAPassUsesStays) {
  PrefixBank bank(settings(32 << 10, GetParam()));
  add(bank, "s", iota(40));
  add(bank, "s", joined(iota(20), iota(20, 500)));
  Pass pass(bank, "s", joined(iota(40), iota(20, 900)));
  ASSERT_TRUE(pass.complete);
  for (std::int64_t n = 0; n < 500; ++n) add(bank, "t", iota(50, 10000 * n), static_cast<double>(n));
  EXPECT_GT(bank.counters().evictions, 400U);
  EXPECT_TRUE(contents_right(pass.lease, "s", iota(40)));
  EXPECT_EQ(known(bank, "s", iota(40)), 40);
  pass.commit(bank);
  EXPECT_EQ(known(bank, "s", pass.tokens), 60);
}

TEST_P(PrefixEviction, GivesUpWhereAllIsInUse) {
  PrefixBank bank(settings(32 << 10, GetParam()));
  std::vector<Pass> passes;
  for (std::int64_t n = 0; n < 100; ++n) {
    passes.emplace_back(bank, std::to_string(n), iota(50, 100 * n));
    if (!passes.back().complete) break;
    passes.back().commit(bank);
  }
  ASSERT_GT(passes.size(), 3U);
  ASSERT_FALSE(passes.back().complete);
  passes.back().commit(bank);
  const auto before = bank.counters();
  EXPECT_GE(before.rejected, 1U);
  EXPECT_FALSE(Pass(bank, "x", iota(200)).complete);
  EXPECT_EQ(bank.counters().evictions, before.evictions);
  EXPECT_EQ(bank.counters().bytes, before.bytes);
  passes.clear();
  Pass last(bank, "x", iota(200));
  EXPECT_TRUE(last.complete);
  EXPECT_EQ(bank.counters().evictions, before.evictions) << "not before it is committed";
  last.commit(bank);
  EXPECT_GT(bank.counters().evictions, before.evictions);
  EXPECT_EQ(known(bank, "x", iota(200)), 200);
}

TEST_F(PrefixBanks, EvictsNothingWhereThatWouldNotBeEnough) {
  PrefixBank bank(settings(32 << 10));
  for (std::int64_t n = 0; n < 5; ++n) add(bank, "s", iota(20, 100 * n));
  {
    Pass pass(bank, "t", iota(300));
    ASSERT_TRUE(pass.complete);
    ASSERT_EQ(bank.counters().evictions, 0U);
    EXPECT_FALSE(Pass(bank, "u", iota(290)).complete) << "fits beside the others, not beside what is in use";
    const Pass small(bank, "u", iota(20), 0, 290);
    ASSERT_TRUE(small.complete);
    EXPECT_EQ(small.lease.reserved()[0].block->room(), 20);
    EXPECT_EQ(bank.counters().evictions, 0U);
  }
  Pass large(bank, "u", iota(500));
  EXPECT_TRUE(large.complete);
  EXPECT_EQ(bank.counters().evictions, 0U);
  large.commit(bank);
  EXPECT_GT(bank.counters().evictions, 0U);
}

TEST_F(PrefixBanks, LeastRecentlyUsedGoesFirst) {
  PrefixBank bank(settings(16 << 10));
  std::int64_t held = 0;
  while (bank.counters().evictions == 0) add(bank, "s", iota(20, 1000 * held++));
  ASSERT_GT(held, 5);
  EXPECT_EQ(known(bank, "s", iota(20)), 0);
  EXPECT_EQ(known(bank, "s", iota(20, 1000)), 20);  // now the most recent
  const auto evictions = bank.counters().evictions;
  while (bank.counters().evictions == evictions) add(bank, "s", iota(20, 1000 * held++));
  EXPECT_EQ(known(bank, "s", iota(20, 1000)), 20);
  EXPECT_EQ(known(bank, "s", iota(20, 2000)), 0);
}

TEST_F(PrefixBanks, TheEndOfASharedBlockIsGivenBack) {
  PrefixBank bank(settings(64 << 10));
  // A long sequence of which only the start is used again: its end is evicted, and the block with it but for the start.
  add(bank, "s", iota(400));
  add(bank, "s", joined(iota(40), {1}));
  ASSERT_EQ(bank.find("s", iota(10), 0).known()[0].block->room(), 400);
  for (std::int64_t n = 0; n < 300; ++n) {
    add(bank, "t", iota(30, 100 * n));
    EXPECT_EQ(known(bank, "s", joined(iota(40), {1})), 41);
  }
  ASSERT_EQ(known(bank, "s", iota(400)), 40);
  EXPECT_EQ(bank.find("s", iota(40), 0).known()[0].block->room(), 40);
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
}

TEST_F(PrefixBanks, ASmallerEndOfASharedBlockIsSpareRoomAgain) {
  PrefixBank bank(settings(64 << 10));
  add(bank, "s", iota(400));
  add(bank, "s", joined(iota(300), {1}));
  for (std::int64_t n = 0; n < 300; ++n) {
    add(bank, "t", iota(30, 100 * n));
    EXPECT_EQ(known(bank, "s", iota(300)), 300);
  }
  ASSERT_EQ(known(bank, "s", iota(400)), 300);
  const Pass pass(bank, "s", joined(iota(300), iota(100, 5000)));
  ASSERT_EQ(pass.lease.reserved().size(), 1U);
  EXPECT_EQ(pass.lease.reserved()[0].block, pass.lease.known()[0].block);
  EXPECT_EQ(pass.lease.reserved()[0].offset, 300);
}

TEST_F(PrefixBanks, SpareRoomThatCouldNotBeGivenBackGoesWhenItCan) {
  const auto fill = [](PrefixBank& bank) {
    add(bank, "s", iota(100));
    add(bank, "s", joined(iota(40), {1}));
  };
  std::size_t one = 0;  // what a sequence of one token takes
  {
    PrefixBank bank(settings());
    fill(bank);
    const std::size_t before = bank.counters().bytes;
    add(bank, "u", {7});
    one = bank.counters().bytes - before;
  }
  MemoryAccount total(1 << 20);
  auto shared = settings();
  shared.total = &total;
  PrefixBank bank(shared);
  fill(bank);
  // Others hold nearly all the rest, so that there is no room for a copy of the start when the end is evicted.
  const std::size_t others = total.limit() - total.used() - one + 64;
  ASSERT_TRUE(total.try_reserve(others));
  add(bank, "u", {7});
  ASSERT_EQ(bank.counters().evictions, 1U);
  const auto room = [&bank] { return bank.find("s", iota(40), 0).known().at(0).block->room(); };
  ASSERT_EQ(known(bank, "s", iota(100)), 40);
  EXPECT_EQ(room(), 100);
  total.release(others);
  EXPECT_EQ(room(), 100) << "not while it is in use";
  EXPECT_EQ(room(), 40);
  EXPECT_EQ(known(bank, "s", iota(100)), 40);
}

}  // namespace
}  // namespace llmcache::test
