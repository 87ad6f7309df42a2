// Totals of calls: every token in one part, and what is read belongs together. No model.
#include "call_totals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

constexpr std::size_t kLayers = 3;

/// A row of `tokens`, of which `computed` went through every layer.
SequenceReport row(std::int64_t tokens, Source source, std::int64_t computed) {
  SequenceReport sequence;
  sequence.tokens = tokens;
  sequence.source = source;
  const auto own = static_cast<std::int32_t>(computed);
  sequence.layers.assign(kLayers, {own, static_cast<std::int32_t>(tokens) - own});
  return sequence;
}

TokenBalance balance_of(const std::vector<SequenceReport>& sequences, bool replaced = false) {
  ForwardReport report;
  report.sequences = sequences;
  report.replaced = replaced;
  TokenBalance balance;
  balance.add(report);
  EXPECT_EQ(balance.requested, balance.reused() + balance.computed());
  return balance;
}

std::uint64_t from(const TokenBalance& balance, Source source) {
  return balance.reused_from[static_cast<std::size_t>(source)];
}
std::uint64_t because(const TokenBalance& balance, MissReason reason) {
  return balance.computed_because[static_cast<std::size_t>(reason)];
}

TEST(TokenBalanceTest, EverySourceHasItsPart) {
  auto identical = row(9, Source::kIdentical, 0);
  identical.reused_tokens = 9;
  auto prefix = row(20, Source::kPrefix, 5);
  prefix.reused_tokens = 12;
  prefix.shared_tokens = 3;
  auto exit = row(7, Source::kEarlyExit, 7);
  exit.layers.back() = {0, 7};
  auto partial = row(30, Source::kPartial, 10);
  partial.reused_tokens = 8;
  partial.layers[0] = {22, 8};  // all but the exact prefix run through the first layer
  const auto balance =
      balance_of({identical, prefix, exit, partial, row(11, Source::kSimilar, 0), row(4, Source::kComputed, 4)});
  EXPECT_EQ(balance.requested, 81U);
  EXPECT_EQ(from(balance, Source::kIdentical), 9U);
  EXPECT_EQ(from(balance, Source::kPrefix), 12U + 8U);
  EXPECT_EQ(balance.shared, 3U);
  EXPECT_EQ(from(balance, Source::kEarlyExit), 7U) << "one layer was spared";
  EXPECT_EQ(from(balance, Source::kPartial), 12U);
  EXPECT_EQ(from(balance, Source::kSimilar), 11U);
  EXPECT_EQ(from(balance, Source::kComputed), 0U);
  EXPECT_EQ(because(balance, MissReason::kNew), 5U + 10U + 4U);
}

TEST(TokenBalanceTest, ComputedTokensHaveTheirReasons) {
  auto prefix = row(50, Source::kPrefix, 40);
  prefix.reused_tokens = 10;
  prefix.evicted_tokens = 32;
  auto all_gone = row(12, Source::kComputed, 12);
  all_gone.evicted_tokens = 99;  // more than it computes: never more than that
  auto failed = row(6, Source::kComputed, 6);
  failed.miss = MissReason::kFallback;
  auto over = row(8, Source::kComputed, 8);
  over.miss = MissReason::kOverBudget;
  auto failed_and_gone = failed;  // the reason that says more is the one that counts
  failed_and_gone.evicted_tokens = 4;
  auto audited_and_gone = failed_and_gone;
  audited_and_gone.miss = MissReason::kAudit;
  auto quota = row(20, Source::kComputed, 20);
  quota.evicted_tokens = 16;
  quota.evicted_because = MissReason::kOwnQuota;
  const auto balance = balance_of({prefix, all_gone, failed, over, failed_and_gone, audited_and_gone, quota});
  EXPECT_EQ(because(balance, MissReason::kOwnQuota), 16U);
  EXPECT_EQ(because(balance, MissReason::kEvicted), 32U + 12U);
  EXPECT_EQ(because(balance, MissReason::kNew), 8U + 4U);
  EXPECT_EQ(because(balance, MissReason::kFallback), 6U + 6U);
  EXPECT_EQ(because(balance, MissReason::kAudit), 6U);
  EXPECT_EQ(because(balance, MissReason::kOverBudget), 8U);
}

TEST(TokenBalanceTest, WhatWasComputedForNothingIsNoNegativeNumber) {
  auto stopped = row(10, Source::kPartial, 14);  // began with reuse, and was computed again
  const auto balance = balance_of({stopped, row(0, Source::kComputed, 0)});
  EXPECT_EQ(balance.requested, 10U);
  EXPECT_EQ(balance.computed(), 10U);
}

