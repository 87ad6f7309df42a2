// What a call leaves in a bank: nothing before it has succeeded, everything counted afterwards, whatever memory fails
// in between. And where what is known was computed.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "bank/layer_bank.h"
#include "bank/memory.h"
#include "bank/output_bank.h"
#include "bank/prefix_bank.h"
#include "bank/segment_bank.h"
#include "bank/token_bank.h"
#include "every_allocation.h"
#include "match/size_class.h"
#include "reuse/deferred_writes.h"
#include "token_ids.h"

namespace llmcache::test {
namespace {

// --- what is kept later -------------------------------------------------------------------------------

TEST(DeferredWrites, TakesItsStepsInOrderAndOnce) {
  std::vector<int> taken;
  {
    DeferredWrites kept;
    kept.add([&] { taken.push_back(1); });
    kept.add([&, own = std::make_unique<int>(2)] { taken.push_back(*own); });
    kept.add([] { throw std::bad_alloc(); });
    kept.add([&] { taken.push_back(3); });
    EXPECT_TRUE(taken.empty());
    kept.commit();
    EXPECT_THAT(taken, ::testing::ElementsAre(1, 2, 3));
    kept.commit();
    EXPECT_EQ(taken.size(), 3u);
    kept.add([&] { taken.push_back(4); });
  }
  EXPECT_EQ(taken.size(), 3u) << "a call that fails takes no step";
}

// --- size classes -------------------------------------------------------------------------------------

TEST(SizeClass, IsTheLogarithmRoundedUp) {
  static_assert(size_class(1) == 0 && size_class(2) == 1);
  EXPECT_EQ(size_class(-5), 0);
  EXPECT_EQ(size_class(0), 0);
  EXPECT_EQ(size_class(3), 2);
  EXPECT_EQ(size_class(std::numeric_limits<std::int64_t>::max()), 63);
  for (std::uint8_t k = 1; k < 62; ++k) {
    const std::int64_t power = std::int64_t{1} << k;
    EXPECT_EQ(size_class(power), k);
    EXPECT_EQ(size_class(power + 1), k + 1);
  }
}

// --- accounts -----------------------------------------------------------------------------------------

TEST(MemoryTotal, SeesWhatItsPartsHoldAtOnce) {
  MemoryAccount total(1000);
  MemoryAccount a(700, &total);
  MemoryAccount b(700, &total);
  ASSERT_TRUE(a.try_reserve(600));
  a.release(600);
  ASSERT_TRUE(b.try_reserve(500));
  EXPECT_EQ(total.peak(), 600u) << "not the sum of peaks at different moments, 1100";
  ASSERT_TRUE(a.try_reserve(450));
  EXPECT_EQ(total.peak(), 950u);
  EXPECT_FALSE(a.try_reserve(100)) << "the total's limit";
  EXPECT_EQ(a.used(), 450u);
  EXPECT_EQ(a.peak(), 600u);
  EXPECT_FALSE(b.try_reserve(300)) << "its own";
  EXPECT_EQ(total.used(), 950u);
  a.release(450);
  b.release(500);
  EXPECT_EQ(total.used(), 0u);
}

TEST(MemoryTotal, HoldsUnderInterleavings) {
  constexpr std::size_t kLimit = 3000;
  MemoryAccount total(2 * kLimit);
  MemoryAccount a(kLimit, &total);
  MemoryAccount b(kLimit, &total);
  std::atomic<bool> done{false};
  std::atomic<int> wrong{0};
  std::size_t sampled = 0;
  std::thread sampler([&] {
    while (!done) {
      const std::size_t now = total.used();
      sampled = std::max(sampled, now);
      if (now > 2 * kLimit) ++wrong;  // its peak follows a moment later, with the call that reserved
    }
  });
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int step = 0; step < 20000; ++step) {
        MemoryAccount& own = random() % 2 == 0 ? a : b;
        const std::size_t bytes = 1 + random() % 1500;
        if (own.try_reserve(bytes)) own.release(bytes);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  done = true;
  sampler.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(total.peak(), sampled);
  EXPECT_LE(total.peak(), a.peak() + b.peak());
  EXPECT_EQ(total.used(), 0u);
}

// --- prefixes -----------------------------------------------------------------------------------------

constexpr std::size_t kCallTokenBytes = 16;

PrefixBank::Settings prefix_settings(std::size_t capacity, MemoryAccount* total = nullptr) {
  PrefixBank::Settings settings;
  settings.capacity_bytes = capacity;
  settings.specs = {{{1, 1, 4}, 1, at::TensorOptions()}};
  settings.total = total;
  return settings;
}

/// A pass over a sequence of `length` tokens in all; written with its tokens.
struct CallPass {
  PrefixLease lease;
  std::string partition;
  Tokens tokens;
  std::vector<KeyRange> ranges;
  bool complete = false;

