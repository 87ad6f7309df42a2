// Caches above one redis-server, in one process and in several, while the server does what servers do.
#include <llmcache/store/directory_store.h>
#include <llmcache/store/tiered_store.h>

#include <cstdlib>

#include "redis_support.h"
#include "tier_support.h"

namespace llmcache::test {
namespace {

namespace fs = std::filesystem;
using Manner = Proxy::Manner;

std::shared_ptr<RedisStore> redis_at(int port) {
  return std::make_shared<RedisStore>(
      RedisStoreOptions{.port = port, .probe_ms = 2'000, .pauses = {.first_ms = 5, .longest_ms = 20}});
}

Request asked(const char* model, std::uint64_t seed = 1) { return right_padded(model_info(model), {16, 8}, seed); }

/// What the test below does in the process that it starts: answers what the first process has answered.
void answer_in_another_process(int port) {
  for (const char* name : {kCausalModel, kEncoderModel}) {
    Module plain = load_model(name);
    LayerCache<Module> cache = cache_of(name, above(redis_at(port)));
    expect_plain_answer(cache, plain, model_info(name), asked(name));
    EXPECT_EQ(reused_tokens(cache), 24);
    EXPECT_EQ(cache.stats().tokens_computed, 0U);
    EXPECT_EQ(cache.stats().store.damaged, 0U);
  }
}

TEST(RedisTiers, AnotherProcessAnswersWithoutComputing) {
  if (const char* const port = std::getenv("LLMCACHE_REDIS_CHILD")) return answer_in_another_process(std::atoi(port));
  const RedisServer server;
  for (const char* name : {kCausalModel, kEncoderModel}) {
    LayerCache<Module> cache = cache_of(name, above(redis_at(server.port())));
    cache.forward(asked(name).inputs);
    EXPECT_EQ(cache.stats().balance.reused(), 0U);
    wait_for_store(cache);
    EXPECT_GT(cache.stats().store.writes, 0U);
  }
  const std::string command = "LLMCACHE_REDIS_CHILD=" + std::to_string(server.port()) + " '" +
                              fs::read_symlink("/proc/self/exe").string() +
                              "' --gtest_filter=RedisTiers.AnotherProcess*";
  EXPECT_EQ(std::system(command.c_str()), 0);
}

TEST(RedisTiers, AnotherCacheGeneratesTheSameTokens) {
  const RedisServer server;
  const ModelInfo info = model_info(kCausalModel);
  const Request prompt = right_padded(info, {20}, 3);
  const auto generate_from = [&](LayerCache<Module>& cache) {
    std::vector<std::int64_t> tokens;
    at::Tensor ids = prompt.ids();
    for (int i = 0; i < 6; ++i) {
      const auto logits = leaves(cache.forward({ids, at::ones_like(ids)}, {.output = Output::kLastToken}))[0];
      tokens.push_back(logits.select(1, -1).argmax(-1).item<std::int64_t>());
      ids = at::cat({ids, at::full({1, 1}, tokens.back(), ids.options())}, 1);
    }
    return tokens;
  };
  LayerCache<Module> first = cache_of(kCausalModel, above(redis_at(server.port())));
  const auto want = generate_from(first);
  wait_for_store(first);
  LayerCache<Module> second = cache_of(kCausalModel, above(redis_at(server.port())));
  EXPECT_EQ(generate_from(second), want);
  EXPECT_EQ(second.stats().store.tokens, 24U) << "20 of the prompt, and the block that generating filled";
}

/// A server that fails while requests come: every answer is the plain one.
class FailingServer : public ::testing::Test {
 protected:
  FailingServer() : plain(load_model(kCausalModel)), info(model_info(kCausalModel)) {
    LayerCache<Module> first = cache_of(kCausalModel, above(redis_at(server.port())));
    first.forward(asked(kCausalModel).inputs);
    wait_for_store(first);
  }
  [[nodiscard]] LayerCache<Module> cache_at(int port, double deadline_ms = 30) const {
    Options options = above(redis_at(port));
    options.store.deadline_ms = deadline_ms;
    return cache_of(kCausalModel, options);
  }
  /// The cache has nothing in memory, and is asked for what the server may have and for what it has not.
  void expect_plain_answers(LayerCache<Module>& cache) {
    cache.clear();
    for (const std::uint64_t seed : {1, 2, 3}) expect_plain_answer(cache, plain, info, asked(kCausalModel, seed));
  }
  /// Once the breaker has closed, what the server has is used again.
  void expect_use(LayerCache<Module>& cache) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    do {
      wait_for_store(cache);
      cache.clear();
      expect_plain_answer(cache, plain, info, asked(kCausalModel));
    } while (reused_tokens(cache) < 24 && std::chrono::steady_clock::now() < until);
    EXPECT_EQ(reused_tokens(cache), 24);
  }

  RedisServer server;
  Proxy proxy{server.port()};
  Module plain;
  const ModelInfo info;
};

TEST_F(FailingServer, Stopped) {
  LayerCache<Module> cache = cache_at(server.port());
  server.send(SIGSTOP);
  expect_plain_answers(cache);
  const StoreStats stats = cache.stats().store;
  EXPECT_EQ(stats.timeouts, 1U) << "the first request waits, the others do not";
  EXPECT_EQ(stats.failures, 2U);
  EXPECT_TRUE(stats.tiers[0].open);
  server.send(SIGCONT);
  expect_use(cache);
}

TEST_F(FailingServer, KilledAndRestarted) {
  LayerCache<Module> cache = cache_at(server.port());
  server.stop();
  expect_plain_answers(cache);
  EXPECT_GE(cache.stats().store.failures, 1U);
  server.start();
  expect_use(cache);
}

TEST_F(FailingServer, Flushed) {
  LayerCache<Module> cache = cache_at(server.port(), 5'000);
  expect_plain_answers(cache);
  wait_for_store(cache);
  EXPECT_EQ(redis_at(server.port())->erase_prefix("llmcache1:", store_deadline(10'000)), StoreOutcome::kDone);
  const auto misses = cache.stats().store.misses;
  expect_plain_answers(cache);
  EXPECT_EQ(cache.stats().store.misses, misses + 6);
  EXPECT_EQ(cache.stats().store.failures + cache.stats().store.timeouts, 0U);
  expect_use(cache);
}

TEST_F(FailingServer, Slow) {
  LayerCache<Module> cache = cache_at(proxy.port(), 50);
  proxy.delay_ms = 500;
  proxy.manner = Manner::kSlow;
  expect_plain_answers(cache);
  EXPECT_EQ(cache.stats().store.hits, 0U);
  EXPECT_GE(cache.stats().store.timeouts, 1U);
  proxy.manner = Manner::kPass;
  expect_use(cache);
}

TEST_F(FailingServer, AnsweringGarbageAndBreakingOff) {
  LayerCache<Module> cache = cache_at(proxy.port());
  proxy.garbage = "$7\r\ngarbage\r\n";
  for (const Manner manner : {Manner::kGarbage, Manner::kCut, Manner::kClose, Manner::kDrip}) {
    proxy.delay_ms = 1;
    proxy.manner = manner;
    expect_plain_answers(cache);
    proxy.manner = Manner::kPass;
    expect_use(cache);
  }
  EXPECT_GE(cache.stats().store.damaged, 1U) << "values that look like such, and are none";
}

TEST(RedisTiers, AFullServerKeepsWhatItHas) {
  const RedisServer server({"--maxmemory", "1500kb", "--maxmemory-policy", "noeviction"});
  Module plain = load_model(kCausalModel);
  LayerCache<Module> cache = cache_of(kCausalModel, above(redis_at(server.port())));
  std::uint64_t seed = 0;
  while (cache.stats().store.writes_dropped == 0 && seed < 500) {
    expect_plain_answer(cache, plain, model_info(kCausalModel), asked(kCausalModel, ++seed));
    wait_for_store(cache);
  }
  const StoreStats stats = cache.stats().store;
  EXPECT_GT(stats.writes_dropped, 0U);
  EXPECT_FALSE(stats.tiers[0].open);
  cache.clear();
  expect_plain_answer(cache, plain, model_info(kCausalModel), asked(kCausalModel, seed));
}

TEST(RedisTiers, ADirectoryInFrontServesWhileTheServerIsGone) {
  RedisServer server;
  const TemporaryFolder folder;
  const auto both = std::make_shared<TieredStore>(std::vector<std::shared_ptr<StateStore>>{
      std::make_shared<DirectoryStore>(DirectoryStoreOptions{.path = folder.path()}), redis_at(server.port())});
  Module plain = load_model(kCausalModel);
  LayerCache<Module> cache = cache_of(kCausalModel, above(both));
  cache.forward(asked(kCausalModel).inputs);
  wait_for_store(cache);
  server.stop();
  cache.clear();
  expect_plain_answer(cache, plain, model_info(kCausalModel), asked(kCausalModel));
  EXPECT_EQ(reused_tokens(cache), 24);
  expect_plain_answer(cache, plain, model_info(kCausalModel), asked(kCausalModel, 2));
}

}  // namespace
}  // namespace llmcache::test
