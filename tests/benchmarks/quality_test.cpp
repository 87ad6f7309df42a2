// The benchmark's code that works on tensors: scores of outputs, and the cache of whole outputs.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "failure.h"
#include "outputs.h"
#include "scores.h"
#include "semantic_cache.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;

/// Two requests of two sequences, of 3, 2, 3 and 3 tokens, for a model of five ids.
class ScoreTest : public ::testing::Test {
 protected:
  ScoreTest() {
    file.tokens = {0, 1, 2, 0, 3, 0, 1, 4, 0, 2, 4};
    file.sequence_offsets = {0, 3, 5, 8, 11};
    file.request_offsets = {0, 2, 4};
    file.labels = {0, 1, 1, 0};
    file.scored = {{1, 3}, {1, 2}, {2, 3}, {2, 3}};
    file.pair_score = {1, 4};
    file.group = {0, 0};
    probe.classes = {"a", "b"};
    probe.dims = 2;
    probe.weight = {1, 0, 0, 1};
    probe.bias = {0, 0};
  }
  [[nodiscard]] std::optional<Sample> score(const Scorer& scorer, std::int64_t request, const at::Tensor& output,
                                            std::int64_t cut = 512) const {
    return scorer.score(request, file.request(request, cut), output).first;
  }
  /// Logits [2, 3, 5] whose softmax at every place is `p` for id `likely`, and the rest shared by the others.
  static at::Tensor likely(std::int64_t id, double p) {
    at::Tensor logits = at::full({2, 3, 5}, std::log((1 - p) / 4));
    logits.select(2, id).fill_(std::log(p));
    return logits;
  }

  TokenFile file;
  OutputShape pooled = {.pooled_output = 0, .pooled_dims = 2, .logits_output = -1, .logits_dims = 0};
  OutputShape logits = {.pooled_output = -1, .pooled_dims = 0, .logits_output = 0, .logits_dims = 5};
  LinearProbe probe;
};

TEST_F(ScoreTest, LogLikelihoodReadsTheRowBeforeAToken) {
  at::Tensor rows = at::full({3, 5}, 0.0F);
  rows[0][1] = 2;  // scores token 1
  rows[1][2] = 1;  // scores token 2
  rows[2][0] = 9;  // behind the last token: not read
  file.task = Task::kPerplexity;
  file.scored = {{1, 3}, {2, 2}};
  const Scorer scorer(file, logits, 5, std::nullopt);
  const Rows request = file.request(0, 512);
  const auto scores = scorer.token_scores(0, request, {all_of(at::stack({rows, rows}), request)}, nullptr);
  ASSERT_EQ(scores[0].size(), 2U);
  EXPECT_NEAR(*scores[0][0], 2 - std::log(4 + std::exp(2.0)), 1e-6);
  EXPECT_NEAR(*scores[0][1], 1 - std::log(4 + std::exp(1.0)), 1e-6);
  EXPECT_TRUE(scores[1].empty());
}

TEST_F(ScoreTest, Perplexity) {
  file.task = Task::kPerplexity;
  const Scorer scorer(file, logits, 5, std::nullopt);
  ASSERT_EQ(scorer.metric(), Metric::kPerplexity);
  const auto sample = score(scorer, 0, likely(2, 0.5));  // tokens 1 and 2 of the first row, 3 of the second
  ASSERT_TRUE(sample.has_value());
  EXPECT_EQ(sample->weight, 3);
  EXPECT_NEAR(sample->value, -(std::log(0.5) + 2 * std::log(0.125)), 1e-5);
  const auto cut = score(scorer, 0, likely(2, 0.5), 2);
  ASSERT_TRUE(cut.has_value());
  EXPECT_EQ(cut->weight, 2);
  EXPECT_FALSE(score(scorer, 0, likely(2, 0.5), 1).has_value());
}