  CallPass(PrefixBank& bank, std::string partition_of, Tokens tokens_of, std::int64_t room = 0,
           std::optional<std::uint8_t> length_class = {})
      : partition(std::move(partition_of)), tokens(std::move(tokens_of)) {
    lease = bank.find(partition, tokens, 0);
    ranges = lease.known();
    const auto count = static_cast<std::int64_t>(tokens.size());
    complete = bank.reserve(lease, ranges.empty() ? nullptr : &ranges.back(), count - lease.known_tokens(), room,
                            length_class.value_or(size_class(count)));
    std::int64_t at = lease.known_tokens();
    for (const KeyRange& range : lease.reserved()) {
      const auto values = at::tensor(tokens, at::kFloat).narrow(0, at, range.tokens).view({1, -1, 1});
      range.block->tensor(0).narrow(1, range.offset, range.tokens).copy_(values.expand({1, range.tokens, 4}));
      at += range.tokens;
      ranges.push_back(range);
    }
  }
  void commit(PrefixBank& bank) { bank.commit(lease, partition, tokens, ranges, 1, 0); }
};

void add(PrefixBank& bank, const std::string& partition, const Tokens& tokens, std::int64_t room = 0,
         std::optional<std::uint8_t> length_class = {}) {
  CallPass pass(bank, partition, tokens, room, length_class);
  pass.commit(bank);
}

/// Length of the known prefix; its contents must be its tokens.
std::int64_t known(PrefixBank& bank, const std::string& partition, const Tokens& tokens) {
  const PrefixLease lease = bank.find(partition, tokens, 0);
  std::int64_t at = 0;
  for (const KeyRange& range : lease.known()) {
    const auto values = range.block->tensor(0).narrow(1, range.offset, range.tokens).select(2, 0)[0];
    EXPECT_TRUE(at::equal(values, at::tensor(tokens, at::kFloat).narrow(0, at, range.tokens)));
    at += range.tokens;
  }
  return lease.known_tokens();
}

std::pair<int, int> classes(PrefixBank& bank, const Tokens& tokens, const std::string& partition = "s") {
  const PrefixLease lease = bank.find(partition, tokens, 0);
  return {lease.shortest(), lease.longest()};
}

std::vector<std::uint64_t> numbers_of(const BankCounters& c) {
  return {c.entries, c.insertions, c.evictions, c.rejected, c.bytes, c.peak_bytes};
}

TEST(PrefixTags, TellTheSizesAtWhichAPrefixWasComputed) {
  PrefixBank bank(prefix_settings(1 << 20));
  add(bank, "s", iota(100), 256);
  EXPECT_EQ(classes(bank, iota(100)), std::pair(7, 7));
  EXPECT_EQ(classes(bank, iota(3)), std::pair(7, 7)) << "of the sequence in whose pass it was computed";
  // Growth in its own block extends the leaf.
  Tokens tokens = iota(100);
  for (std::int64_t i = 0; i < 40; ++i) {
    tokens.push_back(500 + i);
    add(bank, "s", tokens, 256);
  }
  EXPECT_EQ(bank.counters().entries, 1u);
  EXPECT_EQ(classes(bank, tokens), std::pair(7, 8));
  // A split copies: what the leaf was is not known of its parts.
  add(bank, "s", joined(iota(50), {900, 901}));
  EXPECT_EQ(bank.counters().entries, 3u);
  EXPECT_EQ(classes(bank, iota(50)), std::pair(7, 8));
  EXPECT_EQ(classes(bank, tokens), std::pair(7, 8));
  EXPECT_EQ(classes(bank, joined(iota(50), {900, 901})), std::pair(6, 8)) << "the union over the path";
  EXPECT_EQ(classes(bank, joined(iota(50), {900})), std::pair(6, 8));
  // A short beginning that a long sequence goes on from.
  add(bank, "s", Tokens{7, 8, 9});
  EXPECT_EQ(classes(bank, Tokens{7, 8, 9}), std::pair(2, 2));
  add(bank, "s", joined({7, 8, 9}, iota(1000, 2000)));
  EXPECT_EQ(classes(bank, joined({7, 8, 9}, iota(1000, 2000))), std::pair(2, 10));
  EXPECT_EQ(classes(bank, Tokens{7, 8}), std::pair(2, 2));
  const PrefixLease none = bank.find("s", Tokens{12345}, 0);
  EXPECT_GT(none.shortest(), none.longest()) << "of no token there are none";
}

TEST(PrefixTags, StayWithTheTokensWhoeverMakesThemKnown) {
  PrefixBank bank(prefix_settings(1 << 20));
  add(bank, "s", iota(60));
  {
    // What was known is dropped while a pass uses it, and comes back with what the pass adds.
    CallPass pass(bank, "s", joined(iota(60), iota(200, 900)));
    bank.clear();
    pass.commit(bank);
  }
  EXPECT_EQ(classes(bank, iota(60)), std::pair(6, 6));
  EXPECT_EQ(classes(bank, joined(iota(60), iota(200, 900))), std::pair(6, 9));
  // Rows of a batch that begin alike: what another one computed is of its length.
  CallPass first(bank, "t", joined(iota(20), iota(100, 300)));
  PrefixLease lease = bank.find("t", joined(iota(20), {1}), 0);
  std::vector<KeyRange> ranges = first.lease.reserved();
  ranges.resize(1);
  ranges[0].tokens = 20;
  ASSERT_TRUE(bank.reserve(lease, nullptr, 1, 0, size_class(21)));
  ranges.push_back(lease.reserved()[0]);
  bank.commit(lease, "t", joined(iota(20), {1}), ranges, 1, 0);
  EXPECT_EQ(classes(bank, iota(20), "t"), std::pair(7, 7));
  EXPECT_EQ(classes(bank, joined(iota(20), {1}), "t"), std::pair(5, 7));
}

TEST(PrefixCalls, LeaveNothingBeforeTheyAreCommitted) {
  MemoryAccount total(64 << 10);
  PrefixBank bank(prefix_settings(64 << 10, &total));
  std::int64_t held = 0;
  while (bank.counters().evictions == 0) add(bank, "a", iota(100, 1000 * held++));
  const auto before = numbers_of(bank.counters());
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 0; n < held; ++n) lengths.push_back(known(bank, "a", iota(100, 1000 * n)));
  for (int round = 0; round < 3; ++round) {
    const CallPass fits(bank, "b", iota(900));
    EXPECT_TRUE(fits.complete);
    const CallPass beside(bank, "b", iota(900, 5000), 2000);
    EXPECT_TRUE(beside.complete);
    const CallPass too_large(bank, "b", iota(9000));
    EXPECT_FALSE(too_large.complete);
    const CallPass grows(bank, "a", joined(iota(100, 1000 * (held - 1)), {1, 2, 3}), 512);
    EXPECT_TRUE(grows.complete);
    EXPECT_EQ(numbers_of(bank.counters()), before);
    EXPECT_EQ(known(bank, "b", iota(900)), 0);
  }
  EXPECT_EQ(numbers_of(bank.counters()), before);
  EXPECT_EQ(total.used(), bank.counters().bytes);
  for (std::int64_t n = 0; n < held; ++n) EXPECT_EQ(known(bank, "a", iota(100, 1000 * n)), lengths[std::size_t(n)]);
  add(bank, "b", iota(900));
  EXPECT_GT(bank.counters().evictions, 1u);
  EXPECT_EQ(known(bank, "b", iota(900)), 900);
  EXPECT_LE(total.peak(), std::size_t{64} << 10);
}

TEST(PrefixCalls, RunningOnesTakeNoMoreThanTheCapacityTogether) {
  PrefixBank bank(prefix_settings(32 << 10));
  std::vector<CallPass> passes;
  std::size_t room = 0;
  for (std::int64_t n = 0; n < 64; ++n) {
    passes.emplace_back(bank, "s", iota(100, 1000 * n));
    if (passes.back().complete) room += 100 * kCallTokenBytes;
  }
  EXPECT_LE(room, std::size_t{32} << 10);
  EXPECT_GT(room, std::size_t{24} << 10);
  EXPECT_EQ(bank.counters().bytes, 0u);
  for (CallPass& pass : passes) pass.commit(bank);
  EXPECT_EQ(bank.counters().insertions + bank.counters().rejected, 64u);
  EXPECT_LE(bank.counters().peak_bytes, std::size_t{32} << 10);
}

// A row that builds on another row's tokens may be kept where that one is not.
TEST(PrefixCalls, WhatAnotherRowMadeKnownIsNotGivenBackWithItsOwner) {
  PrefixBank bank(prefix_settings(1 << 20));
  add(bank, "s", iota(10), 16);
  std::optional<CallPass> owner(std::in_place, bank, "s", joined(iota(10), iota(90, 100)));
  ASSERT_EQ(owner->lease.reserved().size(), 2u) << "spare room, and a block of its own";
  const Tokens tokens = joined(iota(10), {100, 101, 102, 7, 8});
  {
    PrefixLease lease = bank.find("s", tokens, 0);
    auto ranges = lease.known();
    ranges.push_back(owner->lease.reserved()[0]);
    ranges.back().tokens = 3;
    ASSERT_TRUE(bank.reserve(lease, nullptr, 2, 0, 4));
    ranges.push_back(lease.reserved()[0]);
    ranges.back().block->tensor(0).copy_(at::tensor({7.0F, 8.0F}).view({1, 2, 1}).expand({1, 2, 4}));
    bank.commit(lease, "s", tokens, ranges, 1, 0);
    owner.reset();  // it was not committed
  }
  EXPECT_EQ(known(bank, "s", tokens), 15);
  for (std::int64_t n = 0; n < 4; ++n) add(bank, "s", joined(iota(10), iota(5, 200 + 10 * n)), 16);
  EXPECT_EQ(known(bank, "s", tokens), 15) << "nobody wrote over it";
}

// --- token states -------------------------------------------------------------------------------------

TokenBank::Settings token_settings(std::size_t capacity) {
  TokenBank::Settings settings;
  settings.capacity_bytes = capacity;
  settings.layout.specs = {{{3}, at::TensorOptions()}, {{2}, at::TensorOptions()}, {{2}, at::TensorOptions()}};
  settings.layout.first_key = {{0}};
  settings.layout.hidden = {1, 2};
  return settings;
}

std::unique_ptr<PendingEntry> pending_of(TokenBank& bank, std::int64_t tokens) {
  auto pending = bank.reserve(tokens);
  for (std::size_t i = 0; pending && i < 3; ++i) pending->tensor(i).fill_(1);
  return pending;
}

TEST(TokenCalls, LeaveNothingBeforeTheyAreKept) {
  constexpr std::size_t kCapacity = 40000;
  TokenBank bank(token_settings(kCapacity));
  std::int64_t held = 0;
  while (bank.counters().evictions == 0) {
    const auto tokens = iota(50, 1000 * held++);
    bank.keep("a", {tokens, 1}, pending_of(bank, 50), 1, static_cast<double>(held));
  }
  const auto before = numbers_of(bank.counters());
  {
    const auto one = pending_of(bank, 500);
    const auto two = pending_of(bank, 500);
    EXPECT_TRUE(one && two);
    EXPECT_EQ(pending_of(bank, 5000), nullptr);
    EXPECT_EQ(pending_of(bank, 600), nullptr) << "running passes take no more than the capacity together";
    EXPECT_EQ(numbers_of(bank.counters()), before);
  }
  EXPECT_TRUE(pending_of(bank, 600));
  EXPECT_EQ(numbers_of(bank.counters()), before);
  for (std::int64_t n = 1; n < held; ++n) {
    const auto tokens = iota(50, 1000 * n);
    EXPECT_TRUE(bank.find("a", {tokens, 1}, 1000));
  }
  const auto large = iota(600, 900000);
  bank.keep("b", {large, 1}, pending_of(bank, 600), 1, 2000);
  EXPECT_GT(bank.counters().evictions, 3u);
  EXPECT_TRUE(bank.find("b", {large, 1}, 2001));
  bank.keep("b", {large, 1}, nullptr, 1, 2000);
  EXPECT_EQ(bank.counters().rejected, 1u);
  EXPECT_LE(bank.counters().peak_bytes, kCapacity);
}

// --- segments -----------------------------------------------------------------------------------------

const std::vector<KeySpec> kSpecs{{{1, 2, 1, 4}, 2, at::kFloat}, {{1, 1, 8}, 1, at::kBFloat16}};

SegmentBank::Room room_for(SegmentBank& bank, const std::string& partition, const Tokens& tokens) {
  auto room = bank.reserve(partition, tokens);
  const auto n = static_cast<std::int64_t>(tokens.size());
  if (room.pending) {
    room.pending->set(0, at::ones({1, 2, n, 4}));
    room.pending->set(1, at::ones({1, n, 8}, at::kBFloat16));
  }
  return room;
}

TEST(SegmentCalls, LeaveNothingBeforeTheyAreInserted) {
  constexpr std::size_t kCapacity = 60000;
  SegmentBank bank({kCapacity, {}, 1, 16, kSpecs, BankFormat::kAsComputed});
  std::int64_t held = 0;
  while (bank.counters().evictions == 0) {
    bank.insert(room_for(bank, "a", iota(100, 1000 * held)), 1, static_cast<double>(held));
    ++held;
  }
  const auto before = numbers_of(bank.counters());
  {
    const auto one = room_for(bank, "b", iota(600));
    EXPECT_TRUE(one.pending);
    EXPECT_TRUE(room_for(bank, "b", iota(5000)).refused);
    EXPECT_TRUE(room_for(bank, "b", iota(800, 7000)).refused) << "beside the other one";
    const auto known_already = room_for(bank, "a", iota(64, 1000 * (held - 1)));
    EXPECT_FALSE(known_already.pending || known_already.refused);
    EXPECT_EQ(numbers_of(bank.counters()), before);
  }
  EXPECT_EQ(numbers_of(bank.counters()), before);
  for (std::int64_t n = 1; n < held; ++n) {
    EXPECT_EQ(bank.find("a", iota(100, 1000 * n), {}, 1000).size(), 1u) << n;
  }
  bank.insert(room_for(bank, "b", iota(800)), 1, 2000);
  EXPECT_GT(bank.counters().evictions, 3u);
  EXPECT_EQ(bank.find("b", iota(800), {}, 2001).size(), 1u);
  bank.insert(room_for(bank, "b", iota(5000)), 1, 2002);
  EXPECT_EQ(bank.counters().rejected, 1u);
  EXPECT_LE(bank.counters().peak_bytes, kCapacity);
}

// --- outputs ------------------------------------------------------------------------------------------

TEST(OutputTags, TellTheBatchARowWasComputedIn) {
  OutputBank bank(1 << 20);
  bank.insert("k", {at::ones({1, 4})}, true, {5, 128});
  bank.insert("l", {at::ones({1, 4})}, true);
  const auto entry = bank.find("k", true);
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->rows(), 5);
  EXPECT_EQ(entry->padded_length(), 128);
  EXPECT_EQ(entry->rows_class(), 3);
  EXPECT_EQ(entry->length_class(), 7);
  EXPECT_EQ(bank.find("l", true)->rows(), 0);
  bank.insert("k", {at::ones({1, 4})}, true, {9, 9});
  EXPECT_EQ(bank.find("k", true)->rows(), 5) << "it stays, and where it came from with it";
}

