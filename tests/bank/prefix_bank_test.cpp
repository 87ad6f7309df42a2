// PrefixBank: what it finds carries the contents that were written for exactly that prefix. No model.
#include "bank/prefix_bank.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "match/size_class.h"

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;

/// Two places of a model: [1, 2, tokens, 3] and [tokens, 2].
std::vector<KeySpec> specs() {
  return {{{1, 2, 1, 3}, 2, at::TensorOptions().dtype(at::kLong)}, {{1, 2}, 0, at::TensorOptions().dtype(at::kInt)}};
}
constexpr std::size_t kTokenBytes = 2 * 3 * 8 + 2 * 4;

Tokens iota(std::int64_t count, std::int64_t first = 0) {
  Tokens tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) token = first++;
  return tokens;
}

Tokens joined(Tokens tokens, const Tokens& more) {
  tokens.insert(tokens.end(), more.begin(), more.end());
  return tokens;
}

/// A number for each token of a sequence that follows from all tokens up to it, and from the partition.
std::vector<std::int64_t> marks(const std::string& partition, const Tokens& tokens, std::size_t width) {
  std::vector<std::int64_t> result;
  auto state = static_cast<std::uint64_t>(std::hash<std::string>()(partition));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    state = (state ^ static_cast<std::uint64_t>(tokens[i])) * 0x9E3779B97F4A7C15U;
    state ^= state >> 29U;
    if (i % width == width - 1) result.push_back(static_cast<std::int64_t>(state));
  }
  return result;
}

void write(const KeyRange& range, const std::int64_t* values) {
  const at::Tensor first = range.block->tensor(0).narrow(2, range.offset, range.tokens);
  const at::Tensor second = range.block->tensor(1).narrow(0, range.offset, range.tokens);
  auto a = first.accessor<std::int64_t, 4>();
  auto b = second.accessor<std::int32_t, 2>();
  for (std::int64_t i = 0; i < range.tokens; ++i) {
    for (std::int64_t j = 0; j < 6; ++j) a[0][j / 3][i][j % 3] = values[i] + j;
    for (std::int64_t j = 0; j < 2; ++j) b[i][j] = static_cast<std::int32_t>(values[i] >> (32 * j));
  }
}

bool holds(const KeyRange& range, const std::int64_t* values) {
  const at::Tensor first = range.block->tensor(0).narrow(2, range.offset, range.tokens);
  const at::Tensor second = range.block->tensor(1).narrow(0, range.offset, range.tokens);
  const auto a = first.accessor<std::int64_t, 4>();
  const auto b = second.accessor<std::int32_t, 2>();
  for (std::int64_t i = 0; i < range.tokens; ++i) {
    for (std::int64_t j = 0; j < 6; ++j) {
      if (a[0][j / 3][i][j % 3] != values[i] + j) return false;
    }
    for (std::int64_t j = 0; j < 2; ++j) {
      if (b[i][j] != static_cast<std::int32_t>(values[i] >> (32 * j))) return false;
    }
  }
  return true;
}

/// True if the lease's known prefix has the contents of this sequence.
bool contents_right(const PrefixLease& lease, const std::string& partition, const Tokens& tokens,
                    std::size_t width = 1) {
  const auto values = marks(partition, tokens, width);
  std::int64_t at = 0;
  for (const KeyRange& range : lease.known()) {
    if (range.tokens <= 0 || range.offset < 0 || range.offset + range.tokens > range.block->room()) return false;
    if (at + range.tokens > static_cast<std::int64_t>(values.size())) return false;
    if (!holds(range, values.data() + at)) return false;
    at += range.tokens;
  }
  return at == lease.known_tokens();
}

/// One pass: find, reserve, write. Ready to be committed, which also counts it if there was no room.
struct Pass {
  PrefixLease lease;
  std::string partition;
  Tokens tokens;
  std::vector<KeyRange> ranges;
  bool complete = false;  ///< there was room for all
  bool committed = false;

  Pass(PrefixBank& bank, std::string partition_of, Tokens tokens_of, double now_s = 0, std::int64_t room = 0,
       std::size_t width = 1)
      : partition(std::move(partition_of)), tokens(std::move(tokens_of)) {
    lease = bank.find(partition, tokens, now_s);
    EXPECT_TRUE(contents_right(lease, partition, tokens, width));
    ranges = lease.known();
    const auto count = static_cast<std::int64_t>(tokens.size() / width);
    const KeyRange* after = ranges.empty() ? nullptr : &ranges.back();
    complete = bank.reserve(lease, after, count - lease.known_tokens(), room, size_class(count));
    if (!complete) return;
    const auto values = marks(partition, tokens, width);
    std::int64_t at = lease.known_tokens();
    for (const KeyRange& range : lease.reserved()) {
      write(range, values.data() + at);
      at += range.tokens;
      ranges.push_back(range);
    }
    EXPECT_EQ(at, count);
  }
  void commit(PrefixBank& bank, double now_s = 0, double saved_ms = 1) {
    bank.commit(lease, partition, tokens, ranges, saved_ms, now_s);
    committed = true;
  }
};

