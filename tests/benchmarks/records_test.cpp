// The benchmark's own code: orders of requests, statistics, records, tables.
#include "records.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "bench_support.h"
#include "calibration.h"
#include "files.h"
#include "scores.h"
#include "selection.h"
#include "statistics.h"
#include "table.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using Json = nlohmann::ordered_json;

std::string text_of(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

TEST(RequestStreamTest, ShuffleIsAPermutationFixedBySeed) {
  const auto order = shuffled(1000, 7);
  EXPECT_EQ(order, shuffled(1000, 7));
  EXPECT_NE(order, shuffled(1000, 8));
  auto sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (std::int64_t i = 0; i < 1000; ++i) EXPECT_EQ(sorted[static_cast<std::size_t>(i)], i);
}

TEST(StatisticsTest, Percentiles) {
  EXPECT_EQ(percentile({4, 1, 3, 2}, 0), 1);
  EXPECT_EQ(percentile({4, 1, 3, 2}, 100), 4);
  EXPECT_DOUBLE_EQ(percentile({4, 1, 3, 2}, 50), 2.5);
  EXPECT_DOUBLE_EQ(percentile({4, 1, 3, 2}, 95), 3.85);
  EXPECT_EQ(percentile({7}, 99), 7);
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_TRUE(std::isnan(percentile({}, 50)));
  EXPECT_TRUE(std::isnan(percentile({1, NAN, 2}, 50)));
  EXPECT_TRUE(std::isnan(mean({})));
  EXPECT_EQ(mean({1, 2, 6}), 3);
  EXPECT_EQ(summarize({1, 2, 6}).max, 6);
}

TEST(StatisticsTest, WilsonsInterval) {
  // E. B. Wilson 1927; values by hand from the formula with z = 1.95996.
  EXPECT_NEAR(wilson(5, 10).low, 0.236593, 1e-6);
  EXPECT_NEAR(wilson(5, 10).high, 0.763407, 1e-6);
  EXPECT_EQ(wilson(0, 10).low, 0);
  EXPECT_NEAR(wilson(0, 10).high, 0.277533, 1e-6);
  EXPECT_EQ(wilson(10, 10).high, 1);
  EXPECT_NEAR(wilson(10, 10).low, 1 - 0.277533, 1e-6);
  EXPECT_TRUE(std::isnan(wilson(0, 0).low));
}

TEST(StatisticsTest, RanksAndRankCorrelation) {
  EXPECT_THAT(average_ranks({10, 30, 20, 20}), ElementsAre(1, 4, 2.5, 2.5));
  EXPECT_THAT(average_ranks({7, 7, 7}), ElementsAre(2, 2, 2));
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3, 4}, {10, 100, 1000, 10000}), 1);
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3, 4}, {4, 3, 2, 1}), -1);
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3}, {1, 3, 2}), 0.5);
  // Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
  EXPECT_DOUBLE_EQ(spearman({1, 2, 2, 3}, {1, 2, 3, 4}), 4.5 / std::sqrt(22.5));
  EXPECT_TRUE(std::isnan(spearman({1, 1, 1}, {1, 2, 3})));
  EXPECT_TRUE(std::isnan(spearman({1, NAN, 3}, {1, 2, 3})));
  EXPECT_TRUE(std::isnan(spearman({1}, {1})));
}

TEST(MetricTest, Values) {
  EXPECT_DOUBLE_EQ(metric_value(Metric::kAccuracy, {{7, 8}, {5, 8}}), 0.75);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kChoiceAccuracy, {{1, 1}, {0, 1}, {0, 1}, {1, 1}}), 0.5);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kAnswerNll, {{6, 2}, {2, 2}}), 2);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kPerplexity, {{6, 2}, {2, 2}}), std::exp(2.0));
  EXPECT_DOUBLE_EQ(metric_value(Metric::kSpearman, {{0.1, 0}, {0.9, 5}, {0.5, 2}}), 1);
  EXPECT_TRUE(std::isnan(metric_value(Metric::kAccuracy, {})));
}