// --- memory that fails at every place -----------------------------------------------------------------

TEST(FailingMemory, CommittingToAPrefixBankNeverFails) {
  for (const std::size_t capacity : {std::size_t{1} << 20, std::size_t{12000}}) {
    PrefixBank bank(prefix_settings(capacity));
    add(bank, "s", iota(40), 64);
    std::uint64_t turns = 1;
    std::optional<CallPass> pass;
    const auto prepare = [&] {
      pass.reset();
      // A new node, one that splits another one, and one that goes on in its block, in turn.
      const auto number = 1000 * static_cast<std::int64_t>(++turns);
      const Tokens tokens = turns % 3 == 0   ? iota(40, number)
                            : turns % 3 == 1 ? joined(iota(20), iota(8, number))
                                             : joined(iota(40), iota(3, number));
      pass.emplace(bank, turns % 7 == 0 ? "another partition, whose name is not short" : "s", tokens, 64);
      ASSERT_TRUE(pass->complete);
    };
    prepare();
    for (int round = 0; round < 12; ++round) {
      at_every_allocation([&] { pass->commit(bank); },
                          [&](bool threw) {
                            EXPECT_FALSE(threw);
                            const auto counters = bank.counters();
                            EXPECT_EQ(counters.insertions + counters.rejected, turns);
                            EXPECT_LE(counters.peak_bytes, capacity);
                            const auto length = known(bank, pass->partition, pass->tokens);
                            EXPECT_TRUE(counters.rejected > 0 || length == std::ssize(pass->tokens));
                            prepare();
                          });
    }
    pass.reset();
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0u);
  }
}