TEST_F(ScoreTest, AnswersAreScoredWholeOrNotAtAll) {
  file.task = Task::kAnswer;
  const Scorer scorer(file, logits, 5, std::nullopt);
  ASSERT_EQ(scorer.metric(), Metric::kAnswerNll);
  const auto sample = score(scorer, 1, likely(4, 0.6));
  ASSERT_TRUE(sample.has_value());
  EXPECT_EQ(sample->weight, 2);
  EXPECT_NEAR(sample->value, -2 * std::log(0.6), 1e-5);
  EXPECT_FALSE(score(scorer, 1, likely(4, 0.6), 2).has_value());
}

TEST_F(ScoreTest, ChoiceOfTheLargestSum) {
  file.task = Task::kChoice;
  const Scorer scorer(file, logits, 5, std::nullopt);
  ASSERT_EQ(scorer.metric(), Metric::kChoiceAccuracy);
  // Request 0: row 0 scores ids 1 and 2, row 1 scores id 3. The right one is row 1.
  EXPECT_EQ(score(scorer, 0, likely(3, 0.9))->value, 1);
  // Ids 1 and 2 with 0.9 have together -0.21, id 3 with 0.1 / 3 has -3.4: the wrong one wins.
  at::Tensor wrong = at::full({2, 3, 5}, std::log(0.1 / 3));
  wrong[0][0][1] = std::log(0.9);
  wrong[0][1][2] = std::log(0.9);
  EXPECT_EQ(score(scorer, 0, wrong)->value, 0);
  EXPECT_EQ(score(scorer, 0, wrong)->weight, 1);
  EXPECT_EQ(score(scorer, 0, at::full({2, 3, 5}, NAN))->value, 0) << "NaN is never right";
}

TEST_F(ScoreTest, ChoiceByByteIsNotThatOfTheSum) {
  file.task = Task::kChoice;
  const Scorer scorer(file, logits, 5, std::nullopt);
  at::Tensor values = at::full({2, 3, 5}, std::log(0.125));
  values[1].fill_(std::log(0.2));
  values[0][0][1] = std::log(0.5);
  values[0][1][2] = std::log(0.5);  // row 0: -1.39 in all; row 1, which is right: -1.61
  const auto one = [&] {
    const auto rows = file.request(0, 100);
    const auto all = scorer.token_scores(0, rows, {all_of(c10::IValue(values), rows)}, nullptr);
    return scorer.scores(0, rows, all);
  };
  EXPECT_FALSE(one().second.has_value()) << "lengths are not known";
  EXPECT_FALSE(scorer.second_metric().has_value());
  file.scored_bytes.assign(static_cast<std::size_t>(file.sequences()), 4);
  file.scored_bytes[1] = 8;
  EXPECT_EQ(scorer.second_metric(), Metric::kChoiceAccuracyPerByte);
  EXPECT_EQ(one().first->value, 0);
  EXPECT_EQ(one().second->value, 1) << "-0.35 a byte against -0.2";
  file.scored_bytes[0] = 16;
  EXPECT_EQ(one().second->value, 0);
}

TEST(AnswerTest, WordsAreComparedAsSquadDoes) {
  const auto of = [](const char* answer, const char* gold) {
    const AnswerScore score = score_answer(answer, gold);
    return std::pair(score.exact_match, score.f1);
  };
  EXPECT_EQ(of("the tower", "tower\n"), std::pair(1.0, 1.0)) << "articles do not count";
  EXPECT_EQ(of(" tall  tower", "tower of paris\ntall tower\n"), std::pair(1.0, 1.0)) << "any of the gold answers";
  EXPECT_EQ(of("tower tall", "tall tower\n"), std::pair(0.0, 1.0)) << "order counts for the exact match alone";
  EXPECT_EQ(of("big tall tower", "tall tower\n"), std::pair(0.0, 2.0 * 2 / 5));
  EXPECT_EQ(of("in in in", "in paris\n"), std::pair(0.0, 2.0 * 1 / 5)) << "a word counts as often as both have it";
  EXPECT_EQ(of("berlin", "paris\n"), std::pair(0.0, 0.0));
  EXPECT_EQ(of("", ""), std::pair(1.0, 1.0)) << "rightly no answer";
  EXPECT_EQ(of("paris", ""), std::pair(0.0, 0.0));
  EXPECT_EQ(of("", "paris\n"), std::pair(0.0, 0.0));
  EXPECT_EQ(of("the", ""), std::pair(1.0, 1.0));
}

