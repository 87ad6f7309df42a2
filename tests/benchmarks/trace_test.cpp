// llmcache-trace: reading traces, replaying them, and the optimum. No model and no LibTorch.
#include "trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "bench_support.h"
#include "command_line.h"
#include "failure.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Trace read(const std::string& text, std::optional<std::int64_t> limit = {}) {
  std::istringstream in(text);
  return read_trace(in, "test.jsonl", limit);
}

Trace trace_of(const std::vector<std::vector<std::uint32_t>>& requests) {
  Trace trace;
  for (const auto& blocks : requests) {
    trace.requests.push_back({static_cast<double>(trace.requests.size()), blocks});
    trace.blocks += blocks.size();
    for (const auto block : blocks) trace.distinct = std::max(trace.distinct, block + 1);
  }
  return trace;
}

/// Requests that walk down a random tree from its root: block b's parent is (b - 1) / 2, or none for 0 and 1.
Trace random_trace(unsigned seed, std::uint32_t blocks, int requests) {
  std::mt19937 random(seed);
  std::vector<std::vector<std::uint32_t>> chains;
  for (int i = 0; i < requests; ++i) {
    std::vector<std::uint32_t> chain;
    for (std::uint32_t block = random() % blocks;; block = (block - 1) / 2) {
      chain.insert(chain.begin(), block);
      if (block < 2) break;
    }
    chains.push_back(chain);
  }
  Trace trace = trace_of(chains);
  trace.distinct = blocks;
  return trace;
}

/// The most hits: tries every set of blocks that could be held after each request.
std::uint64_t best_hits(const Trace& trace, std::uint64_t capacity) {
  std::map<std::uint32_t, std::uint64_t> hits_by_set = {{0, 0}};
  for (const TraceRequest& request : trace.requests) {
    std::map<std::uint32_t, std::uint64_t> after;
    for (const auto& [held, hits] : hits_by_set) {
      std::uint64_t new_hits = hits;
      for (const auto block : request.blocks) {
        if ((held >> block & 1U) == 0) break;
        ++new_hits;
      }
      std::uint32_t all = held;
      for (const auto block : request.blocks) all |= 1U << block;
      for (std::uint32_t kept = all;; kept = (kept - 1) & all) {
        if (static_cast<std::uint64_t>(__builtin_popcount(kept)) <= capacity) {
          after[kept] = std::max(after[kept], new_hits);
        }
        if (kept == 0) break;
      }
    }
    hits_by_set = std::move(after);
  }
  std::uint64_t best = 0;
  for (const auto& [held, hits] : hits_by_set) best = std::max(best, hits);
  return best;
}

TEST(TraceReading, ReadsRequests) {
  const Trace trace = read(
      "{\"timestamp\": 0, \"input_length\": 1000, \"output_length\": 5, \"hash_ids\": [70, 8]}\n"
      "\n"
      "{\"hash_ids\": [70, 9, -3], \"timestamp\": 1500.5}\r\n"
      "{\"timestamp\": 2000, \"hash_ids\": [18446744073709551615]}");
  ASSERT_EQ(trace.requests.size(), 3U);
  EXPECT_THAT(trace.requests[0].blocks, ElementsAre(0, 1));
  EXPECT_THAT(trace.requests[1].blocks, ElementsAre(0, 2, 3));
  EXPECT_THAT(trace.requests[2].blocks, ElementsAre(4));
  EXPECT_DOUBLE_EQ(trace.requests[1].time_s, 1.5005);
  EXPECT_EQ(trace.blocks, 6U);
  EXPECT_EQ(trace.distinct, 5U);
}

TEST(TraceReading, StopsAtTheLimit) {
  const std::string text = "{\"timestamp\":0,\"hash_ids\":[1]}\n{\"timestamp\":0,\"hash_ids\":[2]}\nnot read\n";
  EXPECT_EQ(read(text, 2).requests.size(), 2U);
  EXPECT_EQ(read(text, 1).distinct, 1U);
}

