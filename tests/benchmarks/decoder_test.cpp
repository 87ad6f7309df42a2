// The benchmark on decoders: what kvcache and llmcache reuse, which tokens are scored, and text generation. On tiny
// models with random weights, which count as real ones here so that their outputs are scored.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench_support.h"
#include "experiment.h"
#include "run.h"
#include "scores.h"
#include "systems.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::Gt;
using ::testing::SizeIs;
using ::testing::StartsWith;
using Ids = std::vector<std::int32_t>;

/// `count` ids that depend on the seed only.
Ids text(std::uint32_t seed, std::size_t count) {
  Ids ids;
  std::uint32_t state = 2654435761U * (seed + 1);
  for (std::size_t i = 0; i < count; ++i) {
    state = state * 1664525U + 1013904223U;
    ids.push_back(static_cast<std::int32_t>(1 + (state >> 16) % 299));
  }
  return ids;
}

Ids operator+(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class DecoderBenchTest : public ::testing::Test {
 protected:
  DecoderBenchTest() {
    at::set_num_threads(1);
    tokens_.workload = "w";
    tokens_.tokenizer = "tiny";
    tokens_.sequence_offsets = {0};
    tokens_.request_offsets = {0};
    settings_.modes = {"nocache", "kvcache", "llmcache"};
    settings_.fidelities = {"lossless"};
    settings_.capacities_mib = {64};
  }

  void load(const std::string& name) {
    const char* folder = std::getenv("LLMCACHE_MODELS_DIR");
    ASSERT_NE(folder, nullptr) << "set LLMCACHE_MODELS_DIR to the exported models: tools/run.sh test does";
    file_ = read_model_file(std::filesystem::path(folder) / (name + ".pt"));
    file_.weights = "hub:test";
    model_ = std::make_unique<LoadedModel>(file_);
    const RunConfig config = {.mode = "llmcache", .fidelity = "lossless", .capacity_mib = 64};
    model_->wrap(cache_options(config, settings_, {}, 0), cache_name(config, settings_));
  }

  /// A request of the file; `scored`: one range a row.
  void add(const std::vector<Ids>& rows, const std::vector<TokenRange>& scored = {}) {
    for (const Ids& row : rows) {
      tokens_.tokens.insert(tokens_.tokens.end(), row.begin(), row.end());
      tokens_.sequence_offsets.push_back(static_cast<std::int64_t>(tokens_.tokens.size()));
    }
    tokens_.request_offsets.push_back(tokens_.sequences());
    tokens_.scored.insert(tokens_.scored.end(), scored.begin(), scored.end());
  }

  /// Passages of 40 tokens, each under questions of 6 with answers of 3; the last one has no answer.
  void add_questions(std::uint32_t passages, std::uint32_t questions) {
    tokens_.task = Task::kAnswer;
    for (std::uint32_t p = 0; p < passages; ++p) {
      for (std::uint32_t q = 0; q < questions; ++q) {
        const Ids prompt = text(p, 40) + text(100 + 10 * p + q, 6);
        const bool answered = p + 1 < passages || q + 1 < questions;
        if (answered) add({prompt + text(200 + 10 * p + q, 3)}, {{46, 49}});
        if (!answered) add({prompt}, {{46, 46}});
        tokens_.group.push_back(answered ? static_cast<std::int64_t>(10 * p + q) : -1);
      }
    }
  }

  std::vector<Record> run(double seconds = 1e9) {
    Progress progress(1);
    return run_experiment({*model_, file_, tokens_, settings_, seconds, progress});
  }

  /// By mode and how weights are held.
  static std::map<std::string, Record> by_name(const std::vector<Record>& records) {
    std::map<std::string, Record> named;
    for (const Record& r : records) {
      named[r.mode + (r.weights_held == "as-loaded" ? "" : " " + r.weights_held)] = r;
    }
    EXPECT_EQ(named.size(), records.size());
    return named;
  }

  static void expect_as_nocache(const Record& r, double tolerance = 1e-4) {
    ASSERT_TRUE(r.greedy.has_value()) << r.mode;
    EXPECT_GT(r.greedy->compared, 0) << r.mode;
    EXPECT_EQ(r.greedy->different, r.greedy->tied) << r.mode;
    EXPECT_LT(r.divergence.max, tolerance) << r.mode;
    if (!r.task) return;
    EXPECT_NEAR(r.task->value, r.task->baseline, tolerance * std::abs(r.task->baseline)) << r.mode;
  }

  /// What the plain model says behind `prompt`.
  std::vector<std::int64_t> greedy(Ids prompt, int count) {
    const at::NoGradGuard no_grad;
    std::vector<std::int64_t> said;
    for (int i = 0; i < count; ++i) {
      const Rows rows = {prompt};
      said.push_back(best_tokens(tensor_of(model_->plain(model_->inputs(rows)), 0)[0]).back());
      prompt.push_back(static_cast<std::int32_t>(said.back()));
    }
    return said;
  }

  ModelFile file_;
  std::unique_ptr<LoadedModel> model_;
  TokenFile tokens_;
  Settings settings_;
};

TEST_F(DecoderBenchTest, PassagesAreReusedAcrossRequestsAndNotByKvcache) {
  load("tiny-llama-sdpa");
  add_questions(2, 4);
  const auto records = by_name(run());
  ASSERT_THAT(records, SizeIs(3));
  const Record& kvcache = records.at("kvcache");
  const Record& cached = records.at("llmcache");
  EXPECT_EQ(records.at("nocache").output, "all");
  EXPECT_EQ(kvcache.output, "last+new");
  EXPECT_EQ(cached.output, "last+new");
  // Of each passage's four prompts of 46 tokens, three know the passage. Tokens that begin questions alike may add to
  // it.
  EXPECT_EQ(kvcache.tokens_reused_fraction, 0);
  EXPECT_NEAR(cached.tokens_reused_fraction, 3 * 40 / (4 * 46.0), 0.02);
  // The answers are computed behind the prompts, not with them again.
  EXPECT_DOUBLE_EQ(kvcache.tokens_computed_fraction, 1);
  EXPECT_LT(cached.tokens_computed_fraction, 0.45);
  EXPECT_EQ(kvcache.hit_rate, 0);
  EXPECT_FALSE(kvcache.capacity_bytes.has_value());
  EXPECT_GT(kvcache.cache_bytes, 0) << "of the last request";
  EXPECT_LT(kvcache.cache_bytes, cached.cache_bytes);
  for (const Record* r : {&kvcache, &cached}) {
    expect_as_nocache(*r);
    // 8 prompts, 7 answers of 3 tokens.
    EXPECT_EQ(r->greedy->compared, 8 + 7 * 3);
    EXPECT_EQ(r->task->metric, "answer_nll");
    ASSERT_TRUE(r->prefill_ms.has_value());
    EXPECT_LT(r->prefill_ms->mean, r->latency_ms.mean) << "the answer comes on top";
    EXPECT_GT(r->prefill_speedup_vs_nocache, 0);
    EXPECT_FALSE(r->decode_ms.has_value());
    EXPECT_FALSE(r->later_turns.has_value());
  }
  EXPECT_DOUBLE_EQ(kvcache.speedup_vs_kvcache, 1);
  EXPECT_DOUBLE_EQ(kvcache.prefill_speedup_vs_kvcache, 1);
  EXPECT_GT(cached.prefill_speedup_vs_kvcache, 0);
}

TEST_F(DecoderBenchTest, ChoicesShareTheirQuestionInsideABatch) {
  load("tiny-gpt2-sdpa");
  tokens_.task = Task::kChoice;
  for (std::uint32_t r = 0; r < 5; ++r) {
    std::vector<Ids> rows;
    std::vector<TokenRange> scored;
    for (std::uint32_t c = 0; c < 4; ++c) {
      rows.push_back(text(1000 + r, 12) + text(2000 + 10 * r + c, 2 + 2 * c));
      scored.push_back({12, static_cast<std::int64_t>(rows.back().size())});
      tokens_.labels.push_back(c == r % 4 ? 1 : 0);
    }
    add(rows, scored);
  }
  const auto records = by_name(run());
  const Record& kvcache = records.at("kvcache");
  const Record& cached = records.at("llmcache");
  EXPECT_EQ(cached.output, "new");
  EXPECT_EQ(kvcache.tokens_shared_fraction, 0);
  EXPECT_DOUBLE_EQ(kvcache.tokens_computed_fraction, 1) << "all rows whole, without their padding";
  EXPECT_GE(cached.tokens_shared_fraction, 3 * 12 / (4 * 17.0));
  for (const Record* r : {&kvcache, &cached}) {
    expect_as_nocache(*r);
    EXPECT_EQ(r->greedy->compared, 5 * (4 * 12 + 2 + 4 + 6 + 8)) << "kNewTokens has them all";
    ASSERT_TRUE(r->task.has_value());
    EXPECT_EQ(r->task->value, r->task->baseline);
  }
}

TEST_F(DecoderBenchTest, NoTokenOfAGrowingDocumentIsLeftOut) {
  load("tiny-llama-sdpa");
  tokens_.task = Task::kPerplexity;
  for (std::uint32_t document = 0; document < 2; ++document) {
    for (std::int64_t paragraphs = 1; paragraphs <= 3; ++paragraphs) {
      const Ids all = text(document, static_cast<std::size_t>(20 * paragraphs));
      add({all}, {{std::max<std::int64_t>(1, 20 * (paragraphs - 1)), 20 * paragraphs}});
    }
  }
  settings_.modes = {"nocache"};
  const double whole = run().front().task->value;
  settings_.modes = {"nocache", "kvcache", "llmcache"};
  const auto records = by_name(run());
  for (const auto& [name, r] : records) EXPECT_NEAR(r.task->value, whole, 1e-4 * whole) << name;
  const Record& cached = records.at("llmcache");
  EXPECT_EQ(cached.output, "new");
  EXPECT_DOUBLE_EQ(cached.tokens_reused_fraction, 2 * (20 + 40) / (2 * (20 + 40 + 60.0)));
  expect_as_nocache(cached);
  EXPECT_EQ(cached.greedy->compared, 2 * 60) << "each token once";
  EXPECT_EQ(records.at("kvcache").greedy->compared, 2 * 120);
}

TEST_F(DecoderBenchTest, WhatDidNotComeBackIsScoredInNoMode) {
  load("tiny-llama-sdpa");
  tokens_.task = Task::kPerplexity;
  add({text(1, 30)}, {{1, 30}});
  settings_.modes = {"nocache"};
  const double once = run().front().task->value;
  add({text(2, 30)}, {{1, 30}});
  add({text(1, 30)}, {{1, 30}});                // known: no token is new
  add({text(1, 20) + text(3, 10)}, {{5, 30}});  // known up to its token 20, whose logits did not come back
  const double all = run().front().task->value;
  settings_.modes = {"nocache", "kvcache", "llmcache"};
  const auto records = by_name(run());
  EXPECT_EQ(records.at("llmcache").hit_rate, 0.25);
  for (const auto& [name, r] : records) {
    EXPECT_NEAR(r.task->value, records.at("nocache").task->value, 1e-4 * r.task->value) << name;
    EXPECT_EQ(r.requests, 4) << name;
  }
  EXPECT_GT(std::abs(records.at("nocache").task->value - all), 1e-3) << "some tokens are out";
  EXPECT_GT(std::abs(records.at("nocache").task->value - once), 1e-3);
}

TEST_F(DecoderBenchTest, OutputsThatAreAskedFor) {
  load("tiny-llama-sdpa");
  add_questions(1, 3);
  for (const std::string output : {"all", "last", "new"}) {
    settings_.output = output;
    const auto records = by_name(run());
    EXPECT_EQ(records.at("nocache").output, "all");
    const Record& cached = records.at("llmcache");
    EXPECT_EQ(cached.output, output);
    EXPECT_EQ(cached.prefill_ms->mean, cached.latency_ms.mean) << "one call";
    expect_as_nocache(cached);
    EXPECT_EQ(cached.task.has_value(), output != "last") << output;
    const std::int64_t tokens = output == "all" ? 49 + 49 + 46 : output == "last" ? 3 : 49 + 9 + 6;
    EXPECT_LE(cached.greedy->compared, tokens) << output;
    EXPECT_GE(cached.greedy->compared, output == "new" ? tokens - 4 : tokens) << output;  // questions may begin alike
  }
}

TEST_F(DecoderBenchTest, PackedWeightsHaveABaselineOfTheirOwn) {
  load("tiny-llama-sdpa");
  add_questions(1, 3);
  settings_.weights = {"as-loaded", "packed-fp16"};
  const auto records = by_name(run());
  ASSERT_THAT(records, SizeIs(5));
  const Record& packed = records.at("llmcache packed-fp16");
  EXPECT_EQ(records.at("nocache").weights_held, "as-loaded");
  EXPECT_GT(packed.divergence.mean, 10 * records.at("llmcache").divergence.mean);
  EXPECT_LT(packed.divergence.mean, 0.05);
  EXPECT_NE(packed.task->change, 0) << "the cost in accuracy";
  EXPECT_DOUBLE_EQ(records.at("kvcache packed-fp16").speedup_vs_kvcache, 1);
  EXPECT_DOUBLE_EQ(records.at("kvcache").speedup_vs_kvcache, 1);
  EXPECT_GT(packed.speedup_vs_kvcache, 0);
}

TEST_F(DecoderBenchTest, SmallCachesLeaveKvcacheItsRoom) {
  load("tiny-llama-sdpa");
  add_questions(2, 3);
  settings_.capacities_mib = {0, 64};
  const auto all = run();
  ASSERT_THAT(all, SizeIs(4));
  EXPECT_DOUBLE_EQ(all[1].tokens_computed_fraction, 1);
  // Without room nothing is reused, not even inside a request: its prompts of 46 tokens are computed twice.
  EXPECT_EQ(all[2].tokens_reused_fraction, 0);
  EXPECT_GT(all[2].tokens_computed_fraction, 1.5);
  expect_as_nocache(all[2]);
  EXPECT_GT(all[3].tokens_reused_fraction, 0.5);
}

TEST_F(DecoderBenchTest, WhatWrappingFoundIsKeptBesideTheModelIfAskedFor) {
  load("tiny-llama-sdpa");
  const Folder folder;
  std::filesystem::create_symlink(file_.path, folder / "m.pt");
  const ModelFile file = read_model_file(folder / "m.pt");
  const auto wrap = [&](bool saved_profiles, Weights weights) {
    LoadedModel model(file);
    model.prepare_wrapping({}, saved_profiles);
    return model.wrap({.weights = weights}).saved_profile;
  };
  EXPECT_EQ(wrap(false, Weights::kAsLoaded), "");
  EXPECT_FALSE(std::filesystem::exists(folder / "m.pt.as-loaded.profile"));
  EXPECT_THAT(wrap(true, Weights::kAsLoaded), StartsWith("was written"));
  EXPECT_EQ(wrap(true, Weights::kAsLoaded), "was read");
  EXPECT_THAT(wrap(true, Weights::kPackedFp32), StartsWith("was written")) << "a file for each format";
  EXPECT_EQ(wrap(true, Weights::kPackedFp32), "was read");
}

TEST_F(DecoderBenchTest, EncodersHaveNoKvcache) {
  load("tiny-bert-sdpa");
  add({text(1, 10)});
  add({text(2, 10)});
  const auto records = by_name(run());
  EXPECT_THAT(records, SizeIs(2));
  EXPECT_EQ(records.count("kvcache"), 0U);
  EXPECT_EQ(records.at("llmcache").output, "all");
  EXPECT_FALSE(records.at("llmcache").prefill_ms.has_value());
  EXPECT_FALSE(records.at("llmcache").greedy.has_value());
  settings_.given = {"mode"};
  settings_.modes = {"nocache", "kvcache"};
  expect_failure([&] { run(); }, "mode kvcache is for causal models");
  expect_failure([&] { run(); }, "tiny-bert-sdpa is not causal");
}

TEST_F(DecoderBenchTest, EncodersGenerateNothing) {
  load("tiny-bert-sdpa");
  tokens_.task = Task::kGeneration;
  tokens_.new_tokens = 4;
  add({text(1, 10)});
  expect_failure([&] { run(); }, "needs a causal model that returns logits, and tiny-bert-sdpa returns none");
}

class GenerationTest : public DecoderBenchTest {
 protected:
  GenerationTest() {
    tokens_.task = Task::kGeneration;
    tokens_.new_tokens = 8;
  }
};

TEST_F(GenerationTest, AllSayWhatThePlainModelSays) {
  for (const std::string name : {"tiny-llama-sdpa", "tiny-gpt2-eager"}) {
    load(name);
    if (tokens_.requests() == 0) {
      for (std::uint32_t i = 0; i < 3; ++i) add({text(i, 20 + i)});
    }
    const auto records = by_name(run());
    ASSERT_THAT(records, SizeIs(3));
    for (const auto& [mode, r] : records) {
      EXPECT_EQ(r.requests, 3);
      EXPECT_EQ(r.sequences, 3);
      EXPECT_EQ(r.tokens, 20 + 21 + 22 + 3 * 7) << mode << ": what was said last goes through no layer";
      ASSERT_TRUE(r.prefill_ms && r.decode_ms) << mode;
      EXPECT_GT(r.tokens_per_second, 0);
      EXPECT_FALSE(r.later_turns.has_value());
      if (mode == "nocache") continue;
      expect_as_nocache(r);
      EXPECT_EQ(r.greedy->compared, 3 * 8);
      EXPECT_EQ(r.output, "last");
      EXPECT_EQ(r.tokens_reused_fraction, 0);
      EXPECT_DOUBLE_EQ(r.tokens_computed_fraction, 1) << "keys and values inside a request are kept";
    }
    EXPECT_DOUBLE_EQ(records.at("nocache").tokens_computed_fraction, (8 * 63 + 3 * 28) / (63 + 3 * 7.0));
    EXPECT_FALSE(records.at("nocache").greedy.has_value());
  }
}

TEST_F(GenerationTest, ConversationsAreSentAgain) {
  load("tiny-llama-sdpa");
  const Ids greeting = text(9, 10);  // the same in all
  for (std::uint32_t i = 0; i < 3; ++i) add({greeting + text(i, 10), text(50 + i, 6)});
  add({greeting + text(7, 10)});  // of one turn
  const auto records = by_name(run());
  for (const auto& [mode, r] : records) {
    EXPECT_EQ(r.requests, 4);
    EXPECT_EQ(r.sequences, 7);
    ASSERT_TRUE(r.later_turns.has_value());
    EXPECT_EQ(r.later_turns->turns, 3);
    EXPECT_GT(r.later_turns->speedup_vs_nocache, 0);
    if (mode != "nocache") expect_as_nocache(r);
  }
  // A second prompt: 20 tokens, 8 that were said, 6 new ones. The last that was said has gone through no layer.
  EXPECT_EQ(records.at("kvcache").later_turns->tokens_reused_fraction, 0);
  EXPECT_EQ(records.at("kvcache").tokens_reused_fraction, 0);
  EXPECT_DOUBLE_EQ(records.at("llmcache").later_turns->tokens_reused_fraction, 27 / 34.0);
  EXPECT_DOUBLE_EQ(records.at("llmcache").tokens_reused_fraction, (3 * 10 + 3 * 27) / (4 * 20 + 3 * 34.0));
  EXPECT_GT(records.at("llmcache").later_turns->speedup_vs_kvcache, 0);
}

TEST_F(GenerationTest, StopsBehindTheStopToken) {
  load("tiny-llama-sdpa");
  const Ids prompt = text(1, 20);
  const auto said = greedy(prompt, 8);
  tokens_.stop_token = said[3];
  const auto end = std::find(said.begin(), said.end(), said[3]) - said.begin();
  add({prompt, text(2, 5)});
  const auto records = by_name(run());
  // The second prompt lacks the stop token, which was not said.
  Ids second = prompt;
  for (std::ptrdiff_t i = 0; i < end; ++i)
    second.push_back(static_cast<std::int32_t>(said[static_cast<std::size_t>(i)]));
  const auto more = greedy(second + text(2, 5), 8);
  const auto stop = std::find(more.begin(), more.end(), tokens_.stop_token);
  const auto compared = end + 1 + std::min<std::ptrdiff_t>(8, stop - more.begin() + 1);
  for (const char* mode : {"kvcache", "llmcache"}) {
    EXPECT_EQ(records.at(mode).greedy->compared, compared);
    expect_as_nocache(records.at(mode));
  }
}

TEST_F(GenerationTest, NocacheStopsWhenItsTimeIsUp) {
  load("tiny-llama-sdpa");
  add({text(1, 20), text(2, 5)});
  add({text(3, 20)});
  const auto records = by_name(run(1e-9));
  const Record& plain = records.at("nocache");
  EXPECT_EQ(plain.requests, 1) << "one request always runs";
  EXPECT_EQ(plain.sequences, 2);
  EXPECT_EQ(plain.tokens, (20 + 1) + (28 + 5 + 1)) << "one token behind the first in each turn";
  EXPECT_EQ(records.at("kvcache").tokens, (20 + 7) + (28 + 5 + 7));
  for (const char* mode : {"kvcache", "llmcache"}) {
    expect_as_nocache(records.at(mode));
    EXPECT_EQ(records.at(mode).greedy->compared, 16) << "a pass over the whole has the rest";
  }
  // What it lacks counts with the mean of what it made.
  EXPECT_NEAR(plain.latency_ms.mean, 2 * plain.prefill_ms->mean + 14 * plain.decode_ms->mean, 1e-6);
  settings_.modes = {"nocache"};
  EXPECT_EQ(run(1e-9).front().tokens, (20 + 7) + (33 + 7)) << "nobody else could say it";
}

TEST_F(GenerationTest, PackedWeightsMayGoAnotherWayAndAreStillCompared) {
  load("tiny-llama-sdpa");
  for (std::uint32_t i = 0; i < 4; ++i) add({text(i, 20), text(20 + i, 5)});
  settings_.weights = {"packed-fp16"};
  const auto records = by_name(run());
  ASSERT_THAT(records, SizeIs(3));
  const Record& packed = records.at("llmcache packed-fp16");
  ASSERT_TRUE(packed.greedy.has_value());
  EXPECT_GE(packed.greedy->compared, 8);
  EXPECT_LT(packed.divergence.max, 0.05);
  EXPECT_GT(packed.divergence.max, 0);
}

TEST_F(GenerationTest, EndsAtTheLongestThatAModelTakes) {
  load("tiny-llama-sdpa");
  ASSERT_EQ(file_.max_tokens, 256);
  add({text(1, 200), text(2, 60)});  // 200 + 8 + 60 + 8 are too many
  add({text(3, 300)});               // cut to 248
  const auto records = by_name(run());
  for (const auto& [mode, r] : records) {
    EXPECT_EQ(r.sequences, 2) << mode;
    EXPECT_EQ(r.tokens, 200 + 7 + 248 + 7) << mode;
  }
  file_.max_tokens = 8;
  expect_failure([&] { run(); }, "takes too few tokens");
}

TEST_F(GenerationTest, NothingToRun) {
  load("tiny-llama-sdpa");
  add({text(1, 20)});
  settings_.modes = {"llmcache", "semantic-cache"};
  settings_.fidelities = {"threshold"};
  settings_.given = {"threshold", "mode"};
  expect_failure([&] { run(); }, "of llmcache only fidelity lossless generates text");
}

TEST(GreedyTest, DifferencesAndTies) {
  GreedyCount count;
  const at::Tensor reference = at::tensor({0.0, 1.0, 0.5, 3.0, 3.0 - 5e-5, 1.0}, at::kFloat).view({2, 3});
  count.compare(7, 10, reference, reference);
  EXPECT_EQ(count.result().compared, 2);
  EXPECT_EQ(count.result().different, 0);
  const at::Tensor other = at::tensor({0.0, 0.4, 0.5, 1.0, 2.0, 1.0}, at::kFloat).view({2, 3});
  count.compare(7, 10, reference, other);
  EXPECT_EQ(count.result().compared, 4);
  EXPECT_EQ(count.result().different, 2);
  EXPECT_EQ(count.result().tied, 1);
  ASSERT_THAT(count.result().differences, SizeIs(2));
  EXPECT_EQ(count.result().differences[0].sequence, 7);
  EXPECT_EQ(count.result().differences[0].token, 10);
  EXPECT_DOUBLE_EQ(count.result().differences[0].gap, 0.5);
  EXPECT_EQ(count.result().differences[1].token, 11);
  EXPECT_NEAR(count.result().differences[1].gap, 5e-5, 1e-6);
  EXPECT_TRUE(count.compare(0, 1, reference[0], 1));
  EXPECT_FALSE(count.compare(0, 1, reference[0], 2));
  for (int i = 0; i < 200; ++i) count.compare(0, 1, reference[0], 2);
  EXPECT_EQ(count.result().different, 203);
  EXPECT_THAT(count.result().differences, SizeIs(GreedyResult::kListed));
}

/// Two rows of 5 and 4 tokens; of the first the last two are scored, of the second the last three.
class PartialScoreTest : public ::testing::Test {
 protected:
  PartialScoreTest() {
    file_.task = Task::kPerplexity;
    file_.tokens = {0, 1, 2, 3, 4, 4, 3, 2, 1};
    file_.sequence_offsets = {0, 5, 9};
    file_.request_offsets = {0, 2};
    file_.scored = {{3, 5}, {1, 4}};
    logits_ = at::linspace(0, 3, 2 * 5 * 5).sin().view({2, 5, 5});
  }
  /// Tokens [begin, end) of each row came back.
  [[nodiscard]] Returned part(const std::vector<TokenRange>& tokens) const {
    at::Tensor some = at::zeros({2, 5, 5});
    for (std::int64_t row = 0; row < 2; ++row) {
      const auto [begin, end] = tokens[static_cast<std::size_t>(row)];
      some[row].narrow(0, 0, end - begin).copy_(logits_[row].narrow(0, begin, end - begin));
    }
    return {some, tokens};
  }
  [[nodiscard]] TokenScores scores(const std::vector<Returned>& returned, const LastLogits* before = nullptr) const {
    return scorer().token_scores(0, file_.request(0, 512), returned, before);
  }
  [[nodiscard]] Scorer scorer() const { return {file_, {.logits_output = 0, .logits_dims = 5}, 5, std::nullopt}; }

  TokenFile file_;
  at::Tensor logits_;
};

TEST_F(PartialScoreTest, TokensAreScoredWhereTheLogitsBeforeThemCameBack) {
  const TokenScores all = scores({part({{0, 5}, {0, 4}})});
  ASSERT_THAT(all[0], SizeIs(2));
  ASSERT_THAT(all[1], SizeIs(3));
  const auto expected = [&](std::int64_t row, std::int64_t token) {  // by the logits of the token before
    return logits_[row][token - 1].log_softmax(-1)[file_.sequence(row)[static_cast<std::size_t>(token)]].item<double>();
  };
  EXPECT_NEAR(*all[0][1], expected(0, 4), 1e-6);
  EXPECT_NEAR(*all[1][0], expected(1, 1), 1e-6);
  const TokenScores some = scores({part({{3, 5}, {1, 4}})});
  EXPECT_FALSE(some[0][0].has_value());
  EXPECT_EQ(some[0][1], all[0][1]);
  EXPECT_FALSE(some[1][0].has_value());
  EXPECT_EQ(some[1][1], all[1][1]);
  EXPECT_EQ(some[1][2], all[1][2]);
  // Two calls have it all: the last token of a prompt, and what follows.
  EXPECT_EQ(scores({part({{2, 3}, {0, 1}}), part({{3, 5}, {1, 4}})}), all);
  EXPECT_EQ(scores({part({{5, 5}, {4, 4}})}), (TokenScores{{{}, {}}, {{}, {}, {}}}));
}

TEST_F(PartialScoreTest, TheLogitsOfTheRequestBeforePredictTheFirstToken) {
  const TokenScores all = scores({part({{0, 5}, {0, 4}})});
  const LastLogits before = {.ids = {0, 1, 2}, .logits = logits_[0][2]};
  const TokenScores completed = scores({part({{3, 5}, {1, 4}})}, &before);
  EXPECT_EQ(completed[0], all[0]);
  EXPECT_FALSE(completed[1][0].has_value()) << "that was another sequence";
  const LastLogits other = {.ids = {0, 1, 3}, .logits = logits_[0][2]};
  EXPECT_FALSE(scores({part({{3, 5}, {1, 4}})}, &other)[0][0].has_value());
  const LastLogits shorter = {.ids = {0, 1}, .logits = logits_[0][2]};
  EXPECT_FALSE(scores({part({{3, 5}, {1, 4}})}, &shorter)[0][0].has_value());
}

TEST_F(PartialScoreTest, OnlyWhatAllHaveIsKept) {
  TokenScores all = scores({part({{0, 5}, {0, 4}})});
  TokenScores some = scores({part({{3, 5}, {1, 4}})});
  keep_common({&all, &some});
  EXPECT_EQ(all, some);
  const Rows rows = file_.request(0, 512);
  EXPECT_EQ(scorer().scores(0, rows, all).first->weight, 3);
  TokenScores none = scores({part({{5, 5}, {4, 4}})});
  keep_common({&all, &none});
  EXPECT_FALSE(scorer().scores(0, rows, all).first.has_value());
  keep_common({});
}

TEST_F(PartialScoreTest, ChoicesNeedAllTheirTokens) {
  file_.task = Task::kChoice;
  file_.labels = {1, 0};
  const Rows rows = file_.request(0, 512);
  EXPECT_TRUE(scorer().scores(0, rows, scores({part({{0, 5}, {0, 4}})})).first.has_value());
  EXPECT_FALSE(scorer().scores(0, rows, scores({part({{3, 5}, {0, 4}})})).first.has_value());
}

}  // namespace
}  // namespace llmcache::bench
