// The parts that reuse of segments is made of: how keys turn with the position, what the index finds, what the bank
// holds.
#include "bank/segment_bank.h"

#include <cmath>
#include <deque>
#include <random>
#include <tuple>

#include "match/block_hash_index.h"
#include "model/rotary.h"
#include "support.h"
#include "token_ids.h"

namespace llmcache::test {
namespace {

// --- rotation -----------------------------------------------------------------------------------------

/// Keys [1, heads, tokens, channels] of one token at the positions 0, 1, ..., turned by a rotation.
at::Tensor turned_keys(const KeyRotation& rotation, std::int64_t channels, std::int64_t tokens) {
  at::manual_seed(3);
  auto keys = at::randn({1, 2, 1, channels}).expand({1, 2, tokens, channels}).clone();
  Tokens moves(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < moves.size(); ++t) moves[t] = static_cast<std::int64_t>(t);
  rotate_(keys, 2, rotation, angles_of(rotation, moves, at::kCPU));
  return keys;
}

KeyRotation rotation_of(KeyRotation::Layout layout, std::int64_t pairs, double base) {
  KeyRotation rotation{layout, {}};
  for (std::int64_t i = 0; i < pairs; ++i) {
    rotation.frequencies.push_back(std::pow(base, -static_cast<double>(i) / static_cast<double>(pairs)));
  }
  return rotation;
}

class Rotation : public ::testing::TestWithParam<std::tuple<KeyRotation::Layout, int, double>> {};

TEST_P(Rotation, IsFoundInKeysOfOneToken) {
  const auto [layout, pairs, base] = GetParam();
  const auto made = rotation_of(layout, pairs, base);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto keys = turned_keys(made, 32, 320).to(type);
    std::string why;
    const auto found = find_rotation(keys, 2, why);
    ASSERT_TRUE(found) << why;
    EXPECT_EQ(found->layout, layout);
    ASSERT_GE(found->frequencies.size(), made.frequencies.size());
    for (std::size_t i = 0; i < made.frequencies.size(); ++i) {
      EXPECT_NEAR(found->frequencies[i], made.frequencies[i], type == at::kFloat ? 1e-6 : 3e-5) << i;
    }
    EXPECT_TRUE(foretells(*found, keys, 2));
    EXPECT_FALSE(foretells(rotation_of(layout, pairs, base * 3), keys, 2));
    // The same with tokens in the last dimension.
    EXPECT_TRUE(find_rotation(keys.transpose(2, 3).contiguous(), 3, why)) << why;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Rotation,
                         ::testing::Combine(::testing::Values(KeyRotation::Layout::kHalves,
                                                              KeyRotation::Layout::kInterleaved),
                                            ::testing::Values(16, 8, 3), ::testing::Values(1e4, 5e5)));

TEST(RotationRefused, WhereKeysAreNotTurned) {
  std::string why;
  at::manual_seed(5);
  EXPECT_FALSE(find_rotation(at::randn({1, 2, 64, 16}), 2, why));
  EXPECT_THAT(why, ::testing::HasSubstr("length"));
  // Learned positions, added.
  const auto added = at::randn({1, 2, 1, 16}) + 0.2 * at::randn({1, 1, 64, 16});
  EXPECT_FALSE(find_rotation(added, 2, why));
  // Turned by the square of the position.
  const auto rotation = rotation_of(KeyRotation::Layout::kHalves, 8, 1e4);
  auto keys = at::randn({1, 2, 1, 16}).expand({1, 2, 64, 16}).clone();
  Tokens squares;
  for (std::int64_t t = 0; t < 64; ++t) squares.push_back(t * t);
  rotate_(keys, 2, rotation, angles_of(rotation, squares, at::kCPU));
  EXPECT_FALSE(find_rotation(keys, 2, why));
  EXPECT_THAT(why, ::testing::HasSubstr("foretells"));
  EXPECT_FALSE(find_rotation(keys.narrow(2, 0, 8), 2, why));
}

TEST(RotationMoves, ThereAndBack) {
  const auto rotation = rotation_of(KeyRotation::Layout::kInterleaved, 8, 1e4);
  const auto keys = at::randn({1, 3, 5, 20});
  auto moved = keys.clone();
  rotate_(moved, 2, rotation, angles_of(rotation, {0, 7, -3, 100, 4000}, at::kCPU));
  EXPECT_TRUE(at::equal(moved.select(2, 0), keys.select(2, 0)));
  EXPECT_FALSE(at::allclose(moved.select(2, 1), keys.select(2, 1), 1e-2, 1e-2));
  EXPECT_TRUE(at::equal(moved.narrow(3, 16, 4), keys.narrow(3, 16, 4)));
  rotate_(moved, 2, rotation, angles_of(rotation, {0, -7, 3, -100, -4000}, at::kCPU));
  EXPECT_TRUE(at::allclose(moved, keys, 1e-4, 1e-5));
}

// --- index --------------------------------------------------------------------------------------------

struct Library {
  explicit Library(std::size_t width = 1)
      : index(
            width, 16,
            [this](std::uint32_t slot) {
              return BlockHashIndex::Sequence{partitions.at(slot), sequences.at(slot)};
            },
            &memory) {}
  std::uint32_t add(Tokens tokens, std::string partition = "a") {
    sequences.push_back(std::move(tokens));
    partitions.push_back(std::move(partition));
    index.insert(static_cast<std::uint32_t>(sequences.size() - 1));
    return static_cast<std::uint32_t>(sequences.size() - 1);
  }
  [[nodiscard]] std::vector<BlockMatch> segments(const Tokens& tokens, BlockHashIndex::Wanted wanted = {},
                                                 std::string partition = "a") const {
    return index.segments({partition, tokens}, wanted);
  }