class PrefixBanks : public ::testing::Test {
 protected:
  static PrefixBank::Settings settings(std::size_t capacity = 1 << 20, Eviction policy = Eviction::kLru,
                                       std::size_t width = 1) {
    PrefixBank::Settings settings;
    settings.capacity_bytes = capacity;
    settings.eviction.policy = policy;
    settings.ids_per_token = width;
    settings.specs = specs();
    return settings;
  }

  static void add(PrefixBank& bank, const std::string& partition, const Tokens& tokens, double now_s = 0,
                  std::int64_t room = 0) {
    Pass pass(bank, partition, tokens, now_s, room);
    pass.commit(bank, now_s);
  }
  /// Length of the known prefix, whose contents must be right.
  static std::int64_t known(PrefixBank& bank, const std::string& partition, const Tokens& tokens, double now_s = 0) {
    const PrefixLease lease = bank.find(partition, tokens, now_s);
    EXPECT_TRUE(contents_right(lease, partition, tokens));
    return lease.known_tokens();
  }
};

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

// --- eviction ---------------------------------------------------------------------------------------

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

// --- against a plain model --------------------------------------------------------------------------

struct Load {
  Eviction policy;
  std::size_t capacity;
};

class PrefixWorkload : public PrefixBanks, public ::testing::WithParamInterface<Load> {};
INSTANTIATE_TEST_SUITE_P(All, PrefixWorkload,
                         ::testing::Values(Load{Eviction::kLru, 1U << 30}, Load{Eviction::kLru, 60000},
                                           Load{Eviction::kLru, 9000}, Load{Eviction::kDecay, 60000},
                                           Load{Eviction::kDecay, 25000}, Load{Eviction::kS3Fifo, 60000},
                                           Load{Eviction::kS3Fifo, 15000}, Load{Eviction::kGdsf, 60000},
                                           Load{Eviction::kGdsf, 30000}),
                         [](const auto& param) {
                           return std::string(to_string(param.param.policy)) + std::to_string(param.param.capacity);
                         });