TEST(AnswerTest, TheSpanOfTheLargestSum) {
  const auto span = [](std::vector<float> start, std::vector<float> end, TokenRange passage) {
    const TokenRange found = answer_span(start, end, passage);
    return std::pair(found.begin, found.end);
  };
  EXPECT_EQ(span({0, 9, 1, 3, 0}, {0, 0, 2, 1, 9}, {2, 4}), std::pair(3L, 4L)) << "outside of the passage: no answer";
  EXPECT_EQ(span({0, 0, 5, 1, 0}, {0, 0, 0, 6, 0}, {2, 4}), std::pair(2L, 4L));
  EXPECT_EQ(span({0, 0, 1, 5, 0}, {0, 0, 6, 1, 0}, {2, 4}), std::pair(2L, 3L)) << "the end is not before the start";
  EXPECT_EQ(span({7, 0, 5, 1, 0}, {4, 0, 0, 6, 0}, {2, 4}), std::pair(0L, 0L)) << "no answer is as likely";
  EXPECT_EQ(span({0, 0, 5}, {0, 0, 0}, {2, 4}), std::pair(2L, 3L)) << "the end was cut off";
  EXPECT_EQ(span({0, 0}, {0, 0}, {2, 4}), std::pair(0L, 0L)) << "all of it was";
  EXPECT_EQ(span({0, NAN, NAN}, {0, NAN, NAN}, {1, 3}), std::pair(0L, 0L));
  std::vector<float> start(64, 0), end(64, 0);
  start[1] = 10;
  end[1 + kMostAnswerTokens] = 10;
  end[kMostAnswerTokens] = 5;
  EXPECT_EQ(span(start, end, {1, 64}), std::pair(1L, 1 + kMostAnswerTokens)) << "longer ones are no answers";
}

TEST_F(ScoreTest, AnswersFoundInAPassage) {
  file.task = Task::kAnswer;
  file.tokens = {0, 1, 2, 3, 4, 0, 1, 2, 3};
  file.sequence_offsets = {0, 5, 9};
  file.request_offsets = {0, 1, 2};
  file.scored.clear();
  file.passage = {{2, 5}, {2, 4}};
  file.token_text = "a tall towerparis";
  file.token_text_offsets = {0, 0, 0, 1, 6, 12, 12, 12, 17, 17};
  file.gold = "tower\ntall tower\n";
  file.gold_offsets = {0, 17, 17};
  const OutputShape spans = {.answer_span = true};
  const Scorer scorer(file, spans, 5, std::nullopt);
  ASSERT_EQ(scorer.metric(), Metric::kF1);
  ASSERT_EQ(scorer.second_metric(), Metric::kExactMatch);
  EXPECT_FALSE(scorer.reads_logits());
  const auto of = [&](std::int64_t request, std::vector<float> start, std::vector<float> end) {
    const auto rows = file.request(request, 512);
    const auto tensor = [](const std::vector<float>& values) { return at::tensor(values).unsqueeze(0); };
    const Scores scores = scorer.score(request, rows, c10::ivalue::Tuple::create(tensor(start), tensor(end)));
    return std::pair(scores.first.value().value, scores.second.value().value);
  };
  EXPECT_EQ(of(0, {0, 0, 3, 0, 0}, {0, 0, 0, 0, 3}), std::pair(1.0, 1.0)) << "a tall tower";
  EXPECT_EQ(of(0, {0, 0, 3, 0, 0}, {0, 0, 0, 3, 0}), std::pair(2.0 / 3, 0.0)) << "a tall";
  EXPECT_EQ(of(1, {5, 0, 0, 0}, {5, 0, 0, 0}), std::pair(1.0, 1.0)) << "it has no answer";
  EXPECT_EQ(of(1, {0, 0, 5, 0}, {0, 0, 5, 0}), std::pair(0.0, 0.0));
  file.passage.clear();
  EXPECT_FALSE(Scorer(file, spans, 5, std::nullopt).metric().has_value());
}