TEST(TraceReading, NamesTheBadLine) {
  const std::string good = "{\"timestamp\":0,\"hash_ids\":[1,2]}\n";
  const auto refused = [&](const std::string& line, const std::string& part) {
    expect_failure([&] { read(good + "\n" + line + "\n" + good); }, "test.jsonl, line 3: ");
    expect_failure([&] { read(good + "\n" + line + "\n" + good); }, part);
  };
  refused("{\"timestamp\":0,\"hash_ids\":[1,2]", "is not JSON");
  refused("[1, 2]", "not a JSON object");
  refused("timestamp,hash_ids", "is not JSON");
  refused(std::string("{\"timestamp\":0,\"hash_ids\":[1,\xff\xfe]}"), "is not JSON");
  refused("{\"hash_ids\":[1,2]}", "has no 'timestamp'");
  refused("{\"timestamp\":0}", "'hash_ids' is no list with a block in it");
  refused("{\"timestamp\":\"0\",\"hash_ids\":[1]}", "has 'timestamp' \"0\"");
  refused("{\"timestamp\":1e999,\"hash_ids\":[1]}", "is not JSON");
  refused("{\"timestamp\":0,\"hash_ids\":[]}", "'hash_ids' is no list with a block in it");
  refused("{\"timestamp\":0,\"hash_ids\":7}", "'hash_ids' is no list with a block in it");
  refused("{\"timestamp\":0,\"hash_ids\":[1,2.5]}", "'hash_ids' has 2.5");
  refused("{\"timestamp\":0,\"hash_ids\":[1,null]}", "'hash_ids' has null");
  refused("{\"timestamp\":0,\"hash_ids\":[\"" + std::string(200, 'k') + "\"]}", "kkk...");
  refused("{\"timestamp\":0,\"hash_ids\":[2]}", "hash id 2 is first here, but behind 1 in line 1");
  refused("{\"timestamp\":0,\"hash_ids\":[3,2]}", "hash id 2 is behind 3 here, but behind 1 in line 1");
  refused("{\"timestamp\":0,\"hash_ids\":[1,1]}", "hash id 1 is behind 1 here, but first in line 1");
  expect_failure([] { read(""); }, "no request in it");
  expect_failure([] { read("\n \n"); }, "no request in it");
  expect_failure([] { read_trace(std::filesystem::path("/nowhere/trace.jsonl")); }, "cannot be read");
  expect_failure([] { read_trace(std::filesystem::temp_directory_path()); }, "cannot be read");
}

TEST(TraceReplay, LruByHand) {
  // Capacity 3. Used from the last block to the first, so the order of use, oldest first, is:
  //   0 1     -> 1 0
  //   0 2     hit 0          -> 1 2 0
  //   3       evicts 1       -> 2 0 3
  //   0 1     hit 0; inserting 1 evicts 2 -> 3 1 0
  //   0 2     hit 0; inserting 2 evicts 3 -> 1 2 0
  //   0 1     hit 0 and 1
  const Trace trace = trace_of({{0, 1}, {0, 2}, {3}, {0, 1}, {0, 2}, {0, 1}});
  const Replay result = replay(trace, 3, {});
  EXPECT_EQ(result.blocks, 11U);
  EXPECT_EQ(result.hits, 5U);
  EXPECT_EQ(result.evictions, 3U);
  EXPECT_DOUBLE_EQ(result.hit_rate(), 5.0 / 11);
}

TEST(TraceReplay, ABlockIsAHitOnlyWithAllBeforeIt) {
  // GDSF: block 0 came with a short request and costs 1, twice used 2; the others came with a long one and cost 2.9. So
  // 0 goes first, when the third use of 201 has moved the clock far enough, and all the others are of no use then.
  std::vector<std::uint32_t> chain(201);
  for (std::uint32_t block = 0; block < chain.size(); ++block) chain[block] = block;
  const EvictionOptions options{.policy = Eviction::kGdsf};
  const Replay before = replay(trace_of({{0}, chain, {201}, {201}, chain}), 201, options);
  EXPECT_EQ(before.hits, 1U + 201U);
  const Replay after = replay(trace_of({{0}, chain, {201}, {201}, {201}, chain}), 201, options);
  EXPECT_EQ(after.hits, 1U);
}