TEST(MetricTest, ChangeIsPairedAndItsIntervalFixed) {
  std::vector<Sample> with;
  std::vector<Sample> without;
  for (int i = 0; i < 400; ++i) {
    without.push_back({i % 2 == 0 ? 1.0 : 0.0, 1});              // 50 %
    with.push_back({i % 2 == 0 && i % 40 != 0 ? 1.0 : 0.0, 1});  // ten of them lost
  }
  const Comparison c = compare(Metric::kAccuracy, with, without);
  EXPECT_DOUBLE_EQ(c.value, 0.475);
  EXPECT_DOUBLE_EQ(c.baseline, 0.5);
  EXPECT_NEAR(c.change, -0.025, 1e-12);
  // Paired: the change is a mean of 400 draws that are -1 with probability 1/40, so its standard
  // deviation is 0.0078; unpaired it would be 0.035.
  EXPECT_NEAR(c.ci95.low, -0.025 - 1.96 * 0.0078, 0.003);
  EXPECT_NEAR(c.ci95.high, -0.025 + 1.96 * 0.0078, 0.003);
  const Comparison again = compare(Metric::kAccuracy, with, without);
  EXPECT_EQ(again.ci95.low, c.ci95.low);
  EXPECT_EQ(again.ci95.high, c.ci95.high);
  const Comparison same = compare(Metric::kAccuracy, with, with);
  EXPECT_EQ(same.change, 0);
  EXPECT_EQ(same.ci95.low, 0);
  EXPECT_EQ(same.ci95.high, 0);
  const Comparison alone = compare(Metric::kAccuracy, with, {});
  EXPECT_DOUBLE_EQ(alone.value, 0.475);
  EXPECT_TRUE(std::isnan(alone.baseline));
  EXPECT_TRUE(std::isnan(alone.ci95.low));
}

/// Two fill texts, four that ask: a duplicate of 0, no duplicate of 1, a duplicate of 1, one of 0.
class ServedTest : public ::testing::Test {
 protected:
  ServedTest() {
    file.task = Task::kDuplicates;
    file.tokens = {1, 2, 3, 4, 5, 6, 7, 3, 4, 8};
    file.sequence_offsets = {0, 2, 4, 5, 6, 7, 9, 10};
    file.request_offsets = {0, 1, 2, 3, 4, 5, 6, 7};
    file.fill_requests = 2;
    file.partner = {-1, -1, 0, 1, 1, 0, 0};
    file.pair_label = {-1, -1, 1, 0, 1, 1, 1};
    file.group = {0, 1, 0, 1, -1, -1, 2};
  }
  TokenFile file;
};

TEST_F(ServedTest, DuplicatesAreJudgedByTheirPair) {
  ServedCounts counts(file);
  counts.add(2, 2, 0);                         // right
  counts.add(3, 3, 1);                         // unsafe
  counts.add(4, 4, 0);                         // from a text that is not of its pair
  counts.add(5, 5, 1);                         // its ids are those of text 1, so right
  counts.add(6, 6, ServedCounts::kNotServed);  // missed
  EXPECT_DOUBLE_EQ(counts.precision(), 2.0 / 3);
  EXPECT_DOUBLE_EQ(counts.recall(), 2.0 / 4);
  EXPECT_DOUBLE_EQ(counts.unsafe().rate, 0.25);
  EXPECT_EQ(counts.unsafe().of, 4);
  EXPECT_EQ(counts.unlabelled(), 1);
  EXPECT_DOUBLE_EQ(counts.unsafe().ci95.low, wilson(1, 4).low);
  counts.add(6, 6, ServedCounts::kUnknown);
  EXPECT_EQ(counts.unsafe().of, 5);
  EXPECT_EQ(counts.unlabelled(), 2);
}

TEST_F(ServedTest, NothingServedIsNoRate) {
  ServedCounts counts(file);
  counts.add(2, 2, ServedCounts::kNotServed);
  EXPECT_TRUE(std::isnan(counts.precision()));
  EXPECT_EQ(counts.recall(), 0);
  EXPECT_TRUE(std::isnan(counts.unsafe().rate));
}