TEST_F(ScoreTest, AccuracyOfTheProbe) {
  file.task = Task::kClassification;
  const Scorer scorer(file, pooled, 5, probe);
  ASSERT_EQ(scorer.metric(), Metric::kAccuracy);
  const auto right = score(scorer, 0, at::tensor({1.0, 0.0, 0.0, 1.0}).view({2, 2}));
  EXPECT_EQ(right->value, 2);
  EXPECT_EQ(right->weight, 2);
  EXPECT_EQ(score(scorer, 1, at::tensor({1.0, 0.0, 1.0, 0.0}).view({2, 2}))->value, 1);
  EXPECT_FALSE(Scorer(file, pooled, 5, std::nullopt).metric().has_value());
  EXPECT_FALSE(Scorer(file, logits, 5, probe).metric().has_value());
  pooled.pooled_dims = 3;
  EXPECT_THROW(Scorer(file, pooled, 5, probe), Failure);
}

TEST_F(ScoreTest, SimilarityIsTheCosineOfAPair) {
  file.task = Task::kSimilarity;
  const Scorer scorer(file, pooled, 5, std::nullopt);
  ASSERT_EQ(scorer.metric(), Metric::kSpearman);
  const auto sample = score(scorer, 1, at::tensor({3.0F, 0.0F, 1.0F, 1.0F}).view({2, 2}));
  EXPECT_NEAR(sample->value, std::sqrt(0.5), 1e-6);
  EXPECT_EQ(sample->weight, 4);
}

TEST_F(ScoreTest, HiddenStatesAreNoLogits) {
  for (const Task task : {Task::kPerplexity, Task::kChoice, Task::kAnswer}) {
    file.task = task;
    EXPECT_TRUE(Scorer(file, logits, 5, std::nullopt).metric().has_value());
    EXPECT_FALSE(Scorer(file, logits, 6, std::nullopt).metric().has_value());
  }
}

/// A model of two outputs: [batch, tokens] with ids, and [batch] with the sum of the ids. The states
/// that are fingerprinted are made from the first id: equal first ids are similar.
class SemanticCacheTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kHiddenSize = 8;

  SemanticCacheOptions options() const {
    SemanticCacheOptions o;
    o.fingerprint.kind = FingerprintKind::kRaw;
    o.fingerprint.centring = Centring::kOff;
    o.tau = 0.95;
    o.capacity_bytes = 1 << 20;
    o.hidden_size = kHiddenSize;
    o.token_output = {true, false};
    return o;
  }

  std::vector<at::Tensor> forward(SemanticCache& cache, const std::vector<std::vector<std::int32_t>>& ids) {
    const Rows rows(ids.begin(), ids.end());
    ran_.clear();
    const std::int64_t label = label_;
    label_ += 100;
    return tensors_of(cache.forward(
        rows, label, [&] { return states(rows); },
        [&](const std::vector<std::size_t>& some) { return run(rows, some); }));
  }

  static std::vector<std::vector<float>> states(const Rows& rows) {
    std::vector<std::vector<float>> all;
    for (const auto& row : rows) {
      std::vector<float> state(kHiddenSize, 0.01F);
      if (row[0] >= 0) state[static_cast<std::size_t>(row[0])] = 1;
      if (row[0] < 0) state[0] = NAN;
      all.push_back(state);
    }
    return all;
  }

  c10::IValue run(const Rows& rows, const std::vector<std::size_t>& some) {
    std::size_t width = 0;
    for (const std::size_t row : some) width = std::max(width, rows[row].size());
    const auto batch = static_cast<std::int64_t>(some.size());
    at::Tensor tokens = at::full({batch, static_cast<std::int64_t>(width)}, -7.0F);  // rubbish at padding
    at::Tensor sums = at::zeros({batch});
    for (std::int64_t i = 0; i < batch; ++i) {
      const auto& row = rows[some[static_cast<std::size_t>(i)]];
      ran_.push_back(some[static_cast<std::size_t>(i)]);
      for (std::size_t t = 0; t < row.size(); ++t) {
        tokens[i][static_cast<std::int64_t>(t)] = row[t];
        sums[i] += row[t];
      }
    }
    return c10::ivalue::Tuple::create({tokens, sums});
  }

  static std::vector<float> values(const at::Tensor& tensor) {
    const at::Tensor flat = tensor.contiguous().view({-1});
    return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
  }

  std::vector<std::size_t> ran_;
  std::int64_t label_ = 0;
};

