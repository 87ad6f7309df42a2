// PrefixBank against a plain model, and from many threads. No model.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bank/prefix_bank.h"
#include "prefix_bank_support.h"

namespace llmcache::test {
namespace {

struct Load {
  Eviction policy;
  std::size_t capacity;
};

class PrefixWorkload : public PrefixBanks, public ::testing::WithParamInterface<Load> {};
INSTANTIATE_TEST_SUITE_P(All, PrefixWorkload,
                         ::testing::Values(Load{Eviction::kLru, 1U << 30}, Load{Eviction::kLru, 60000},
                                           Load{Eviction::kLru, 9000}, Load{Eviction::kDecay, 60000},
                                           Load{Eviction::kDecay, 25000}, Load{Eviction::kS3Fifo, 60000},
                                           Load{Eviction::kS3Fifo, 15000}, Load{Eviction::kGdsf, 60000},
                                           Load{Eviction::kGdsf, 30000}),
                         [](const auto& param) {
                           return std::string(to_string(param.param.policy)) + std::to_string(param.param.capacity);
                         });

/// Thousands of passes, some of them at once, some given up, of sequences that grow and part. What is found must have
/// been committed, and have its contents; without evictions all that was committed must be found.
TEST_P(PrefixWorkload, FindsOnlyWhatWasCommitted) {
  const auto [policy, capacity] = GetParam();
  PrefixBank bank(settings(capacity, policy));
  std::mt19937_64 random(capacity + static_cast<std::size_t>(policy));
  const auto below = [&random](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  std::map<std::string, std::set<Tokens>> committed;  // all prefixes
  std::vector<Pass> running;
  std::vector<std::pair<std::string, Tokens>> earlier{{"a", {}}};
  std::int64_t found = 0;
  std::int64_t commits = 0;
  for (int step = 0; step < 6000; ++step) {
    const double now_s = step * 0.1;
    if (running.size() < 4 && below(3) != 0) {
      // A new sequence, one that goes on from an earlier one, or from a part of it.
      auto [partition, tokens] = earlier[static_cast<std::size_t>(below(earlier.size()))];
      if (below(4) == 0) tokens.resize(static_cast<std::size_t>(below(tokens.size() + 1)));
      if (below(8) == 0 || tokens.size() > 60) {
        partition = std::string(1, static_cast<char>('a' + below(3)));
        tokens.clear();
      }
      for (std::int64_t more = 1 + below(12); more > 0; --more) tokens.push_back(below(3));
      running.emplace_back(bank, partition, tokens, now_s, below(3) * 16);
      const PrefixLease& lease = running.back().lease;
      const auto& prefixes = committed[partition];
      const Tokens prefix(tokens.begin(), tokens.begin() + lease.known_tokens());
      ASSERT_TRUE(prefix.empty() || prefixes.count(prefix) != 0) << "step " << step;
      const auto counters = bank.counters();
      if (counters.evictions == 0 && counters.rejected == 0 && prefix.size() < tokens.size()) {
        const Tokens longer(tokens.begin(), tokens.begin() + lease.known_tokens() + 1);
        ASSERT_EQ(prefixes.count(longer), 0U) << "step " << step;
      }
      found += lease.known_tokens();
    } else if (!running.empty()) {
      const auto which = running.begin() + below(running.size());
      // Nothing that a pass uses has changed.
      ASSERT_TRUE(contents_right(which->lease, which->partition, which->tokens)) << "step " << step;
      if (below(5) != 0) {
        which->commit(bank, now_s, static_cast<double>(1 + below(5)));
      }
      if (which->complete && which->committed) {
        ++commits;
        for (std::size_t end = 1; end <= which->tokens.size(); ++end) {
          committed[which->partition].emplace(which->tokens.begin(),
                                              which->tokens.begin() + static_cast<std::ptrdiff_t>(end));
        }
        earlier.emplace_back(which->partition, which->tokens);
        if (earlier.size() > 40) earlier.erase(earlier.begin() + below(earlier.size()));
      }
      running.erase(which);
    }
    const auto counters = bank.counters();
    ASSERT_LE(counters.bytes, capacity) << "step " << step;
    ASSERT_LE(counters.peak_bytes, capacity) << "step " << step;
    if (counters.evictions == 0 && counters.rejected == 0) {
      std::size_t distinct = 0;
      for (const auto& [partition, prefixes] : committed) distinct += prefixes.size();
      ASSERT_EQ(counters.tokens, distinct) << "nothing is held twice; step " << step;
    }
    if (step % 1500 == 1499) {
      bank.clear();
      committed.clear();
    }
  }
  EXPECT_GT(found, 1000);
  EXPECT_GT(commits, 1000);
  if (capacity < 1U << 20) {
    EXPECT_GT(bank.counters().evictions, 500U);
  } else {
    EXPECT_EQ(bank.counters().evictions, 0U);
    EXPECT_EQ(bank.counters().rejected, 0U);
  }
  running.clear();
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
}

TEST_F(PrefixBanks, ManyThreads) {
  for (const std::size_t capacity : {std::size_t{40000}, std::size_t{1} << 30U}) {
    PrefixBank bank(settings(capacity));
    std::atomic<std::int64_t> found{0};
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      threads.emplace_back([&bank, &found, &wrong, seed] {
        std::mt19937_64 random(seed);
        for (int step = 0; step < 300; ++step) {
          // Sequences of few different tokens, so that the threads meet; grown token by token.
          Tokens tokens;
          const std::string partition(1, static_cast<char>('a' + random() % 2));
          for (int i = 0; i < 8; ++i) tokens.push_back(static_cast<std::int64_t>(random() % 2));
          for (int i = 0; i < 5; ++i) {
            Pass pass(bank, partition, tokens, step, 16);
            found += pass.lease.known_tokens();
            if (random() % 8 != 0) pass.commit(bank, step);
            if (!contents_right(pass.lease, partition, tokens)) ++wrong;
            tokens.push_back(static_cast<std::int64_t>(random() % 2));
          }
          if (seed == 0 && step % 100 == 99) bank.clear();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_GT(found, 1000);
    EXPECT_LE(bank.counters().peak_bytes, capacity);
    bank.clear();
    EXPECT_EQ(bank.counters().bytes, 0U);
  }
}

}  // namespace
}  // namespace llmcache::test