TEST_F(ServedTest, AnswersAreComparedByGroup) {
  file.task = Task::kAnswer;
  ServedCounts counts(file);
  counts.add(2, 2, 0);                         // 0 and 0
  counts.add(3, 3, 0);                         // 1 and 0
  counts.add(4, 4, 5);                         // both without an answer
  counts.add(5, 5, 6);                         // none and 2
  counts.add(6, 6, ServedCounts::kNotServed);  // does not count
  EXPECT_DOUBLE_EQ(counts.same_answer().rate, 0.5);
  EXPECT_EQ(counts.same_answer().of, 4);
}

Record example() {
  Record r;
  r.model = "m";
  r.weights = "random (seed 0)";
  r.workload = "w";
  r.mode = "llmcache";
  r.fidelity = "lossless";
  r.threads = 2;
  r.requests = 10;
  r.requests_available = 20;
  r.sequences = 40;
  r.tokens = 4000;
  r.tokens_computed_fraction = 0.75;
  r.latency_ms = {.mean = 1.5, .p50 = 1.25, .p95 = 3, .p99 = 4};
  r.speedup_vs_nocache = 2.5;
  r.speedup_median = 2.25;
  r.hit_rate = 0.25;
  r.divergence = {.mean = 1e-7, .p95 = 2e-7, .max = 3e-7};
  r.cache_bytes = 123456789;
  r.shuffle = std::uint64_t{1} << 63;
  r.source = "a \"quoted\" source";
  r.versions = {"0.1.0", "2.13.0", "g++ 12.2.0", "2.13.0", ""};
  return r;
}

/// With everything that a run on similarity adds.
Record similar_example() {
  Record r = example();
  r.weights = "hub:x";
  r.fidelity = "threshold";
  r.threshold = 0.9;
  r.fingerprint = "simhash128";
  r.fingerprint_layer = 0;
  r.centring = "running";
  r.cache_layers = "0,5";
  r.eviction = "lru";
  r.ttl_seconds = 60;
  r.audit_rate = 0.125;
  r.capacity_bytes = 1 << 20;
  r.filled = 30;
  r.fill_available = 40;
  r.hit_rate_by_layer = {0.125, 0, 0.125};
  r.task = {.metric = "accuracy", .value = 0.917, .baseline = 0.929, .change = -0.012, .ci95 = {-0.019, -0.006}};
  r.recall = 0.5;
  r.unsafe_served = {.rate = {0.25, {0.1, 0.4}, 40}, .unlabelled = 7};
  r.same_answer = {0.75, {0.5, 0.875}, 16};
  return r;
}

/// With everything that a run of a decoder adds.
Record decoder_example() {
  Record r = example();
  r.weights = "hub:x";
  r.shuffle.reset();
  r.weights_held = "packed-fp16";
  r.output = "last";
  r.speedup_vs_kvcache = 1.5;
  r.prefill_ms = {.mean = 10.25, .p50 = 10, .p95 = 11, .p99 = 12};
  r.prefill_speedup_vs_nocache = 4.5;
  r.prefill_speedup_vs_kvcache = 3.25;
  r.tokens_reused_fraction = 0.875;
  r.tokens_shared_fraction = 0.0625;
  r.decode_ms = {.mean = 40.5, .p50 = 40, .p95 = 41, .p99 = 42};
  r.tokens_per_second = 20.5;
  r.later_turns = {.turns = 7,
                   .prefill_ms = {.mean = 5.5, .p50 = 5, .p95 = 6, .p99 = 7},
                   .speedup_vs_nocache = 9.5,
                   .speedup_vs_kvcache = 6.75,
                   .tokens_reused_fraction = 0.75};
  r.greedy = {.compared = 64, .different = 2, .tied = 1, .differences = {{3, 130, 5e-5}, {4, 200, 0.25}}};
  return r;
}

