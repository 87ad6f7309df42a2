// What tests of stores below a cache's memory share.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support.h"

namespace llmcache::test {

inline constexpr const char* kCausalModel = "tiny-gpt2-sdpa";
inline constexpr const char* kEncoderModel = "tiny-bert-sdpa";

/// Options of a cache above a store. Small blocks, as tiny models have short sequences.
inline Options above(std::shared_ptr<StateStore> store, std::int64_t block_tokens = 4) {
  Options options;
  options.store.store = std::move(store);
  options.store.block_tokens = block_tokens;
  options.prefix.capacity_share = 1;  // of causal models blocks alone, so that they can be counted
  // Nothing here is about what happens on a machine that is busy with other tests.
  options.store.deadline_ms = 5'000;
  options.store.only_if_faster = false;
  options.store.write_deadline_ms = 30'000;
  return options;
}

/// Waits until what the cache writes and fetches behind its answers is done.
inline void wait_for_store(const LayerCacheBase& cache) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  while (cache.stats().store.waiting > 0) {
    ASSERT_LT(std::chrono::steady_clock::now(), until) << "work behind the answers does not end";
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

/// Real tokens of the latest call that were not computed.
inline std::int64_t reused_tokens(const LayerCacheBase& cache) {
  std::int64_t sum = 0;
  for (const SequenceReport& sequence : cache.last_report().sequences) sum += sequence.reused_tokens;
  return sum;
}

/// The cache's answer to a request is that of the plain model.
inline void expect_plain_answer(LayerCache<Module>& cache, Module& plain, const ModelInfo& info, const Request& request,
                                const std::string& tenant = {}) {
  const auto got = cache.forward(request.inputs, {.tenant = tenant});
  EXPECT_TRUE(close_on_real(got, run_plain(plain, request.inputs), request, tolerance_of(info)));
  EXPECT_EQ(cache.last_report().fallback, "");
}

}  // namespace llmcache::test