TEST(TraceReplay, NoCapacityNoHits) {
  const Trace trace = random_trace(3, 20, 100);
  for (const auto policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    const Replay result = replay(trace, 0, {.policy = policy});
    EXPECT_EQ(result.hits, 0U);
    EXPECT_EQ(result.evictions, result.blocks);
  }
  EXPECT_EQ(replay_belady(trace, 0).hits, 0U);
}

TEST(TraceReplay, WithRoomForAllAllPoliciesAreAlike) {
  const Trace trace = random_trace(4, 40, 200);
  const Replay all = replay_unbounded(trace);
  EXPECT_GT(all.hits, 0U);
  for (const auto policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    const Replay result = replay(trace, 40, {.policy = policy});
    EXPECT_EQ(result.hits, all.hits);
    EXPECT_EQ(result.evictions, 0U);
    EXPECT_DOUBLE_EQ(result.saved, all.saved);
  }
  EXPECT_EQ(replay_belady(trace, 40).hits, all.hits);
}

TEST(TraceReplay, NoneBeatsTheOptimum) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    const Trace trace = random_trace(seed, 60, 300);
    for (const std::uint64_t capacity : {1U, 3U, 8U, 20U, 45U}) {
      const std::uint64_t best = replay_belady(trace, capacity).hits;
      for (const auto policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
        EXPECT_LE(replay(trace, capacity, {.policy = policy}).hits, best) << seed << ' ' << capacity;
      }
    }
  }
}

TEST(TraceReplay, BeladyFindsWhatTryingEverythingFinds) {
  for (unsigned seed = 1; seed <= 25; ++seed) {
    const Trace trace = random_trace(seed, 8, 12);
    for (std::uint64_t capacity = 0; capacity <= 6; ++capacity) {
      EXPECT_EQ(replay_belady(trace, capacity).hits, best_hits(trace, capacity)) << seed << ' ' << capacity;
    }
  }
}

TEST(TraceReplay, SavedCostCountsAttention) {
  EXPECT_DOUBLE_EQ(prefix_cost(0), 0);
  EXPECT_DOUBLE_EQ(prefix_cost(1), 1);
  EXPECT_DOUBLE_EQ(prefix_cost(3), 3 + 3.0 / 52);
  const Replay result = replay(trace_of({{0, 1, 2}, {0, 1, 3}}), 10, {});
  EXPECT_DOUBLE_EQ(result.saved_rate(), prefix_cost(2) / (2 * prefix_cost(3)));
  EXPECT_EQ(Replay{}.hit_rate(), 0);
  EXPECT_EQ(Replay{}.saved_rate(), 0);
}

/// Parses a command line without a program name in front.
TraceArguments parse(std::vector<const char*> words) {
  words.insert(words.begin(), "llmcache-trace");
  return parse_trace_arguments(static_cast<int>(words.size()), words.data());
}

TEST(TraceArgumentsTest, AreRead) {
  const TraceArguments arguments =
      parse({"--trace", "a.jsonl", "--policy", "gdsf,belady", "--capacity", "5,70", "--half-life", "30",
             "--small-share", "0.2", "--ghost-share", "2", "--hits-to-stay", "1", "--limit", "9", "--json", "o.json"});
  EXPECT_EQ(arguments.trace, "a.jsonl");
  EXPECT_THAT(arguments.policies, ElementsAre("gdsf", "belady"));
  EXPECT_THAT(arguments.capacities, ElementsAre(5, 70));
  EXPECT_EQ(arguments.eviction.decay.half_life_s, 30);
  EXPECT_EQ(arguments.eviction.s3_fifo.small_share, 0.2);
  EXPECT_EQ(arguments.eviction.s3_fifo.ghost_share, 2);
  EXPECT_EQ(arguments.eviction.s3_fifo.hits_to_stay, 1U);
  EXPECT_EQ(arguments.limit, 9);
  EXPECT_EQ(arguments.json, "o.json");
  EXPECT_THAT(parse({"--trace", "a.jsonl"}).capacities, ElementsAre(1000, 5000, 10000, 50000));
}