TEST(FailingMemory, KeepingTokenStatesNeverFails) {
  for (const std::size_t capacity : {std::size_t{1} << 20, std::size_t{12000}}) {
    TokenBank bank(token_settings(capacity));
    std::uint64_t turns = 0;
    Tokens tokens;
    std::unique_ptr<PendingEntry> pending;
    const auto prepare = [&] {
      tokens = joined(iota(30), iota(20, 1000 * static_cast<std::int64_t>(++turns)));
      pending = pending_of(bank, 50);
    };
    prepare();
    at_every_allocation(
        [&] {
          bank.keep("a", {tokens, 1}, std::move(pending), 1, 0);
        },
        [&](bool threw) {
          EXPECT_FALSE(threw);
          const auto counters = bank.counters();
          EXPECT_EQ(counters.insertions + counters.rejected, turns);
          EXPECT_LE(counters.peak_bytes, capacity);
          prepare();
        });
    pending.reset();
    EXPECT_GT(bank.counters().rejected, 3u);
    EXPECT_TRUE(pending_of(bank, static_cast<std::int64_t>(capacity / 40))) << "all pending entries were given back";
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0u);
  }
}

TEST(FailingMemory, ReservingTokenStatesGivesBackWhatItTook) {
  TokenBank bank(token_settings(12000));
  at_every_allocation([&] { std::ignore = bank.reserve(100); }, [](bool threw) { EXPECT_FALSE(threw); });
  EXPECT_TRUE(bank.reserve(300));
  EXPECT_EQ(bank.counters().rejected, 0u);
}