TEST(TokenBalanceTest, OfAReplacedAnswerNothingWasReused) {
  auto identical = row(9, Source::kIdentical, 0);
  identical.reused_tokens = 9;
  const auto balance = balance_of({identical}, true);
  EXPECT_EQ(balance.reused(), 0U);
  EXPECT_EQ(because(balance, MissReason::kFallback), 9U);
}

TEST(TokenBalanceTest, ReasonsHaveNamesOfTheirOwn) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < kMissReasons; ++i) names.emplace_back(to_string(static_cast<MissReason>(i)));
  EXPECT_STREQ(to_string(static_cast<MissReason>(kMissReasons)), "unknown") << "kMissReasons counts them";
  EXPECT_STREQ(to_string(static_cast<Source>(kSources)), "unknown") << "kSources counts them";
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::unique(names.begin(), names.end()), names.end());
  EXPECT_THAT(names, ::testing::Not(::testing::Contains("unknown")));
}

TEST(TimeHistogramTest, BucketsIncludeTheirUpperEnds) {
  TimeHistogram times;
  for (const double seconds : {0.0, 1e-5, 1.1e-5, 0.3, 10.0, 1000.0}) times.add(seconds);
  EXPECT_EQ(times.count, 6U);
  EXPECT_DOUBLE_EQ(times.sum, 1010.3 + 2.1e-5);
  EXPECT_EQ(times.buckets[0], 2U);
  EXPECT_EQ(times.buckets[1], 1U);
  EXPECT_EQ(times.buckets[TimeHistogram::kBounds.size() - 1], 1U) << "10 s";
  EXPECT_EQ(times.buckets.back(), 1U);
  EXPECT_EQ(std::accumulate(times.buckets.begin(), times.buckets.end(), std::uint64_t{0}), times.count);
  EXPECT_TRUE(std::is_sorted(TimeHistogram::kBounds.begin(), TimeHistogram::kBounds.end()));
}

TEST(CallTotalsTest, AReplacedAnswerCountsAsComputedEverywhere) {
  ForwardReport report;
  auto identical = row(9, Source::kIdentical, 0);
  identical.reused_tokens = 9;
  identical.source_tokens = identical.source_reused = 4;
  report.sequences = {identical, row(5, Source::kPartial, 2)};
  report.replaced = true;
  CallTotals totals;
  totals.add(report);
  Stats stats;
  totals.fill(stats);
  EXPECT_EQ(stats.identical_hits, 0U);
  EXPECT_EQ(stats.tokens_reused + stats.source_reused + stats.layer_tokens_reused, 0U);
  EXPECT_EQ(stats.tokens_computed, 14U);
  EXPECT_EQ(stats.layer_tokens_computed, kLayers * 14U);
  EXPECT_EQ(stats.sequences_from[static_cast<std::size_t>(Source::kComputed)], 2U);
  EXPECT_EQ(stats.balance.reused(), 0U);
}

TEST(CallTotalsTest, WhatIsReadBelongsTogether) {
  constexpr int kThreads = 64;
  constexpr int kCalls = 500;
  CallTotals totals;
  ForwardReport report;
  auto prefix = row(20, Source::kPrefix, 8);
  prefix.reused_tokens = 12;
  report.sequences = {prefix, row(5, Source::kComputed, 5)};
  report.layer_ms = {1, 2, 3};
  report.padding_skipped = 15;
  report.lookup_ms = report.store_ms = 0.01;
  report.total_ms = 7;
  std::atomic<int> running{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kCalls; ++i) totals.add(report);
      --running;
    });
  }
  int wrong = 0;
  do {
    Stats stats;
    totals.fill(stats);
    wrong += stats.tokens != 25 * stats.requests || stats.balance.requested != stats.tokens;
    wrong += stats.balance.reused() + stats.balance.computed() != stats.tokens;
    wrong += stats.tokens_reused != 12 * stats.requests || stats.padding_skipped != 15 * stats.requests;
    wrong += stats.times.total.count != stats.requests || stats.times.engine.count != stats.requests;
    wrong += stats.layer_tokens_computed + stats.layer_tokens_reused != kLayers * stats.tokens;
    wrong += stats.sequences != 2 * stats.requests || stats.sequences_from[0] != stats.requests;
  } while (running > 0);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  Stats stats;
  totals.fill(stats);
  EXPECT_EQ(stats.requests, static_cast<std::uint64_t>(kThreads * kCalls));
  EXPECT_EQ(stats.tokens_computed, 13 * stats.requests);
  EXPECT_THAT(stats.to_string(), HasSubstr("computed:  " + std::to_string(13 * stats.requests) + " new\n"));
}

}  // namespace
}  // namespace llmcache::test
