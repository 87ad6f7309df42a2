// EvictedKeys: what is remembered of entries that went, in how little room.
#include "bank/evicted_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <random>
#include <string_view>
#include <vector>

#include "token_ids.h"

namespace llmcache::test {
namespace {

using Cause = EvictedKeys::Cause;
constexpr std::size_t kHashes = 1024;

Tokens counted(std::size_t count, std::int64_t first = 0) {
  Tokens tokens;
  while (tokens.size() < count) tokens.push_back(first++);
  return tokens;
}

TEST(EvictedKeysTest, RemembersTheLatestCause) {
  EvictedKeys keys(kHashes);
  EXPECT_TRUE(keys.empty());
  EXPECT_EQ(keys.find(1), std::nullopt);
  keys.add(1, Cause::kRoom);
  keys.add(2, Cause::kAge);
  EXPECT_FALSE(keys.empty());
  EXPECT_EQ(keys.find(1), Cause::kRoom);
  EXPECT_EQ(keys.find(2), Cause::kAge) << "another set, the same tag";
  EXPECT_EQ(keys.find(3), std::nullopt);
  keys.add(1, Cause::kAge);
  EXPECT_EQ(keys.find(1), Cause::kAge);
  keys.clear();
  EXPECT_TRUE(keys.empty());
  EXPECT_EQ(keys.find(1), std::nullopt);
}

TEST(EvictedKeysTest, ForgetsTheOldestAndSaysNothingOfWhatWasNeverThere) {
  EvictedKeys keys(kHashes);
  std::mt19937_64 random(7);
  std::vector<std::uint64_t> all;
  for (std::size_t i = 0; i < 4 * kHashes; ++i) all.push_back(random());
  for (const auto hash : all) keys.add(hash, Cause::kRoom);
  std::size_t latest = 0;
  for (std::size_t i = all.size() - kHashes / 4; i < all.size(); ++i) latest += keys.find(all[i]).has_value();
  EXPECT_EQ(latest, kHashes / 4) << "sets of eight hold what came last";
  std::size_t oldest = 0;
  for (std::size_t i = 0; i < kHashes; ++i) oldest += keys.find(all[i]).has_value();
  EXPECT_LT(oldest, kHashes / 8);
  std::size_t wrong = 0;
  for (int i = 0; i < 100000; ++i) wrong += keys.find(random()).has_value();
  EXPECT_LE(wrong, 1U);
}

TEST(EvictedKeysTest, AHashThatComesAgainTakesNoSecondPlace) {
  EvictedKeys keys(8);  // one set
  const auto hash = [](std::uint64_t n) { return n << 40U; };
  for (std::uint64_t n = 1; n <= 8; ++n) keys.add(hash(n), Cause::kRoom);
  for (int i = 0; i < 20; ++i) keys.add(hash(1), Cause::kRoom);
  for (std::uint64_t n = 1; n <= 8; ++n) EXPECT_TRUE(keys.find(hash(n))) << n;
  keys.add(hash(9), Cause::kRoom);
  EXPECT_FALSE(keys.find(hash(2))) << "the oldest by now";
  EXPECT_TRUE(keys.find(hash(1)));
}

TEST(EvictedKeysTest, CountsTokensBehindAKnownPrefix) {
  for (const std::size_t ids : {std::size_t{1}, std::size_t{2}}) {
    EvictedKeys keys(kHashes);
    const auto tokens = [&](std::size_t count, std::int64_t first = 0) { return counted(count * ids, first); };
    const auto gone = [&](std::string_view partition, const Tokens& asked, std::size_t known) {
      return count_evicted(keys, partition, asked, ids, known).tokens;
    };
    EXPECT_EQ(gone("a", tokens(40), 0), 0) << "nothing went yet";
    add_evicted_prefixes(keys, "a", tokens(40), ids, 20, Cause::kOwnQuota);
    EXPECT_EQ(count_evicted(keys, "a", tokens(40), ids, 20).cause, Cause::kOwnQuota);
    EXPECT_EQ(gone("a", tokens(40), 20), 20) << "just this sequence";
    EXPECT_EQ(gone("a", tokens(60), 20), 12) << "blocks of 16";
    EXPECT_EQ(gone("a", tokens(33), 20), 12);
    EXPECT_EQ(gone("a", tokens(31), 20), 0);
    EXPECT_EQ(gone("a", tokens(40), 36), 4);
    EXPECT_EQ(gone("a", tokens(40), 40), 0);
    EXPECT_EQ(gone("a", tokens(40), 0), 0) << "the first block did not go";
    EXPECT_EQ(gone("b", tokens(40), 20), 0) << "another tenant's";
    EXPECT_EQ(gone("a", tokens(40, 1), 20), 0) << "other tokens";
    auto other = tokens(40);
    other.back() = -1;
    EXPECT_EQ(gone("a", other, 20), 12);
    other[0] = -1;
    EXPECT_EQ(gone("a", other, 20), 0) << "a block counts by all that stands before it";
  }
}

}  // namespace
}  // namespace llmcache::test