TEST(FailingMemory, SegmentsAreReservedAndInsertedOrRejected) {
  for (const std::size_t capacity : {std::size_t{1} << 20, std::size_t{20000}}) {
    SegmentBank bank({capacity, {}, 1, 16, kSpecs, BankFormat::kAsComputed});
    bank.insert(room_for(bank, "a", iota(100)), 1, 0);
    const auto wanted = iota(200, 5000);
    at_every_allocation([&] { std::ignore = bank.reserve("a", wanted); }, [](bool threw) { EXPECT_FALSE(threw); });
    EXPECT_EQ(bank.counters().rejected, 0u);
    std::uint64_t turns = 1;
    SegmentBank::Room room;
    const auto prepare = [&] { room = room_for(bank, "a", iota(100, 1000 * static_cast<std::int64_t>(++turns))); };
    prepare();
    at_every_allocation([&] { bank.insert(std::move(room), 1, 0); },
                        [&](bool threw) {
                          EXPECT_FALSE(threw);
                          const auto counters = bank.counters();
                          EXPECT_EQ(counters.insertions + counters.rejected, turns);
                          EXPECT_LE(counters.peak_bytes, capacity);
                          prepare();
                        });
    EXPECT_GT(bank.counters().insertions, 3u) << "what fails first evicts, and is tried again";
    const auto whole = bank.find("a", iota(100, 1000 * static_cast<std::int64_t>(turns - 1)), {}, 0);
    ASSERT_FALSE(whole.empty()) << "the last one had all its memory";
    SegmentBank::Room mean;
    const auto origin = SegmentOrigin{0, 2};
    const auto mean_of = [&] {
      mean = bank.reserve_mean("a", iota(40, 70000), origin);
      ASSERT_TRUE(mean.pending);
      mean.pending->set(0, at::ones({1, 2, 40, 4}));
      mean.pending->set(1, at::ones({1, 40, 8}, at::kBFloat16));
    };
    mean_of();
    at_every_allocation([&] { bank.insert_mean(std::move(mean), *whole[0].donor, 1, 0); },
                        [&](bool threw) {
                          EXPECT_FALSE(threw);
                          mean_of();
                        });
    EXPECT_EQ(bank.counters().means, 1u);
    mean = {};
    room = {};
  }
}

