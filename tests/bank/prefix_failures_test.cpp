// PrefixBank: small capacities, and memory that cannot be had. No model.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "bank/prefix_bank.h"
#include "prefix_bank_support.h"

namespace llmcache::test {
namespace {

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

}  // namespace
}  // namespace llmcache::test
