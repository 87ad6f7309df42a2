// The choice of the tokens that are computed, and the bank of token states, without a model.
#include "bank/token_bank.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>

#include "match/active_set.h"

namespace llmcache {
namespace {

using Tokens = std::vector<std::int64_t>;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

// --- active tokens -----------------------------------------------------------------------------------

TEST(ActiveSet, IsTheCoreAndSamplesBetween) {
  const TokenAlignment inserted{20, 18, {{0, 0, 10}, {12, 10, 8}}};
  const auto core = choose_active(inserted, {.samples = 0, .neighbours = 1});
  EXPECT_THAT(core.active, ElementsAre(0, 9, 10, 11, 12, 19));
  EXPECT_THAT(core.samples, IsEmpty());
  EXPECT_THAT(choose_active(inserted, {.samples = 0, .neighbours = 0}).active, ElementsAre(0, 10, 11, 19));
  EXPECT_THAT(choose_active(inserted, {.samples = 0, .neighbours = 3}).active,
              ElementsAre(0, 7, 8, 9, 10, 11, 12, 13, 14, 19));
  const auto two = choose_active(inserted, {.samples = 2, .neighbours = 1});
  EXPECT_THAT(two.samples, ElementsAre(4, 15));
  EXPECT_THAT(two.active, ElementsAre(0, 4, 9, 10, 11, 12, 15, 19));
  EXPECT_THAT(choose_active(inserted, {.samples = 0, .neighbours = 1}, {3, 15}).active,
              ElementsAre(0, 3, 9, 10, 11, 12, 15, 19));
  // Where something was deleted nothing is new, but what stood beside it is not what it was.
  EXPECT_THAT(choose_active({10, 13, {{0, 0, 5}, {5, 8, 5}}}, {.samples = 0, .neighbours = 1}).active,
              ElementsAre(0, 4, 5, 9));
  EXPECT_EQ(choose_active(inserted, {.samples = 100, .neighbours = 1}).active.size(), 20u);
  EXPECT_EQ(choose_active({5, 5, {}}, {}).active.size(), 5u);
  EXPECT_THAT(choose_active({0, 5, {}}, {}).active, IsEmpty());
}

TEST(ActiveSet, SpreadsItsSamples) {
  const TokenAlignment all{402, 402, {{0, 0, 402}}};
  const auto set = choose_active(all, {.samples = 16, .neighbours = 1});
  ASSERT_EQ(set.samples.size(), 16u);
  for (std::size_t i = 1; i < 16; ++i) EXPECT_EQ(set.samples[i] - set.samples[i - 1], 25);
  EXPECT_THAT(set.samples.front(), ::testing::AllOf(::testing::Ge(5), ::testing::Le(25)));
}

TEST(ActiveSet, BecomesAPlan) {
  Plan plan{1, 12, 4, {plan_active(0, 1, 10, 4, {0, 3, 4, 9}, 4)}};
  EXPECT_EQ(plan.sequences[0].ranges.size(), 5u);
  for (std::int64_t t = 0; t < 10; ++t) {
    const bool runs = t == 0 || t == 3 || t == 4 || t == 9;
    for (std::int32_t l = 0; l < 4; ++l) EXPECT_EQ(plan.sequences[0].active(t, l), runs);
  }
  const auto widened = plan_active(0, 1, 10, 4, {0, 3, 4, 9}, 3);
  for (std::int64_t t = 0; t < 10; ++t) {
    const bool runs = t == 0 || t == 3 || t == 4 || t == 9;
    for (std::int32_t l = 0; l < 4; ++l) EXPECT_EQ(widened.active(t, l), runs || l == 3);
  }
  EXPECT_TRUE(plan_active(0, 0, 3, 4, {0, 1, 2}, 4).computes_all(4));
}

// --- bank --------------------------------------------------------------------------------------------

/// One key of 3 numbers a token in one layer, and states of 2.
StateLayout small_layout() {
  StateLayout layout;
  layout.specs = {{{3}, at::TensorOptions()}, {{2}, at::TensorOptions()}, {{2}, at::TensorOptions()}};
  layout.first_key = {{0}};
  layout.hidden = {1, 2};
  return layout;
}

TokenBank::Settings settings_of(std::size_t capacity) {
  TokenBank::Settings settings;
  settings.capacity_bytes = capacity;
  settings.layout = small_layout();
  return settings;
}

Tokens random_tokens(std::mt19937_64& random, std::size_t count) {
  Tokens tokens;
  for (std::size_t t = 0; t < count; ++t) tokens.push_back(static_cast<std::int64_t>(random() % 30000));
  return tokens;
}

/// Keeps the sequence with `value` plus its place in all its states.
bool keep(TokenBank& bank, const std::string& partition, const Tokens& tokens, float value, double now_s = 0) {
  auto pending = bank.reserve(static_cast<std::int64_t>(tokens.size()));
  const bool room = pending != nullptr;
  for (std::size_t i = 0; room && i < 3; ++i) {
    const auto places = at::arange(static_cast<std::int64_t>(tokens.size()), at::kFloat).add(value).unsqueeze(1);
    pending->tensor(i).copy_(places.expand_as(pending->tensor(i)));
  }
  bank.keep(partition, {tokens, 1}, std::move(pending), 1, now_s);
  return room;
}

std::optional<TokenBank::Candidate> find(TokenBank& bank, const std::string& partition, const Tokens& tokens) {
  return bank.find(partition, {tokens, 1}, 0);
}

TEST(TokenBank, FindsWhatAlignsBest) {
  std::mt19937_64 random(1);
  TokenBank bank(settings_of(std::size_t{16} << 20));
  const auto a = random_tokens(random, 50);
  auto b = a;  // shares its last 30 tokens in their places only with a
  std::copy_n(random_tokens(random, 20).begin(), 20, b.begin());
  keep(bank, "x", a, 100);
  keep(bank, "x", random_tokens(random, 50), 200);
  keep(bank, "y", b, 300);
  auto found = find(bank, "x", a);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->alignment.edit_fraction(), 0);
  EXPECT_EQ(found->entry->hidden(1)[7][1].item<float>(), 107);
  EXPECT_EQ(found->entry->hidden(0)[7][1].item<float>(), 107);
  EXPECT_EQ(found->entry->keys(0, 0, 0)[7][2].item<float>(), 107);
  found = find(bank, "x", b);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->alignment.aligned(), 30);
  EXPECT_EQ(find(bank, "y", b)->entry->hidden(1)[0][0].item<float>(), 300);
  EXPECT_FALSE(find(bank, "x", random_tokens(random, 50)));
  EXPECT_FALSE(find(bank, "z", a));
}

