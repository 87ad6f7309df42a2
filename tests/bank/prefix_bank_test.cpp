// PrefixBank: what it finds carries the contents that were written for exactly that prefix. No model.
#include "bank/prefix_bank.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "prefix_bank_support.h"

namespace llmcache::test {
namespace {

TEST_F(PrefixBanks, EmptyTakesNothing) {
  PrefixBank bank(settings());
  EXPECT_EQ(known(bank, "s", {1, 2}), 0);
  EXPECT_EQ(known(bank, "s", {}), 0);
  EXPECT_FALSE(bank.find("s", Tokens{1}, 0).continues());
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
  EXPECT_EQ(bank.counters().peak_bytes, 0U);
}

TEST_F(PrefixBanks, FindsTheLongestPrefixByTokens) {
  PrefixBank bank(settings());
  add(bank, "s", iota(10));
  EXPECT_EQ(known(bank, "s", iota(10)), 10);
  EXPECT_EQ(known(bank, "s", iota(7)), 7);
  EXPECT_EQ(known(bank, "s", iota(15)), 10);
  EXPECT_EQ(known(bank, "s", joined(iota(4), {99})), 4);
  EXPECT_EQ(known(bank, "s", iota(5, 1)), 0);
  EXPECT_EQ(known(bank, "s", {}), 0);
  EXPECT_TRUE(bank.find("s", iota(10), 0).continues());
  EXPECT_TRUE(bank.find("s", iota(12), 0).continues());
  EXPECT_FALSE(bank.find("s", iota(9), 0).continues()) << "ends within an earlier sequence";
  EXPECT_FALSE(bank.find("s", iota(5, 1), 0).continues());
  EXPECT_EQ(bank.counters().entries, 1U);
  EXPECT_EQ(bank.counters().tokens, 10U);
  EXPECT_EQ(bank.counters().insertions, 1U);
}

TEST_F(PrefixBanks, TokensOfSeveralNumbers) {
  PrefixBank bank(settings(1 << 20, Eviction::kLru, 2));
  const Tokens tokens{1, 10, 2, 20, 3, 30};
  {
    Pass pass(bank, "s", tokens, 0, 0, 2);
    ASSERT_TRUE(pass.complete);
    pass.commit(bank);
  }
  const auto length = [&bank](const Tokens& asked) {
    const PrefixLease lease = bank.find("s", asked, 0);
    EXPECT_TRUE(contents_right(lease, "s", asked, 2));
    return lease.known_tokens();
  };
  EXPECT_EQ(length(tokens), 3);
  EXPECT_EQ(length({1, 10, 2, 21}), 1) << "half a token in common";
  EXPECT_EQ(length({1, 11}), 0);
  {
    Pass pass(bank, "s", {1, 10, 2, 21}, 0, 0, 2);
    pass.commit(bank);
  }
  EXPECT_EQ(length({1, 10, 2, 21, 5, 50}), 2);
  EXPECT_EQ(length(tokens), 3);
}

TEST_F(PrefixBanks, PartitionsDoNotSeeEachOther) {
  PrefixBank bank(settings());
  add(bank, "a", iota(5));
  EXPECT_EQ(known(bank, "b", iota(5)), 0);
  EXPECT_EQ(known(bank, "", iota(5)), 0);
  add(bank, "b", iota(3));
  EXPECT_EQ(known(bank, "a", iota(9)), 5);
  EXPECT_EQ(known(bank, "b", iota(9)), 3);
  EXPECT_EQ(bank.counters().tokens, 8U);
}

TEST_F(PrefixBanks, WhatIsInCommonIsHeldOnce) {
  PrefixBank bank(settings());
  add(bank, "s", iota(100));
  const std::size_t one = bank.counters().bytes;
  add(bank, "s", joined(iota(60), iota(40, 500)));
  const auto counters = bank.counters();
  EXPECT_EQ(counters.entries, 3U) << "the common part and two ends";
  EXPECT_EQ(counters.tokens, 140U);
  // 40 tokens more, and what the tree takes: less than half of the 60 tokens in common.
  EXPECT_GE(counters.bytes, one + 40 * kTokenBytes);
  EXPECT_LT(counters.bytes, one + 70 * kTokenBytes);
  const PrefixLease first = bank.find("s", iota(100), 0);
  const PrefixLease second = bank.find("s", joined(iota(60), iota(40, 500)), 0);
  ASSERT_EQ(first.known().size(), 1U) << "halves of one block are one range";
  ASSERT_EQ(second.known().size(), 2U);
  EXPECT_EQ(first.known()[0].block, second.known()[0].block);
  EXPECT_EQ(second.known()[0].tokens, 60);
}

TEST_F(PrefixBanks, ALoopThatAppendsOneTokenGrowsInPlace) {
  PrefixBank bank(settings());
  Tokens tokens = iota(20);
  add(bank, "s", tokens, 0, 128);
  std::set<const void*> data;
  for (std::int64_t i = 0; i < 200; ++i) {
    tokens.push_back(1000 + i);
    Pass pass(bank, "s", tokens, 0, 128);
    ASSERT_TRUE(pass.complete);
    ASSERT_TRUE(pass.lease.continues());
    ASSERT_EQ(pass.lease.known_tokens(), static_cast<std::int64_t>(tokens.size()) - 1);
    ASSERT_EQ(pass.lease.reserved().size(), 1U);
    for (const KeyRange& range : pass.ranges) data.insert(range.block->tensor(0).const_data_ptr());
    pass.commit(bank);
  }
  EXPECT_EQ(known(bank, "s", tokens), 220);
  EXPECT_EQ(bank.counters().entries, 2U);
  EXPECT_EQ(data.size(), 2U) << "two blocks of 128 tokens, written in place";
  EXPECT_LT(bank.counters().bytes, 256 * kTokenBytes + 220 * 16 + 4096);
}

TEST_F(PrefixBanks, SpareRoomIsUsedBeforeANewBlock) {
  PrefixBank bank(settings());
  add(bank, "s", iota(10), 0, 16);
  Pass pass(bank, "s", iota(30), 0, 0);
  ASSERT_EQ(pass.lease.reserved().size(), 2U);
  EXPECT_EQ(pass.lease.reserved()[0].tokens, 6);
  EXPECT_EQ(pass.lease.reserved()[0].block, pass.lease.known()[0].block);
  EXPECT_EQ(pass.lease.reserved()[1].tokens, 14);
  pass.commit(bank);
  EXPECT_EQ(known(bank, "s", iota(30)), 30);
  EXPECT_EQ(bank.counters().entries, 2U);
}

TEST_F(PrefixBanks, TwoThatContinueTheSameLeafPart) {
  PrefixBank bank(settings());
  add(bank, "s", iota(10), 0, 64);
  const Tokens left = joined(iota(10), {100, 101, 102});
  const Tokens right = joined(iota(10), {100, 201});
  {
    Pass one(bank, "s", left, 0, 64);
    Pass two(bank, "s", right, 0, 64);
    ASSERT_TRUE(one.complete && two.complete);
    EXPECT_NE(one.lease.reserved()[0].block, two.lease.reserved()[0].block) << "only one can have the room";
    EXPECT_EQ(one.lease.reserved()[0].block, one.lease.known()[0].block);
    EXPECT_EQ(known(bank, "s", left), 10) << "nothing is seen before it is committed";
    two.commit(bank);
    EXPECT_EQ(known(bank, "s", left), 11);
    one.commit(bank);
  }
  EXPECT_EQ(known(bank, "s", left), 13);
  EXPECT_EQ(known(bank, "s", right), 12);
  EXPECT_EQ(known(bank, "s", joined(iota(10), {100, 999})), 11);
  EXPECT_TRUE(bank.find("s", left, 0).continues());
  EXPECT_FALSE(bank.find("s", joined(iota(10), {100}), 0).continues()) << "both go on behind it";
  EXPECT_EQ(bank.counters().tokens, 14U);
}

TEST_F(PrefixBanks, TheSameSequenceTwiceAtOnceIsHeldOnce) {
  PrefixBank bank(settings());
  std::size_t bytes = 0;
  {
    Pass one(bank, "s", iota(50));
    Pass two(bank, "s", iota(50));
    one.commit(bank);
    two.commit(bank);
    EXPECT_EQ(bank.counters().tokens, 50U);
    EXPECT_EQ(bank.counters().insertions, 1U);
    bytes = bank.counters().bytes;
    EXPECT_EQ(bank.find("s", iota(50), 0).known()[0].block, one.lease.reserved()[0].block);
  }
  EXPECT_EQ(bank.counters().bytes, bytes) << "the second one's block never was the bank's";
  EXPECT_EQ(known(bank, "s", iota(50)), 50);
}

TEST_F(PrefixBanks, WhatIsNotCommittedIsGivenBack) {
  PrefixBank bank(settings());
  { const Pass pass(bank, "s", iota(50)); }
  EXPECT_EQ(bank.counters().bytes, 0U);
  EXPECT_EQ(known(bank, "s", iota(50)), 0);
  add(bank, "s", iota(10), 0, 64);
  const void* data = bank.find("s", iota(10), 0).known()[0].block->tensor(0).const_data_ptr();
  { const Pass pass(bank, "s", iota(40)); }
  Pass pass(bank, "s", joined(iota(10), iota(54, 700)));
  ASSERT_EQ(pass.lease.reserved().size(), 1U) << "the room is free again";
  EXPECT_EQ(pass.lease.reserved()[0].block->tensor(0).const_data_ptr(), data);
  EXPECT_EQ(pass.lease.reserved()[0].offset, 10);
}

TEST_F(PrefixBanks, OnlyTheRestOfAPartlyCommittedReservationIsGivenBack) {
  PrefixBank bank(settings());
  {
    Pass pass(bank, "s", iota(30), 0, 64);
    bank.commit(pass.lease, "s", iota(20), pass.ranges, 1, 0);
    EXPECT_EQ(known(bank, "s", iota(30)), 20);
  }
  Pass pass(bank, "s", joined(iota(20), {7, 8}), 0, 0);
  ASSERT_EQ(pass.lease.reserved().size(), 1U);
  EXPECT_EQ(pass.lease.reserved()[0].offset, 20);
  pass.commit(bank);
  EXPECT_EQ(bank.counters().entries, 1U);
}

TEST_F(PrefixBanks, RoomGivenBackOutOfOrderLeavesAHole) {
  PrefixBank bank(settings());
  add(bank, "s", iota(10), 0, 64);
  std::optional<Pass> first(std::in_place, bank, "s", iota(15));
  Pass second(bank, "s", iota(10));
  const KeyRange after = first->lease.reserved()[0];
  ASSERT_TRUE(bank.reserve(second.lease, &after, 5, 0, 3)) << "behind the first one's";
  ASSERT_EQ(second.lease.reserved()[0].offset, 15);
  first.reset();
  Pass third(bank, "s", iota(12));
  EXPECT_NE(third.lease.reserved()[0].block, third.lease.known()[0].block);
}

TEST_F(PrefixBanks, ALeaseReservesAndCommitsAgain) {
  PrefixBank bank(settings());
  Tokens tokens = iota(5);
  Pass pass(bank, "s", tokens, 0, 16);
  pass.commit(bank);
  for (std::int64_t i = 0; i < 40; ++i) {
    tokens.push_back(i);
    const auto values = marks("s", tokens, 1);
    // `after` lies in the vector that reserve() adds to.
    ASSERT_TRUE(bank.reserve(pass.lease, &pass.lease.reserved().back(), 1, 16, 3));
    write(pass.lease.reserved().back(), &values.back());
    bank.commit(pass.lease, "s", tokens, pass.lease.reserved(), 1, 0);
    ASSERT_EQ(known(bank, "s", tokens), static_cast<std::int64_t>(tokens.size()));
  }
  EXPECT_EQ(bank.counters().entries, 3U);
  pass.lease = {};
  EXPECT_EQ(known(bank, "s", tokens), 45);
}

TEST_F(PrefixBanks, LeasesMove) {
  PrefixBank bank(settings());
  PrefixLease outer;
  std::weak_ptr<KeyBlock> block;
  {
    Pass pass(bank, "s", iota(5));
    block = pass.lease.reserved()[0].block;
    outer = std::move(pass.lease);
    EXPECT_TRUE(pass.lease.reserved().empty());
  }
  EXPECT_FALSE(block.expired());
  PrefixLease other(std::move(outer));
  EXPECT_EQ(other.reserved().size(), 1U);
  other = bank.find("s", iota(5), 0);
  EXPECT_TRUE(block.expired()) << "what it had before is given back";
}

TEST_F(PrefixBanks, ClearGivesBackAllThatNobodyUses) {
  PrefixBank bank(settings());
  for (std::int64_t i = 0; i < 50; ++i) add(bank, std::to_string(i % 3), joined({i / 2}, iota(10)), 0, 16);
  {
    const Tokens tokens = joined({3}, iota(10));
    Pass pass(bank, "0", joined(tokens, {5, 6}), 0, 16);
    bank.clear();
    EXPECT_EQ(bank.counters().entries, 0U);
    EXPECT_EQ(bank.counters().tokens, 0U);
    EXPECT_EQ(known(bank, "0", tokens), 0);
    EXPECT_GT(bank.counters().bytes, 0U) << "still counted";
    EXPECT_TRUE(contents_right(pass.lease, "0", tokens));
    pass.commit(bank);
    EXPECT_EQ(known(bank, "0", joined(tokens, {5, 6})), 13) << "a lease from before it may still be committed";
    bank.clear();
  }
  EXPECT_EQ(bank.counters().bytes, 0U);
}

}  // namespace
}  // namespace llmcache::test
