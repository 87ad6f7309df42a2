// A store in a redis-server that the test starts: what it keeps, and every way in which a server fails.
#include <future>

#include "redis_support.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Optional;
using Manner = Proxy::Manner;

/// Where it does not matter how long something takes.
StoreDeadline soon() { return store_deadline(30'000); }

RedisStoreOptions at_port(int port) {
  // A machine that is busy with other tests answers late.
  return {.port = port, .probe_ms = 2'000, .pauses = {.first_ms = 5, .longest_ms = 20}};
}

StoreOutcome put(StateStore& store, const std::string& key, const std::string& value) {
  const StoreItem item{key, value};
  return store.put({&item, 1}, soon());
}

StoreValues get(StateStore& store, const std::string& key, StoreDeadline deadline = soon()) {
  return store.get({&key, 1}, deadline);
}

bool closes(const StateStore& store) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (store.stats().at(0).open && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return !store.stats().at(0).open;
}

TEST(RedisStore, GivesWhatWasPut) {
  const RedisServer server;
  RedisStore store(at_port(server.port()));
  const std::string value("two\0\r\nparts", 11);
  const std::string large(5 << 20, 'v');
  const std::vector<StoreItem> items = {{"a", value}, {"b", ""}, {"c", large}};
  EXPECT_EQ(store.put(items, soon()), StoreOutcome::kDone);
  const std::vector<std::string> keys = {"c", "a", "none", "b"};
  const StoreValues found = store.get(keys, soon());
  EXPECT_EQ(found.outcome, StoreOutcome::kDone);
  EXPECT_TRUE(found.values[0] == large);
  EXPECT_THAT(found.values[1], Optional(value));
  EXPECT_EQ(found.values[2], std::nullopt);
  EXPECT_THAT(found.values[3], Optional(std::string()));
  EXPECT_THAT(store.exists(keys, soon()), ElementsAre(true, true, false, true));
  const TierStats stats = store.stats().at(0);
  EXPECT_EQ(stats.hits, 3U);
  EXPECT_EQ(stats.misses, 1U);
  EXPECT_EQ(stats.writes, 3U);
  EXPECT_EQ(stats.bytes_written, value.size() + large.size());
  EXPECT_EQ(stats.name, "redis 127.0.0.1:" + std::to_string(server.port()));
}

TEST(RedisStore, Erases) {
  const RedisServer server;
  RedisStore store(at_port(server.port()));
  for (int i = 0; i < 2'500; ++i) put(store, (i % 5 == 0 ? "y:" : "x:") + std::to_string(i), "v");
  EXPECT_EQ(store.erase_prefix("x:", soon()), StoreOutcome::kDone);
  std::vector<std::string> keys = {"x:1", "y:0", "y:5"};
  EXPECT_THAT(store.exists(keys, soon()), ElementsAre(false, true, true));
  EXPECT_EQ(store.erase({keys.data() + 1, 1}, soon()), StoreOutcome::kDone);
  EXPECT_THAT(store.exists(keys, soon()), ElementsAre(false, false, true));
}

TEST(RedisStore, TakesASocketADatabaseAndAPassword) {
  const RedisServer server({"--requirepass", "secret"});
  RedisStoreOptions options;
  options.unix_path = server.socket();
  options.password = "secret";
  options.database = 3;
  RedisStore store(options);
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  EXPECT_THAT(get(store, "a").values, ElementsAre(Optional(std::string("value"))));
  options.database = 0;
  options.username = "default";
  RedisStore other(options);
  EXPECT_THAT(get(other, "a").values, ElementsAre(std::nullopt)) << "it is another database";
  EXPECT_EQ(get(other, "a").outcome, StoreOutcome::kDone);
  options.password = "wrong";
  RedisStore wrong(options);
  EXPECT_EQ(get(wrong, "a").outcome, StoreOutcome::kFailed);
  EXPECT_THAT(wrong.stats()[0].last_failure, HasSubstr("WRONGPASS"));
  options.password.clear();
  RedisStore without(options);
  EXPECT_EQ(get(without, "a").outcome, StoreOutcome::kFailed);
  EXPECT_THAT(without.stats()[0].last_failure, HasSubstr("NOAUTH"));
}

TEST(RedisStore, ForgetsWhenItIsToldTo) {
  const RedisServer server;
  RedisStoreOptions options = at_port(server.port());
  options.expire_s = 1;
  RedisStore store(options);
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (get(store, "a").values[0] && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_THAT(get(store, "a").values, ElementsAre(std::nullopt));
}

TEST(RedisStore, RefusesWhatIsOutOfRange) {
  EXPECT_THROW(RedisStore({.port = 0}), std::invalid_argument);
  EXPECT_THROW(RedisStore({.database = -1}), std::invalid_argument);
  EXPECT_THROW(RedisStore({.connections = 0}), std::invalid_argument);
  EXPECT_THROW(RedisStore({.expire_s = -1}), std::invalid_argument);
  RedisStore store(RedisStoreOptions{});
  EXPECT_THROW(get(store, "no key"), std::invalid_argument);
  EXPECT_THROW(store.erase_prefix("*", soon()), std::invalid_argument);
}

TEST(RedisStore, WithoutAServerFailsAndIsLeftAlone) {
  RedisStoreOptions options = at_port(free_port());
  options.pauses = {.first_ms = 60'000, .longest_ms = 60'000};
  RedisStore store(options);
  EXPECT_EQ(get(store, "a").outcome, StoreOutcome::kFailed);
  EXPECT_EQ(get(store, "a").outcome, StoreOutcome::kRefused);
  EXPECT_EQ(put(store, "a", "value"), StoreOutcome::kRefused);
  const TierStats stats = store.stats().at(0);
  EXPECT_TRUE(stats.open);
  EXPECT_EQ(stats.failures, 1U);
  EXPECT_EQ(stats.refused, 2U);
  EXPECT_EQ(stats.misses, 0U);
}

TEST(RedisStore, AServerThatStopsCostsOneDeadline) {
  const RedisServer server;
  RedisStore store(at_port(server.port()));
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  server.send(SIGSTOP);
  EXPECT_EQ(get(store, "a", store_deadline(20)).outcome, StoreOutcome::kTimeout);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(get(store, "a", store_deadline(20)).outcome, StoreOutcome::kRefused) << "probes do not let calls through";
  }
  server.send(SIGCONT);
  ASSERT_TRUE(closes(store));
  EXPECT_THAT(get(store, "a").values, ElementsAre(Optional(std::string("value"))));
  EXPECT_EQ(store.stats()[0].timeouts, 1U);
}

TEST(RedisStore, AServerThatWasKilledIsFoundAgain) {
  RedisServer server;
  RedisStore store(at_port(server.port()));
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  server.stop();
  EXPECT_EQ(get(store, "a").outcome, StoreOutcome::kFailed);
  server.start();
  ASSERT_TRUE(closes(store));
  const StoreValues found = get(store, "a");
  EXPECT_EQ(found.outcome, StoreOutcome::kDone);
  EXPECT_EQ(found.values[0], std::nullopt);
  EXPECT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
}

TEST(RedisStore, ARestartBetweenTwoCallsIsNoFailure) {
  RedisServer server;
  RedisStore store(at_port(server.port()));
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  server.stop();
  server.start();
  EXPECT_EQ(get(store, "a").outcome, StoreOutcome::kDone) << "the idle connection was broken, a new one works";
  EXPECT_EQ(store.stats()[0].openings, 0U);
}

TEST(RedisStore, AFullServerRefusesWritesOnly) {
  const RedisServer server({"--maxmemory", "4mb", "--maxmemory-policy", "noeviction"});
  RedisStore store(at_port(server.port()));
  ASSERT_EQ(put(store, "small", "value"), StoreOutcome::kDone);
  StoreOutcome last = StoreOutcome::kDone;
  for (int i = 0; i < 8 && last == StoreOutcome::kDone; ++i) {
    last = put(store, "k" + std::to_string(i), std::string(1 << 20, 'v'));
  }
  EXPECT_EQ(last, StoreOutcome::kNoRoom);
  EXPECT_FALSE(store.stats()[0].open);
  EXPECT_THAT(store.stats()[0].last_failure, HasSubstr("OOM"));
  EXPECT_THAT(get(store, "small").values, ElementsAre(Optional(std::string("value"))));
  EXPECT_EQ(store.stats()[0].writes_failed, 1U);
}

TEST(RedisStore, AFullServerThatEvictsGoesOn) {
  const RedisServer server({"--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru"});
  RedisStore store(at_port(server.port()));
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(put(store, "k" + std::to_string(i), std::string(1 << 20, 'v')), StoreOutcome::kDone);
  }
  EXPECT_TRUE(get(store, "k19").values[0]);
  EXPECT_FALSE(get(store, "k0").values[0]);
}

TEST(RedisStore, AKeyOfAnotherTypeIsAMiss) {
  const RedisServer server;
  RedisStore store(at_port(server.port()));
  const int plain = connect_to(server.port());
  const std::string command = "LPUSH list a\r\n";
  ASSERT_EQ(::send(plain, command.data(), command.size(), 0), static_cast<ssize_t>(command.size()));
  char reply[16];
  ASSERT_GT(::recv(plain, reply, sizeof(reply), 0), 0);
  ::close(plain);
  const StoreValues found = get(store, "list");
  EXPECT_EQ(found.outcome, StoreOutcome::kDone);
  EXPECT_EQ(found.values[0], std::nullopt);
}

class BehindAProxy : public ::testing::Test {
 protected:
  BehindAProxy() { EXPECT_EQ(put(store, "a", std::string(1'000, 'v')), StoreOutcome::kDone); }

  /// The breaker has opened, and closes when what passes is right again.
  void works_again() {
    EXPECT_GT(store.stats()[0].openings, openings);
    proxy.manner = Manner::kPass;
    ASSERT_TRUE(closes(store));
    openings = store.stats()[0].openings;
    EXPECT_THAT(get(store, "a").values, ElementsAre(Optional(std::string(1'000, 'v'))));
  }

  const RedisServer server;
  Proxy proxy{server.port()};
  RedisStore store{at_port(proxy.port())};
  std::uint64_t openings = 0;  ///< so far
};

TEST_F(BehindAProxy, WhatIsSlowEndsAtTheDeadline) {
  proxy.delay_ms = 300;
  proxy.manner = Manner::kSlow;
  EXPECT_EQ(get(store, "a", store_deadline(10)).outcome, StoreOutcome::kTimeout);
  works_again();
}

TEST_F(BehindAProxy, WhatAnswersTooLateForCallsIsNotBack) {
  proxy.delay_ms = 200;  // the probe alone would wait for two seconds
  proxy.manner = Manner::kSlow;
  EXPECT_EQ(get(store, "a", store_deadline(50)).outcome, StoreOutcome::kTimeout);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (std::chrono::steady_clock::now() < until) {
    ASSERT_EQ(get(store, "a", store_deadline(50)).outcome, StoreOutcome::kRefused);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(store.stats()[0].openings, 1U);
  works_again();
}

TEST_F(BehindAProxy, WhatComesByteByByteEndsAtTheDeadline) {
  proxy.delay_ms = 5;
  proxy.manner = Manner::kDrip;
  EXPECT_EQ(get(store, "a", store_deadline(50)).outcome, StoreOutcome::kTimeout);
  works_again();
}

TEST_F(BehindAProxy, WhatIsCutIsNoAnswer) {
  for (const Manner manner : {Manner::kCut, Manner::kClose}) {
    proxy.manner = manner;
    const StoreValues found = get(store, "a");
    EXPECT_EQ(found.outcome, StoreOutcome::kFailed);
    EXPECT_THAT(found.values, Each(std::nullopt));
    works_again();
  }
}

TEST_F(BehindAProxy, GarbageIsNoAnswer) {
  const std::vector<std::string> all = {
      "HTTP/1.1 400 Bad Request\r\n\r\n",
      std::string(64, '\0'),
      ":7\r\n",
      "+OK\r\n",
      "-ERR no\r\n",
      "*2\r\n$1\r\na\r\n$1\r\nb\r\n",
      "*100000000\r\n",
      "*2147483647\r\n",
      "$-2\r\n",
      "$5\r\nabcdefgh\r\n",
      "$1\r\nv\r\n$1\r\nw\r\n",
      "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
  };
  for (const std::string& garbage : all) {
    proxy.garbage = garbage;
    proxy.manner = Manner::kGarbage;
    // Of what looks like the beginning of a value the rest is waited for.
    const StoreValues found = get(store, "a", store_deadline(500));
    EXPECT_THAT(found.outcome, AnyOf(StoreOutcome::kFailed, StoreOutcome::kTimeout)) << garbage;
    EXPECT_THAT(found.values, Each(std::nullopt)) << garbage;
    works_again();
  }
}

TEST_F(BehindAProxy, AnAnswerWithoutEndIsCutOff) {
  RedisStoreOptions options = at_port(proxy.port());
  options.max_value_bytes = 1'000;
  RedisStore small(options);
  ASSERT_TRUE(get(small, "a").values[0]);
  proxy.garbage = "$536870912\r\n" + std::string(3 << 20, 'x');
  proxy.manner = Manner::kGarbage;
  EXPECT_EQ(get(small, "a").outcome, StoreOutcome::kFailed);
  EXPECT_THAT(small.stats()[0].last_failure, HasSubstr("larger"));
  EXPECT_EQ(put(small, "b", std::string(1'001, 'v')), StoreOutcome::kNoRoom);
}

TEST(RedisStore, CallsWaitForAConnectionUpToTheirDeadline) {
  const RedisServer server;
  Proxy proxy(server.port());
  RedisStoreOptions options = at_port(proxy.port());
  options.connections = 1;
  RedisStore store(options);
  ASSERT_EQ(put(store, "a", "value"), StoreOutcome::kDone);
  proxy.delay_ms = 1'000;
  proxy.manner = Manner::kSlow;
  const auto slow = std::async(std::launch::async, [&] { return get(store, "a").outcome; });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const StoreOutcome second = get(store, "a", store_deadline(10)).outcome;
  EXPECT_EQ(second, StoreOutcome::kTimeout);
}

TEST(RedisStore, ServesManyThreadsOnFewConnections) {
  const RedisServer server;
  RedisStoreOptions options = at_port(server.port());
  options.connections = 3;
  RedisStore store(options);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const std::string key = "k" + std::to_string(t) + "." + std::to_string(i);
        EXPECT_EQ(put(store, key, key + std::string(10'000, 'v')), StoreOutcome::kDone);
        EXPECT_THAT(get(store, key).values, ElementsAre(Optional(key + std::string(10'000, 'v'))));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(store.stats()[0].hits, 400U);
  EXPECT_EQ(store.stats()[0].failures, 0U);
}

}  // namespace
}  // namespace llmcache::test