TEST_F(SemanticCacheTest, ReturnsTheOutputOfASimilarRequest) {
  SemanticCache cache(options());
  auto out = forward(cache, {{1, 5, 6}, {2, 3}});
  EXPECT_THAT(ran_, ElementsAre(0, 1));
  EXPECT_THAT(cache.served_from(), ElementsAre(std::nullopt, std::nullopt));
  EXPECT_THAT(values(out[1]), ElementsAre(12, 5));
  EXPECT_EQ(cache.counters().entries, 2U);

  out = forward(cache, {{1, 9}, {4, 4, 4, 4}, {2, 0, 0}});  // the second is new
  EXPECT_THAT(ran_, ElementsAre(1));
  EXPECT_THAT(cache.served_from(), ElementsAre(0, std::nullopt, 1));
  EXPECT_THAT(values(out[1]), ElementsAre(12, 16, 5));
  EXPECT_THAT(values(out[0][0]), ElementsAre(1, 5, 0, 0)) << "token by token, zero at padding";
  EXPECT_THAT(values(out[0][1]), ElementsAre(4, 4, 4, 4));
  EXPECT_THAT(values(out[0][2]), ElementsAre(2, 3, 3, 0)) << "the nearest kept token where there is none";
  EXPECT_EQ(cache.counters().entries, 3U);
}

TEST_F(SemanticCacheTest, CausalOutputsMeetAtTheLastToken) {
  auto causal = options();
  causal.causal = true;
  SemanticCache cache(causal);
  forward(cache, {{1, 5, 6}, {2, 3}});
  const auto out = forward(cache, {{1, 9}, {2, 0, 0}});
  EXPECT_THAT(values(out[0][0]), ElementsAre(5, 6, 0));
  EXPECT_THAT(values(out[0][1]), ElementsAre(2, 2, 3));
}

TEST_F(SemanticCacheTest, WhatIsReturnedIsNotWhatIsKept) {
  SemanticCache cache(options());
  forward(cache, {{1, 5}})[0].fill_(100);
  auto out = forward(cache, {{1, 5}});
  EXPECT_THAT(values(out[0]), ElementsAre(1, 5));
  out[0].fill_(100);
  EXPECT_THAT(values(forward(cache, {{1, 5}})[0]), ElementsAre(1, 5));
}

TEST_F(SemanticCacheTest, DropsTheOldestUsedForRoom) {
  SemanticCache probe(options());
  forward(probe, {{1, 1}, {2, 2}});
  auto small = options();
  small.capacity_bytes = probe.counters().peak_bytes;  // room for two
  SemanticCache cache(small);
  forward(cache, {{1, 1}});
  forward(cache, {{2, 2}});
  forward(cache, {{1, 1}});  // used
  forward(cache, {{3, 3}});  // drops 2
  EXPECT_EQ(cache.counters().entries, 2U);
  EXPECT_LE(cache.counters().bytes, small.capacity_bytes);
  forward(cache, {{1, 1}});
  EXPECT_TRUE(ran_.empty());
  forward(cache, {{2, 2}});
  EXPECT_THAT(ran_, ElementsAre(0));

  auto none = options();
  none.capacity_bytes = 0;
  SemanticCache empty(none);
  forward(empty, {{1, 1}});
  forward(empty, {{1, 1}});
  EXPECT_THAT(ran_, ElementsAre(0));
  EXPECT_EQ(empty.counters().bytes, 0U);
}

