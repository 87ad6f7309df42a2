// The choice of the next token, without a model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/generate.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace llmcache {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kDraws = 10000;

/// How often each token comes, for draws that lie evenly in [0, 1).
std::vector<double> shares(const std::vector<float>& logits, const Sampling& sampling) {
  std::vector<double> shares(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) {
    shares.at(static_cast<std::size_t>(sample(logits, sampling, (i + 0.5) / kDraws))) += 1.0 / kDraws;
  }
  return shares;
}

std::vector<float> logs(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double probability : probabilities) logits.push_back(static_cast<float>(std::log(probability) + 3));
  return logits;
}

void expect_near(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 2e-4) << "token " << i;
}

TEST(SamplingTest, GreedyTakesTheMostProbable) {
  EXPECT_EQ(sample(std::vector<float>{-3, 2, 5, 4}, {}, 0.99), 2);
  EXPECT_EQ(sample(std::vector<float>{-3}, {}, 0), 0);
}

TEST(SamplingTest, GreedyTakesTheLowestIdOfATie) {
  EXPECT_EQ(sample(std::vector<float>{1, 7, 7, 7}, {}, 0.99), 1);
  EXPECT_EQ(sample(std::vector<float>{-0.0F, 0.0F}, {}, 0), 0);
}

TEST(SamplingTest, AllTokensComeAsOftenAsTheirProbability) {
  expect_near(shares(logs({0.1, 0.5, 0.15, 0.25}), {.temperature = 1}), {0.1, 0.5, 0.15, 0.25});
}

TEST(SamplingTest, TemperatureSharpensOrFlattens) {
  // Probabilities to the power of 1/temperature: 0.8 and 0.2 become 16/17 and 1/17, or 2/3 and 1/3.
  expect_near(shares(logs({0.2, 0.8}), {.temperature = 0.5}), {1.0 / 17, 16.0 / 17});
  expect_near(shares(logs({0.2, 0.8}), {.temperature = 2}), {1.0 / 3, 2.0 / 3});
}

TEST(SamplingTest, TopKKeepsTheMostProbable) {
  expect_near(shares(logs({0.1, 0.5, 0.15, 0.25}), {.temperature = 1, .top_k = 2}), {0, 2.0 / 3, 0, 1.0 / 3});
  expect_near(shares(logs({0.1, 0.5, 0.4}), {.temperature = 1, .top_k = 1}), {0, 1, 0});
  expect_near(shares(logs({0.5, 0.5}), {.temperature = 1, .top_k = 100}), {0.5, 0.5});
}

TEST(SamplingTest, TopKKeepsTheLowestIdsOfATie) {
  expect_near(shares(logs({0.2, 0.2, 0.2, 0.2, 0.2}), {.temperature = 1, .top_k = 3}),
              {1.0 / 3, 1.0 / 3, 1.0 / 3, 0, 0});
}

TEST(SamplingTest, TopPKeepsTheFewestThatReachIt) {
  const auto logits = logs({0.1, 0.5, 0.15, 0.25});
  expect_near(shares(logits, {.temperature = 1, .top_p = 0.6}), {0, 2.0 / 3, 0, 1.0 / 3});
  expect_near(shares(logits, {.temperature = 1, .top_p = 0.49}), {0, 1, 0, 0});
  expect_near(shares(logits, {.temperature = 1, .top_p = 1e-9}), {0, 1, 0, 0});
  expect_near(shares(logits, {.temperature = 1, .top_p = 0.8}), {0, 5.0 / 9, 1.5 / 9, 2.5 / 9});
}

TEST(SamplingTest, TopPCountsWhatTopKLeaves) {
  // Of 0.4, 0.3, 0.3 top_k leaves 0.4 and 0.3: 4/7 and 3/7.
  expect_near(shares(logs({0.4, 0.3, 0.3}), {.temperature = 1, .top_k = 2, .top_p = 0.5}), {1, 0, 0});
  expect_near(shares(logs({0.4, 0.3, 0.3}), {.temperature = 1, .top_k = 2, .top_p = 0.6}), {4.0 / 7, 3.0 / 7, 0});
}

TEST(SamplingTest, MinusInfinityExcludes) {
  EXPECT_EQ(sample(std::vector<float>{-kInfinity, -5, -kInfinity}, {}, 0), 1);
  expect_near(shares({-kInfinity, 1, -kInfinity, 1}, {.temperature = 1}), {0, 0.5, 0, 0.5});
}

TEST(SamplingTest, LogitsOfAnySizeAreFine) {
  expect_near(shares({3e38F, -3e38F, 3e38F}, {.temperature = 1}), {0.5, 0, 0.5});
  EXPECT_EQ(sample(std::vector<float>{1, 2}, {.temperature = 1e-300}, 0.5), 1);
}

TEST(SamplingTest, ABrokenModelIsAnError) {
  for (const Sampling& sampling : {Sampling{}, Sampling{.temperature = 1}}) {
    EXPECT_THROW(sample(std::vector<float>{1, kNan, 9}, sampling, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{1, kInfinity}, sampling, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{-kInfinity, -kInfinity}, sampling, 0), Error);
    EXPECT_THROW(sample(std::vector<float>{}, sampling, 0), Error);
  }
}

TEST(SamplingTest, SettingsOutOfRangeAreRefused) {
  const std::vector<float> logits = {1, 2};
  for (const double bad : {-0.1, static_cast<double>(kNan), static_cast<double>(kInfinity)}) {
    EXPECT_THROW(sample(logits, {.temperature = bad}, 0), Error) << bad;
  }
  for (const double bad : {0.0, -1.0, 1.01, static_cast<double>(kNan)}) {
    EXPECT_THROW(sample(logits, {.temperature = 1, .top_p = bad}, 0), Error) << bad;
  }
  EXPECT_THROW(sample(logits, {.temperature = 1, .top_k = -1}, 0), Error);
  for (const double bad : {-0.1, 1.0, static_cast<double>(kNan)}) {
    EXPECT_THROW(sample(logits, {.temperature = 1}, bad), Error) << bad;
  }
}

TEST(SamplingTest, DrawsAreFixedByTheSeed) {
  std::mt19937_64 generator(5489);  // whose first number the standard library gives as 14514284786278117030
  EXPECT_EQ(next_draw(generator), static_cast<double>(14514284786278117030ULL >> 11) / 9007199254740992.0);
  std::vector<double> draws;
  for (int i = 0; i < 1000; ++i) draws.push_back(next_draw(generator));
  EXPECT_THAT(draws, Each(::testing::AllOf(::testing::Ge(0), ::testing::Lt(1))));
}

}  // namespace
}  // namespace llmcache