  std::deque<Tokens> sequences;
  std::deque<std::string> partitions;
  std::pmr::unsynchronized_pool_resource memory;
  BlockHashIndex index;
};

Tokens range(std::int64_t first, std::int64_t count) {
  Tokens tokens;
  for (std::int64_t t = 0; t < count; ++t) tokens.push_back(first + t);
  return tokens;
}

Tokens joined(std::initializer_list<Tokens> parts) {
  Tokens all;
  for (const Tokens& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST(BlockIndex, FindsARunWhereverItStands) {
  Library library;
  const auto slot = library.add(range(0, 100));
  for (const std::int64_t lead : {0, 1, 7, 16, 33}) {
    const auto request = joined({range(5000, lead), range(20, 31), range(6000, 9)});
    const auto found = library.segments(request);
    ASSERT_EQ(found.size(), 1u) << lead;
    EXPECT_EQ(found[0].begin, static_cast<std::size_t>(lead));
    EXPECT_EQ(found[0].slot, slot);
    EXPECT_EQ(found[0].donor_begin, 20u);
    EXPECT_EQ(found[0].tokens, 31u);
  }
  EXPECT_TRUE(library.segments(range(5, 15)).empty());
  EXPECT_TRUE(library.segments(joined({range(5000, 3), range(20, 31)}), {.least = 32}).empty());
  EXPECT_TRUE(library.segments(joined({range(5000, 3), range(20, 31)}), {}, "b").empty());
}

TEST(BlockIndex, RunsDoNotOverlapAndTheLongestWins) {
  Library library;
  library.add(range(0, 60));
  const auto longer = library.add(joined({range(900, 5), range(20, 80)}));
  const auto request = joined({range(40, 60), range(0, 40)});
  const auto found = library.segments(request);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].slot, longer);
  EXPECT_EQ(found[0].tokens, 60u);
  EXPECT_EQ(found[1].begin, 60u);
  EXPECT_EQ(found[1].tokens, 40u);
  EXPECT_EQ(library.segments(request, {.from = 30}).at(0).begin, 30u);
}

TEST(BlockIndex, OnlyWhatHasNotMoved) {
  Library library;
  library.add(range(0, 100));
  const auto edited = joined({range(0, 20), range(800, 5), range(25, 75)});
  const auto found = library.segments(edited, {.from = 20, .moved = false});
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].begin, 25u);
  EXPECT_EQ(found[0].donor_begin, 25u);
  EXPECT_TRUE(library.segments(joined({range(800, 4), range(25, 75)}), {.moved = false}).empty());
}

TEST(BlockIndex, LongestPrefixAmongManyThatBeginAlike) {
  Library library;
  std::uint32_t wanted = 0;
  for (std::int64_t i = 0; i < 200; ++i) {
    const auto slot = library.add(joined({range(0, 40), range(1000 + 100 * i, 30)}));
    if (i == 77) wanted = slot;
  }
  const auto request = joined({range(0, 40), range(8700, 25), range(5, 9)});
  const auto prefix = library.index.prefix({"a", request});
  EXPECT_EQ(prefix.slot, wanted);
  EXPECT_EQ(prefix.tokens, 65u);
  EXPECT_EQ(library.index.prefix({"b", request}).tokens, 0u);
  library.index.erase(wanted);
  const auto rest = library.index.prefix({"a", request});
  EXPECT_EQ(rest.tokens, 40u);
}

// --- bank ---------------------------------------------------------------------------------------------

const std::vector<KeySpec> kSpecs{{{1, 2, 1, 4}, 2, at::kFloat}, {{1, 1, 8}, 1, at::kBFloat16}};

SegmentBank make_bank(std::size_t capacity, Eviction policy = Eviction::kLru,
                      BankFormat format = BankFormat::kAsComputed) {
  return SegmentBank({capacity, {.policy = policy}, 1, 16, kSpecs, format});
}