TEST_F(SemanticCacheTest, WithoutFingerprintNothingIsKept) {
  SemanticCache cache(options());
  forward(cache, {{-1, 5}});  // its state has NaN
  EXPECT_EQ(cache.counters().entries, 0U);
  forward(cache, {{-1, 5}});
  EXPECT_THAT(ran_, ElementsAre(0));
}

TEST_F(SemanticCacheTest, FillKeepsWithoutLookingUp) {
  SemanticCache cache(options());
  const std::vector<std::vector<std::int32_t>> ids = {{1, 2}, {1, 3}};
  const Rows rows(ids.begin(), ids.end());
  for (int i = 0; i < 2; ++i) {
    cache.fill(
        rows, 40, [&] { return states(rows); }, [&](const std::vector<std::size_t>& some) { return run(rows, some); });
  }
  EXPECT_EQ(cache.counters().entries, 4U);
  forward(cache, {{1, 9}});
  EXPECT_THAT(cache.served_from(), ElementsAre(40));
  cache.clear();
  EXPECT_EQ(cache.counters().entries, 0U);
  EXPECT_EQ(cache.counters().bytes, 0U);
}

TEST_F(SemanticCacheTest, EntriesOutliveAMovedCentre) {
  auto centred = options();
  centred.fingerprint.centring = Centring::kRunning;
  SemanticCache cache(centred);
  // The centre moves at 16 and 32 states; before and after, the same text finds its own entry.
  for (std::int32_t i = 0; i < 40; ++i) {
    forward(cache, {{i % 8, i}});
    EXPECT_EQ(ran_.empty(), i >= 8) << i;
  }
  EXPECT_EQ(cache.counters().entries, 8U);
}

TEST_F(SemanticCacheTest, JaccardAsksForNoStates) {
  auto shingles = options();
  shingles.fingerprint.kind = FingerprintKind::kJaccard;
  shingles.tau = 0.5;
  SemanticCache cache(shingles);
  const std::vector<std::vector<std::int32_t>> ids = {{1, 2, 3, 4, 5}};
  const Rows rows(ids.begin(), ids.end());
  for (int i = 0; i < 2; ++i) {
    cache.forward(
        rows, 7,
        []() -> std::vector<std::vector<float>> {
          ADD_FAILURE() << "states were asked for";
          return {};
        },
        [&](const std::vector<std::size_t>& some) { return run(rows, some); });
  }
  EXPECT_THAT(cache.served_from(), ElementsAre(7));
}

TEST_F(SemanticCacheTest, RefusesOutputsWithoutABatch) {
  SemanticCache cache(options());
  const std::vector<std::vector<std::int32_t>> ids = {{1, 2}, {2, 3}};
  const Rows rows(ids.begin(), ids.end());
  const auto states_of_rows = [&] { return states(rows); };
  EXPECT_THROW(cache.forward(rows, 0, states_of_rows,
                             [](const std::vector<std::size_t>&) -> c10::IValue {
                               return c10::ivalue::Tuple::create({at::zeros({2, 2}), at::zeros({1})});
                             }),
               Failure);
  EXPECT_THROW(cache.forward(rows, 0, states_of_rows,
                             [](const std::vector<std::size_t>&) -> c10::IValue {
                               return at::zeros({2, 2});
                             }),
               Failure);
  EXPECT_EQ(cache.counters().entries, 0U);
}

}  // namespace
}  // namespace llmcache::bench