TEST(RecordsTest, AreWritten) {
  const Json json = to_json(example());
  const Json parsed = Json::parse(json.dump());
  EXPECT_EQ(parsed, json);
  EXPECT_EQ(parsed["shuffle"].get<std::uint64_t>(), std::uint64_t{1} << 63);
  EXPECT_EQ(parsed["versions"]["model_torch"], "2.13.0");
  EXPECT_TRUE(parsed["versions"]["model_transformers"].is_null());
}

TEST(RecordsTest, OfSimilarity) {
  const Json json = to_json(similar_example());
  EXPECT_EQ(Json::parse(json.dump()), json);
  EXPECT_EQ(json["threshold"], 0.9);
  EXPECT_EQ(json["task"]["ci95"], (Json{-0.019, -0.006}));
  EXPECT_EQ(json["unsafe_served"]["unlabelled"], 7);
  EXPECT_EQ(json["hit_rate_by_layer"].size(), 3U);
  const Json plain = to_json(example());
  for (const char* key :
       {"threshold", "fingerprint", "fingerprint_layer", "centring", "cache_layers", "eviction", "task", "ttl_seconds",
        "audit_rate", "capacity_bytes", "hit_rate_by_layer", "recall", "unsafe_served", "same_answer"}) {
    EXPECT_TRUE(plain.at(key).is_null()) << key;
  }
  Record unmeasured = similar_example();
  unmeasured.task->baseline = kNotMeasured;
  unmeasured.task->ci95 = {kNotMeasured, kNotMeasured};
  const Json nulls = to_json(unmeasured);
  EXPECT_TRUE(nulls["task"]["baseline"].is_null());
  EXPECT_TRUE(nulls["task"]["ci95"][0].is_null());
}

TEST(RecordsTest, OfDecoding) {
  const Json json = to_json(decoder_example());
  EXPECT_EQ(Json::parse(json.dump()), json);
  EXPECT_EQ(json["weights_held"], "packed-fp16");
  EXPECT_EQ(json["prefill_ms"]["p95"], 11);
  EXPECT_EQ(json["later_turns"]["speedup_vs_kvcache"], 6.75);
  EXPECT_EQ(json["greedy"]["differences"][1]["token"], 200);
  const Json plain = to_json(example());
  for (const char* key : {"speedup_vs_kvcache", "prefill_ms", "prefill_speedup_vs_nocache",
                          "prefill_speedup_vs_kvcache", "tokens_reused_fraction", "tokens_shared_fraction", "decode_ms",
                          "tokens_per_second", "later_turns", "greedy"}) {
    EXPECT_TRUE(plain.at(key).is_null()) << key;
  }
  EXPECT_EQ(plain["weights_held"], "as-loaded");
  EXPECT_EQ(plain["output"], "all");
}

TEST(RecordsTest, WhatIsNotFiniteIsNull) {
  Record r = example();
  r.speedup_vs_nocache = kNotMeasured;
  r.divergence.max = std::numeric_limits<double>::infinity();
  r.shuffle.reset();
  r.fidelity.clear();
  const Json json = Json::parse(to_json(r).dump());
  EXPECT_TRUE(json["speedup_vs_nocache"].is_null());
  EXPECT_TRUE(json["divergence"]["max"].is_null());
  EXPECT_TRUE(json["shuffle"].is_null());
  EXPECT_TRUE(json["fidelity"].is_null());
}

TEST(RecordsTest, WritesAtomically) {
  const Folder folder;
  write_atomically(folder / "r.json", "one");
  write_atomically(folder / "r.json", "two");
  EXPECT_EQ(text_of(folder / "r.json"), "two");
  const std::filesystem::directory_iterator files(folder / "");
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
  expect_failure([&] { write_atomically(folder / "missing/r.json", "x"); }, "cannot be written");
}