TEST(TokenBank, AveragesTokensInTheirPlaces) {
  std::mt19937_64 random(2);
  auto settings = settings_of(std::size_t{16} << 20);
  settings.most_averaged = 3;
  TokenBank bank(settings);
  const auto passage = random_tokens(random, 30);
  const float values[] = {100, 400, 1000, 4000};
  // The mean of all, until it remembers three: then each new one counts for a third.
  const float means[] = {100, 250, 500, 500 + (4000 - 500) / 3.0f};
  const int counts[] = {1, 2, 3, 3};
  for (std::size_t i = 0; i < 4; ++i) {
    auto tokens = passage;
    const auto question = random_tokens(random, 9);
    tokens.insert(tokens.end(), question.begin(), question.end());
    keep(bank, "", tokens, values[i]);
    EXPECT_EQ(bank.counters().entries, 1u);
    const auto found = find(bank, "", tokens);
    ASSERT_TRUE(found);
    for (const std::int64_t t : {0, 13, 29}) {
      EXPECT_NEAR(found->entry->keys(0, 0, 0)[t][0].item<float>(), means[i] + static_cast<float>(t), 0.01);
      EXPECT_NEAR(found->entry->hidden(1)[t][0].item<float>(), means[i] + static_cast<float>(t), 0.01);
      EXPECT_EQ(found->entry->count(t), counts[i]);
    }
    EXPECT_EQ(found->entry->hidden(1)[35][0].item<float>(), values[i] + 35);
    EXPECT_EQ(found->entry->count(35), 1);
    // The same again changes nothing.
    keep(bank, "", tokens, 9999);
    EXPECT_NEAR(find(bank, "", tokens)->entry->hidden(1)[0][0].item<float>(), means[i], 0.01);
  }
  EXPECT_EQ(bank.counters().averaged, 3u);
  EXPECT_EQ(bank.counters().evictions, 0u);
}

// Where no entry leaves, the next sequence still goes on from the one whose mean is over most.
TEST(TokenBank, MeansGoOnThroughTheNewestOfSeveralEntries) {
  std::mt19937_64 random(4);
  TokenBank bank(settings_of(std::size_t{16} << 20));
  const auto form = random_tokens(random, 30);
  const auto with_rest = [&] {
    auto tokens = form;
    const auto rest = random_tokens(random, 30);
    tokens.insert(tokens.end(), rest.begin(), rest.end());
    return tokens;
  };
  for (int i = 1; i <= 3; ++i) keep(bank, "", with_rest(), static_cast<float>(100 * i));
  EXPECT_EQ(bank.counters().entries, 3u);
  const auto found = find(bank, "", with_rest());
  ASSERT_TRUE(found);
  EXPECT_EQ(found->entry->count(0), 3);
  EXPECT_NEAR(found->entry->hidden(1)[0][0].item<float>(), 200, 0.01);
}