/// Thousands of passes, some of them at once, some given up, of sequences that grow and part. What is found must have
/// been committed, and have its contents; without evictions all that was committed must be found.
TEST_P(PrefixWorkload, FindsOnlyWhatWasCommitted) {
  const auto [policy, capacity] = GetParam();
  PrefixBank bank(settings(capacity, policy));
  std::mt19937_64 random(capacity + static_cast<std::size_t>(policy));
  const auto below = [&random](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  std::map<std::string, std::set<Tokens>> committed;  // all prefixes
  std::vector<Pass> running;
  std::vector<std::pair<std::string, Tokens>> earlier{{"a", {}}};
  std::int64_t found = 0;
  std::int64_t commits = 0;
  for (int step = 0; step < 6000; ++step) {
    const double now_s = step * 0.1;
    if (running.size() < 4 && below(3) != 0) {
      // A new sequence, one that goes on from an earlier one, or from a part of it.
      auto [partition, tokens] = earlier[static_cast<std::size_t>(below(earlier.size()))];
      if (below(4) == 0) tokens.resize(static_cast<std::size_t>(below(tokens.size() + 1)));
      if (below(8) == 0 || tokens.size() > 60) {
        partition = std::string(1, static_cast<char>('a' + below(3)));
        tokens.clear();
      }
      for (std::int64_t more = 1 + below(12); more > 0; --more) tokens.push_back(below(3));
      running.emplace_back(bank, partition, tokens, now_s, below(3) * 16);
      const PrefixLease& lease = running.back().lease;
      const auto& prefixes = committed[partition];
      const Tokens prefix(tokens.begin(), tokens.begin() + lease.known_tokens());
      ASSERT_TRUE(prefix.empty() || prefixes.count(prefix) != 0) << "step " << step;
      const auto counters = bank.counters();
      if (counters.evictions == 0 && counters.rejected == 0 && prefix.size() < tokens.size()) {
        const Tokens longer(tokens.begin(), tokens.begin() + lease.known_tokens() + 1);
        ASSERT_EQ(prefixes.count(longer), 0U) << "step " << step;
      }
      found += lease.known_tokens();
    } else if (!running.empty()) {
      const auto which = running.begin() + below(running.size());
      // Nothing that a pass uses has changed.
      ASSERT_TRUE(contents_right(which->lease, which->partition, which->tokens)) << "step " << step;
      if (below(5) != 0) {
        which->commit(bank, now_s, static_cast<double>(1 + below(5)));
      }
      if (which->complete && which->committed) {
        ++commits;
        for (std::size_t end = 1; end <= which->tokens.size(); ++end) {
          committed[which->partition].emplace(which->tokens.begin(),
                                              which->tokens.begin() + static_cast<std::ptrdiff_t>(end));
        }
        earlier.emplace_back(which->partition, which->tokens);
        if (earlier.size() > 40) earlier.erase(earlier.begin() + below(earlier.size()));
      }
      running.erase(which);
    }
    const auto counters = bank.counters();
    ASSERT_LE(counters.bytes, capacity) << "step " << step;
    ASSERT_LE(counters.peak_bytes, capacity) << "step " << step;
    if (counters.evictions == 0 && counters.rejected == 0) {
      std::size_t distinct = 0;
      for (const auto& [partition, prefixes] : committed) distinct += prefixes.size();
      ASSERT_EQ(counters.tokens, distinct) << "nothing is held twice; step " << step;
    }
    if (step % 1500 == 1499) {
      bank.clear();
      committed.clear();
    }
  }
  EXPECT_GT(found, 1000);
  EXPECT_GT(commits, 1000);
  if (capacity < 1U << 20) {
    EXPECT_GT(bank.counters().evictions, 500U);
  } else {
    EXPECT_EQ(bank.counters().evictions, 0U);
    EXPECT_EQ(bank.counters().rejected, 0U);
  }
  running.clear();
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
}

// --- failures ---------------------------------------------------------------------------------------

TEST_F(PrefixBanks, EveryCapacityHolds) {
  for (const Eviction policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    std::int64_t most = 0;
    for (std::size_t capacity = 0; capacity < 40000; capacity += 131) {
      PrefixBank bank(settings(capacity, policy));
      for (std::int64_t i = 0; i < 6; ++i) {
        const std::string partition = "a partition whose name is not short " + std::to_string(i % 2);
        const Tokens tokens = joined(iota(10, 100 * (i % 3)), iota(10, i));
        add(bank, partition, tokens, static_cast<double>(i), i % 2 * 32);
        most = std::max(most, known(bank, partition, tokens, static_cast<double>(i)));
        ASSERT_LE(bank.counters().bytes, capacity);
      }
      ASSERT_LE(bank.counters().peak_bytes, capacity);
      if (capacity < 1000) {
        ASSERT_EQ(bank.counters().rejected, 6U);
        ASSERT_EQ(bank.counters().bytes, 0U);
      }
      bank.clear();
      ASSERT_EQ(bank.counters().bytes, 0U) << "capacity " << capacity;
    }
    EXPECT_EQ(most, 20);
  }
}

TEST_F(PrefixBanks, ABlockThatIsTooLargeIsRejectedWithoutEvicting) {
  PrefixBank bank(settings(32 << 10));
  add(bank, "s", iota(100));
  PrefixLease lease = bank.find("s", iota(100), 0);
  EXPECT_FALSE(bank.reserve(lease, nullptr, 1000, 0, 10));
  EXPECT_FALSE(bank.reserve(lease, nullptr, std::numeric_limits<std::int64_t>::max(), 0, 63));
  EXPECT_TRUE(lease.reserved().empty());
  EXPECT_EQ(bank.counters().rejected, 0U);
  bank.commit(lease, "s", iota(100), {}, 0, 0);
  EXPECT_EQ(bank.counters().rejected, 1U);
  EXPECT_EQ(bank.counters().evictions, 0U);
  EXPECT_TRUE(bank.reserve(lease, nullptr, 10, 1000, 4)) << "there is room for what is needed, without more";
  EXPECT_EQ(lease.reserved()[0].block->room(), 10);
  EXPECT_EQ(bank.counters().evictions, 0U);
}

TEST_F(PrefixBanks, SpareRoomIsGivenBackIfTheRestFindsNone) {
  PrefixBank bank(settings(16 << 10));
  add(bank, "s", iota(10), 0, 64);
  {
    Pass pass(bank, "s", iota(2000));
    EXPECT_FALSE(pass.complete);
    EXPECT_TRUE(pass.lease.reserved().empty());
    EXPECT_EQ(pass.lease.known_tokens(), 10);
    pass.commit(bank);
    EXPECT_EQ(bank.counters().rejected, 1U);
  }
  const Pass pass(bank, "s", iota(64));
  ASSERT_EQ(pass.lease.reserved().size(), 1U);
  EXPECT_EQ(pass.lease.reserved()[0].offset, 10);
}

TEST_F(PrefixBanks, ATreeWithoutRoomIsRejected) {
  // The block fits, with nothing left for the nodes.
  std::size_t block = 100 * kTokenBytes;
  while (!Pass(*std::make_unique<PrefixBank>(settings(block)), "s", iota(100)).complete) ++block;
  for (std::size_t more = 0; more < 3000; more += 100) {
    PrefixBank bank(settings(block + more));
    Pass pass(bank, "s", iota(100));
    ASSERT_TRUE(pass.complete);
    pass.commit(bank);
    const auto counters = bank.counters();
    if (more == 0) {
      EXPECT_EQ(counters.rejected, 1U);
      EXPECT_EQ(counters.entries, 0U);
      EXPECT_EQ(counters.bytes, block);
    }
    EXPECT_EQ(counters.insertions + counters.rejected, 1U);
    EXPECT_EQ(known(bank, "s", iota(100)), counters.insertions == 1 ? 100 : 0);
    pass.ranges.clear();
    pass.lease = {};
    EXPECT_EQ(bank.counters().bytes == 0, counters.rejected == 1);
  }
}

TEST_F(PrefixBanks, TensorsThatCannotBeMade) {
  PrefixBank::Settings wrong = settings();
  wrong.specs.push_back({{-1, -1, 1}, 2, at::TensorOptions()});
  PrefixBank bank(wrong);
  PrefixLease lease = bank.find("s", Tokens{}, 0);
  EXPECT_FALSE(bank.reserve(lease, nullptr, 10, 0, 4));
  EXPECT_TRUE(lease.reserved().empty());
  bank.commit(lease, "s", {}, {}, 0, 0);
  EXPECT_EQ(bank.counters().bytes, 0U);
  EXPECT_EQ(bank.counters().peak_bytes, 0U);
  EXPECT_EQ(bank.counters().rejected, 1U);
}

#ifndef LLMCACHE_TESTS_SANITIZED  // which would end the process
TEST_F(PrefixBanks, MemoryThatTheMachineDoesNotHave) {
  PrefixBank bank(settings(std::size_t{1} << 60U));
  PrefixLease lease = bank.find("s", Tokens{}, 0);
  for (int i = 0; i < 30; ++i) EXPECT_FALSE(bank.reserve(lease, nullptr, std::int64_t{1} << 50, 0, 50));
  EXPECT_EQ(bank.counters().bytes, 0U);
  EXPECT_EQ(bank.counters().rejected, 0U) << "nothing is counted before it is committed";
  bank.commit(lease, "s", {}, {}, 0, 0);
  EXPECT_EQ(bank.counters().rejected, 1U);
  EXPECT_TRUE(bank.reserve(lease, nullptr, 5, std::int64_t{1} << 50, 3)) << "less will do";
  EXPECT_EQ(lease.reserved()[0].block->room(), 5);
}
#endif

// --- threads ----------------------------------------------------------------------------------------

TEST_F(PrefixBanks, ManyThreads) {
  for (const std::size_t capacity : {std::size_t{40000}, std::size_t{1} << 30U}) {
    PrefixBank bank(settings(capacity));
    std::atomic<std::int64_t> found{0};
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      threads.emplace_back([&bank, &found, &wrong, seed] {
        std::mt19937_64 random(seed);
        for (int step = 0; step < 300; ++step) {
          // Sequences of few different tokens, so that the threads meet; grown token by token.
          Tokens tokens;
          const std::string partition(1, static_cast<char>('a' + random() % 2));
          for (int i = 0; i < 8; ++i) tokens.push_back(static_cast<std::int64_t>(random() % 2));
          for (int i = 0; i < 5; ++i) {
            Pass pass(bank, partition, tokens, step, 16);
            found += pass.lease.known_tokens();
            if (random() % 8 != 0) pass.commit(bank, step);
            if (!contents_right(pass.lease, partition, tokens)) ++wrong;
            tokens.push_back(static_cast<std::int64_t>(random() % 2));
          }
          if (seed == 0 && step % 100 == 99) bank.clear();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_GT(found, 1000);
    EXPECT_LE(bank.counters().peak_bytes, capacity);
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0U);
  }
}

}  // namespace
}  // namespace llmcache::test