TEST(TableTest, EveryLineOfARandomModelSaysSo) {
  Record plain = example();
  plain.mode = "nocache";
  plain.fidelity.clear();
  std::istringstream table(results_table({plain, example()}));
  std::string line;
  std::getline(table, line);  // headers
  int lines = 0;
  while (std::getline(table, line)) {
    ++lines;
    EXPECT_THAT(line, HasSubstr("random weights"));
    EXPECT_THAT(line, HasSubstr("w (shuffled)"));
  }
  EXPECT_EQ(lines, 2);
}

TEST(TableTest, QualityStandsBesideSpeed) {
  const std::string table = results_table({similar_example()});
  EXPECT_THAT(table, HasSubstr("llmcache/threshold 0.90"));
  EXPECT_THAT(table,
              HasSubstr("accuracy 91.7%, -1.2 [-1.9, -0.6], recall 50.0%, unsafe 25.0% [10.0, 40.0], same answer"));
  EXPECT_THAT(table, HasSubstr("30/40"));
  EXPECT_THAT(results_table({example()}), HasSubstr("divergence only"));
  Record larger = similar_example();
  larger.capacity_bytes = 64 << 20;
  const std::string both = results_table({similar_example(), larger});
  EXPECT_THAT(both, HasSubstr("threshold 0.90 1 MiB"));
  EXPECT_THAT(both, HasSubstr("threshold 0.90 64 MiB"));
}

TEST(TableTest, DecodersHaveColumnsOfTheirOwn) {
  const std::string table = results_table({decoder_example(), example()});
  for (const char* text : {"llmcache/lossless packed-fp16", "prefill ms", "3.25", "87.5%", "6.2%", "later turns",
                           "6.75", "62/64 (1 tied)", "20.5"}) {
    EXPECT_THAT(table, HasSubstr(text));
  }
  const std::string without = results_table({example()});
  for (const char* header : {"prefill", "vs kvcache", "reused", "decode", "later turns", "greedy"}) {
    EXPECT_THAT(without, Not(HasSubstr(header)));
  }
  // Lines still have a cell for each header: the last one is the size of the cache.
  EXPECT_THAT(without, HasSubstr("117.7"));
  Record shuffled = decoder_example();
  shuffled.shuffle = 0;
  EXPECT_THAT(results_table({shuffled}), HasSubstr("w (shuffled)"));
}

TEST(TableTest, GreedyDifferencesAreListedWhereWeightsAreAsLoaded) {
  Record r = decoder_example();
  EXPECT_THAT(greedy_list({r, example()}), IsEmpty());
  r.weights_held = "as-loaded";
  const std::string list = greedy_list({r});
  EXPECT_THAT(list, HasSubstr("m on w, llmcache/lossless: sequence 3, token 130: 5.0e-05 below nocache's best (tied)"));
  EXPECT_THAT(list, HasSubstr("sequence 4, token 200: 2.5e-01 below nocache's best\n"));
}

TEST(TableTest, EmptyColumnsAreDropped) {
  Table table({"a", "b", "c"}, 2);
  table.add({"1", "-", "2"});
  table.add({"3", "", ""});
  EXPECT_EQ(table.text(), "a  c\n1  2\n3\n");
}

TEST(EqualErrorTest, AsManyAsTheErrorAllows) {
  const std::vector<Nearest> nearest = {{0.5, 1}, {0.9, 0},  {0.8, 1}, {0.7, 0},
                                        {0.7, 1}, {0.95, 0}, {0.6, 0}, {0.3, 0}};
  EXPECT_EQ(threshold_within(nearest, 0), 0.9);
  EXPECT_EQ(threshold_within(nearest, 1.0 / 8), 0.8);  // one of the two at 0.7 is wrong
  EXPECT_EQ(threshold_within(nearest, 2.0 / 8), 0.6);
  EXPECT_EQ(threshold_within(nearest, 3.0 / 8), 0.3);
  EXPECT_EQ(threshold_within({{0.9, 1}}, 0.5), 1);
  EXPECT_EQ(threshold_within({}, 0.5), 1);
}

}  // namespace
}  // namespace llmcache::bench