TEST(TraceArgumentsTest, BadOnesAreRefused) {
  const auto refused = [](const char* option, const char* value, const std::string& part) {
    expect_failure([&] { parse({"--trace", "a.jsonl", option, value}); }, part);
  };
  refused("--policy", "lfu", "lfu");
  refused("--capacity", "0", "--capacity");
  refused("--capacity", "-5", "--capacity");
  refused("--capacity", "many", "many");
  refused("--half-life", "0", "half_life_s");
  refused("--half-life", "nan", "half_life_s");
  refused("--small-share", "2", "small_share");
  refused("--ghost-share", "-1", "ghost_share");
  refused("--hits-to-stay", "0", "--hits-to-stay");
  refused("--limit", "0", "--limit");
  refused("--unknown", "1", "--help");
  EXPECT_THROW(parse({"--help"}), HelpAsked);
  EXPECT_THROW(parse({"--version"}), HelpAsked);
}

TEST(TraceReport, TextAndJsonHaveAllResults) {
  const Trace trace = random_trace(7, 30, 100);
  TraceArguments arguments;
  arguments.trace = "folder/small.jsonl";
  arguments.capacities = {4, 12};
  const auto results = replay_all(trace, arguments);
  ASSERT_EQ(results.size(), 10U);
  EXPECT_EQ(results[1].policy, "lru");
  EXPECT_EQ(results[1].capacity, 12);
  EXPECT_EQ(results[1].replay.hits, replay(trace, 12, {}).hits);
  EXPECT_EQ(results[8].policy, "belady");
  EXPECT_EQ(results[8].replay.hits, replay_belady(trace, 4).hits);

  const auto json = trace_json(trace, arguments, results);
  EXPECT_EQ(json["trace"], "small.jsonl");
  EXPECT_EQ(json["requests"], 100);
  EXPECT_EQ(json["blocks"], trace.blocks);
  EXPECT_EQ(json["unbounded_hit_rate"], replay_unbounded(trace).hit_rate());
  ASSERT_EQ(json["results"].size(), 10U);
  for (std::size_t i = 0; i < results.size(); ++i) {
    EXPECT_EQ(json["results"][i]["policy"], results[i].policy);
    EXPECT_EQ(json["results"][i]["capacity"], results[i].capacity);
    EXPECT_EQ(json["results"][i]["hit_rate"], results[i].replay.hit_rate());
    EXPECT_EQ(json["results"][i]["evictions"], results[i].replay.evictions);
  }
  const std::string text = trace_text(trace, arguments, results);
  for (const char* part : {"100 requests", "lru", "decay", "s3fifo", "gdsf", "belady", "no limit"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

/// The real trace, where the raw data sets are: the reference was measured by other code.
TEST(TraceMooncake, AgreesWithTheReference) {
  TraceArguments arguments;
  try {
    arguments = parse({"--policy", "lru"});
  } catch (const Failure& failure) {
    // The repository may not have the trace; any other failure is one.
    ASSERT_THAT(failure.what(), ::testing::AnyOf(HasSubstr("no trace:"), HasSubstr("where LLMCACHE_RAW_DATA points")));
    GTEST_SKIP() << failure.what();
  }
  const Trace trace = read_trace(arguments.trace);
  EXPECT_EQ(trace.requests.size(), 7000U);
  EXPECT_NEAR(replay_unbounded(trace).hit_rate(), 0.347, 0.0006);
  const std::map<std::uint64_t, double> reference = {{1000, 0.044}, {5000, 0.109}, {10000, 0.206}, {50000, 0.343}};
  for (const auto& [capacity, hit_rate] : reference) {
    EXPECT_NEAR(replay(trace, capacity, {}).hit_rate(), hit_rate, 0.0025) << capacity;
  }
}

}  // namespace
}  // namespace llmcache::bench