TEST(TokenBank, AnEntryStaysOfWhichLittleLivesOn) {
  std::mt19937_64 random(3);
  TokenBank bank(settings_of(std::size_t{16} << 20));
  const auto document = random_tokens(random, 200);
  keep(bank, "", document, 100);
  auto other = random_tokens(random, 60);
  std::copy_n(document.begin(), 30, other.begin());
  keep(bank, "", other, 300);
  EXPECT_EQ(bank.counters().entries, 2u);
  EXPECT_EQ(find(bank, "", document)->entry->hidden(1)[0][0].item<float>(), 100);
  EXPECT_NEAR(find(bank, "", other)->entry->hidden(1)[0][0].item<float>(), 200, 0.01);
  // Elsewhere it is not averaged, and not with other tenants' either.
  Tokens shifted = random_tokens(random, 3);
  shifted.insert(shifted.end(), document.begin(), document.end());
  keep(bank, "", shifted, 500);
  EXPECT_EQ(find(bank, "", shifted)->entry->hidden(1)[10][0].item<float>(), 510);
  keep(bank, "t", document, 700);
  EXPECT_EQ(find(bank, "t", document)->entry->hidden(1)[10][0].item<float>(), 710);

  auto settings = settings_of(std::size_t{16} << 20);
  settings.most_averaged = 1;
  TokenBank plain(settings);
  keep(plain, "", document, 100);
  auto longer = document;
  longer.push_back(1);
  keep(plain, "", longer, 300);
  EXPECT_EQ(plain.counters().entries, 2u);
  EXPECT_EQ(find(plain, "", longer)->entry->hidden(1)[0][0].item<float>(), 300);
}

TEST(TokenBank, HoldsItsCapacityAtEveryStep) {
  for (const std::size_t capacity : {0, 500, 5000, 12000, 40000, 4000000}) {
    SCOPED_TRACE(capacity);
    std::mt19937_64 random(capacity);
    TokenBank bank(settings_of(capacity));
    std::vector<Tokens> kept;
    std::vector<std::shared_ptr<const TokenEntry>> read;  // by running passes
    std::uint64_t hits = 0;
    for (int step = 0; step < 400; ++step) {
      const std::string partition = random() % 3 == 0 ? "b" : "a";
      Tokens tokens = random_tokens(random, 8 + random() % 60);
      if (random() % 3 == 0 && !kept.empty()) {
        tokens = kept[random() % kept.size()];
        tokens[random() % tokens.size()] = -1;
      }
      if (random() % 2 == 0) {
        if (keep(bank, partition, tokens, static_cast<float>(step), step)) kept.push_back(tokens);
      } else if (const auto found = find(bank, partition, tokens)) {
        ++hits;
        if (random() % 4 == 0) read.push_back(found->entry);
      }
      if (read.size() > 3) read.erase(read.begin());
      if (step % 150 == 149) bank.clear();
      const auto counters = bank.counters();
      ASSERT_LE(counters.bytes, capacity);
      ASSERT_LE(counters.peak_bytes, capacity);
    }
    EXPECT_EQ(hits > 0, capacity >= 12000);
    EXPECT_EQ(bank.counters().evictions > 0, capacity >= 5000 && capacity < 4000000);
    read.clear();
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0u);
    EXPECT_EQ(bank.counters().entries, 0u);
  }
}

TEST(TokenBank, ThreadsShareIt) {
  TokenBank bank(settings_of(60000));
  std::mt19937_64 seed(6);
  const auto passage = random_tokens(seed, 30);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int step = 0; step < 150; ++step) {
        auto tokens = passage;
        const auto more = random_tokens(random, 5 + random() % 40);
        tokens.insert(tokens.end(), more.begin(), more.end());
        // All keep the same states, so that every mean is these.
        keep(bank, step % 2 == 0 ? "a" : "b", tokens, 100, step);
        const auto found = find(bank, "a", tokens);
        if (found) {
          const auto states = found->entry->hidden(1).select(1, 0);
          const auto want = at::arange(found->entry->tokens(), at::kFloat).add(100);
          if (!at::allclose(states, want, 1e-4)) ++wrong;
        }
        if (bank.counters().peak_bytes > 60000) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(bank.counters().averaged, 0u);
}

}  // namespace
}  // namespace llmcache