bool keep(SegmentBank& bank, const Tokens& tokens, double now_s, const std::string& partition = "a") {
  auto room = bank.reserve(partition, tokens);
  if (!room.pending) {
    bank.insert(std::move(room), 1, now_s);
    return false;
  }
  const auto n = static_cast<std::int64_t>(tokens.size());
  const auto values = at::tensor(tokens, at::kFloat);
  room.pending->set(0, values.view({1, 1, n, 1}).expand({1, 2, n, 4}));
  room.pending->set(1, values.view({1, n, 1}).expand({1, n, 8}).to(at::kBFloat16));
  const auto rejected = bank.counters().rejected;
  bank.insert(std::move(room), 1, now_s);
  return bank.counters().rejected == rejected;
}

TEST(SegmentBankTest, GivesBackTheStatesOfARun) {
  auto bank = make_bank(1 << 20);
  ASSERT_TRUE(keep(bank, range(0, 100), 0));
  const auto hits = bank.find("a", joined({range(0, 20), range(700, 3), range(30, 50)}), {}, 1);
  ASSERT_EQ(hits.size(), 2u);
  EXPECT_TRUE(hits[0].exact);
  EXPECT_EQ(hits[0].tokens, 20);
  EXPECT_FALSE(hits[1].exact);
  EXPECT_EQ(hits[1].begin, 23);
  EXPECT_EQ(hits[1].donor_begin, 30);
  const auto state = hits[1].donor->state(0, hits[1].donor_begin, hits[1].tokens);
  EXPECT_TRUE(at::equal(state.select(3, 0).select(1, 0)[0], at::arange(30, 80, at::kFloat)));
  EXPECT_TRUE(bank.find("b", range(0, 50), {}, 1).empty());
}

TEST(SegmentBankTest, HoldsStatesInItsFormat) {
  auto whole = make_bank(1 << 20);
  ASSERT_TRUE(keep(whole, range(0, 100), 0));
  for (const auto format : {BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
    auto bank = make_bank(1 << 20, Eviction::kLru, format);
    ASSERT_TRUE(keep(bank, range(0, 100), 0));
    const auto hits = bank.find("a", range(0, 80), {}, 1);
    ASSERT_EQ(hits.size(), 1u);
    const auto state = hits[0].donor->state(0, 10, 50);
    EXPECT_EQ(state.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::allclose(state[0][0].select(1, 0), at::arange(10, 60, at::kFloat), 0.01, 0));
    EXPECT_LT(bank.counters().bytes, whole.counters().bytes);
  }
}

TEST(SegmentBankTest, KeepsNothingTwice) {
  auto bank = make_bank(1 << 20);
  EXPECT_TRUE(keep(bank, range(0, 50), 0));
  EXPECT_FALSE(keep(bank, range(0, 50), 1));
  EXPECT_FALSE(keep(bank, range(0, 32), 1));
  EXPECT_TRUE(keep(bank, range(0, 90), 2));
  const auto counters = bank.counters();
  EXPECT_EQ(counters.entries, 1u);
  EXPECT_EQ(counters.replaced, 1u);
  EXPECT_EQ(counters.tokens, 90u);
  EXPECT_EQ(counters.rejected, 0u);
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0u);
}

TEST(SegmentBankTest, NeverHoldsMoreThanItsCapacity) {
  for (const Eviction policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    constexpr std::size_t kCapacity = 40000;
    auto bank = make_bank(kCapacity, policy);
    std::mt19937_64 random(7);
    std::vector<SegmentHit> held;
    for (int step = 0; step < 400; ++step) {
      const auto now = static_cast<double>(step);
      const auto first = static_cast<std::int64_t>(random() % 40) * 1000;
      keep(bank, range(first, 20 + static_cast<std::int64_t>(random() % 200)), now);
      for (auto& hit : bank.find("a", joined({range(-50, 5), range(first + 10, 60)}), {}, now)) held.push_back(hit);
      if (step % 5 == 0) held.clear();
      const auto counters = bank.counters();
      ASSERT_LE(counters.bytes, kCapacity);
      ASSERT_LE(counters.peak_bytes, kCapacity);
    }
    EXPECT_GT(bank.counters().evictions, 20u);
    EXPECT_GT(bank.counters().entries, 0u);
    held.clear();
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0u);
    EXPECT_FALSE(keep(bank, range(0, 2000), 1000));
    EXPECT_GE(bank.counters().rejected, 1u);
  }
}

TEST(SegmentBankTest, WhatIsInUseStays) {
  auto bank = make_bank(30000);
  ASSERT_TRUE(keep(bank, range(0, 250), 0));
  const auto hits = bank.find("a", range(0, 250), {}, 1);
  ASSERT_EQ(hits.size(), 1u);
  EXPECT_FALSE(keep(bank, range(5000, 300), 2)) << "no room beside an entry in use";
  EXPECT_EQ(bank.find("a", range(0, 250), {}, 3).size(), 1u);
  EXPECT_TRUE(at::equal(hits[0].donor->state(0, 0, 250).select(3, 0).select(1, 0)[0], at::arange(250, at::kFloat)));
}

}  // namespace
}  // namespace llmcache::test