TEST(FailingMemory, LayerStatesAreInsertedOrRejected) {
  for (const auto kind : {FingerprintKind::kRaw, FingerprintKind::kJaccard}) {
    FingerprintOptions options;
    options.kind = kind;
    const Fingerprinter fingerprinter(options, 8);
    LayerBank::Settings settings;
    settings.capacity_bytes = 1 << 20;
    LayerBank bank(settings, {&fingerprinter});
    std::uint64_t turns = 0;
    LayerBank::Candidate candidate;
    const auto prepare = [&] {
      ++turns;
      std::mt19937_64 random(turns);
      candidate = {};
      candidate.number = turns;
      candidate.key = turns;
      candidate.hidden = at::ones({1, 10, 8});
      candidate.inputs = {at::full({10}, static_cast<std::int64_t>(turns), at::kLong)};
      std::vector<float> state(8);
      for (float& value : state) value = static_cast<float>(random() % 1000) - 500;
      candidate.ids = iota(10, 100 * static_cast<std::int64_t>(turns));
      candidate.states = {fingerprinter.needs_state() ? state : std::vector<float>{}};
      candidate.fingerprints = {fingerprinter.make(candidate.states[0], candidate.ids)};
      ASSERT_TRUE(candidate.fingerprints[0]);
    };
    prepare();
    at_every_allocation([&] { bank.insert("a", candidate, 0); },
                        [&](bool threw) {
                          EXPECT_FALSE(threw);
                          const auto counters = bank.counters();
                          EXPECT_EQ(counters.insertions + counters.rejected, turns);
                          prepare();
                        });
    EXPECT_GT(bank.counters().rejected, 3u);
    const auto hit = bank.find("a", 0, *candidate.fingerprints[0], -1, 1);
    EXPECT_TRUE(hit);
  }
}

}  // namespace
}  // namespace llmcache::test
