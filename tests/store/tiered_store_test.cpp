// Stores in order, what makes one be left alone, and work behind the answers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/store/circuit_breaker.h>
#include <llmcache/store/tiered_store.h>

#include <atomic>
#include <future>

#include "memory_store.h"
#include "store/write_queue.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;
using ::testing::Optional;

StoreDeadline soon() { return store_deadline(10'000); }

struct Two {
  std::shared_ptr<MemoryStore> front = std::make_shared<MemoryStore>();
  std::shared_ptr<MemoryStore> back = std::make_shared<MemoryStore>();
  TieredStore both{{front, back}};

  std::vector<std::optional<std::string>> get(const std::vector<std::string>& keys) {
    return both.get(keys, soon()).values;
  }
};

TEST(TieredStore, AsksInOrderAndPromotes) {
  Two two;
  two.front->set({{"a", "1"}});
  two.back->set({{"a", "other"}, {"b", "2"}});
  EXPECT_THAT(two.get({"a", "b", "c"}),
              ElementsAre(Optional(std::string("1")), Optional(std::string("2")), std::nullopt));
  two.both.flush();
  EXPECT_THAT(two.front->values(), ElementsAre(std::pair<const std::string, std::string>("a", "1"),
                                               std::pair<const std::string, std::string>("b", "2")));
  EXPECT_EQ(two.back->stats()[0].lookups, 2U) << "what the front has is not asked for";
}

TEST(TieredStore, WritesAndErasesEverywhere) {
  Two two;
  const std::vector<StoreItem> items = {{"x:a", "1"}, {"y:b", "2"}};
  EXPECT_EQ(two.both.put(items, soon()), StoreOutcome::kDone);
  EXPECT_EQ(two.front->values().size(), 2U);
  EXPECT_EQ(two.back->values().size(), 2U);
  const std::vector<std::string> keys = {"x:a", "y:b"};
  EXPECT_THAT(two.both.exists(keys, soon()), ElementsAre(true, true));
  two.back->set({{"x:a", "1"}});
  EXPECT_THAT(two.both.exists(keys, soon()), ElementsAre(true, false)) << "writing it again gives the back one too";
  EXPECT_EQ(two.both.erase({keys.data(), 1}, soon()), StoreOutcome::kDone);
  EXPECT_EQ(two.both.erase_prefix("y:", soon()), StoreOutcome::kDone);
  EXPECT_TRUE(two.front->values().empty());
  EXPECT_TRUE(two.back->values().empty());
}

TEST(TieredStore, GoesOnWithoutAStoreThatFails) {
  Two two;
  two.front->outcome = StoreOutcome::kFailed;
  two.front->put_outcome = StoreOutcome::kNoRoom;
  const StoreItem item{"a", "1"};
  EXPECT_EQ(two.both.put({&item, 1}, soon()), StoreOutcome::kDone);
  const std::string key = "a";
  const StoreValues found = two.both.get({&key, 1}, soon());
  EXPECT_THAT(found.values, ElementsAre(Optional(std::string("1"))));
  two.back->put_outcome = StoreOutcome::kFailed;
  EXPECT_EQ(two.both.put({&item, 1}, soon()), StoreOutcome::kNoRoom) << "the first reason";
  EXPECT_EQ(two.both.stats().size(), 2U);
}

TEST(TieredStore, NeedsStores) {
  EXPECT_THROW(TieredStore({}), std::invalid_argument);
  EXPECT_THROW(TieredStore({nullptr}), std::invalid_argument);
}

/// Waits for what another thread does.
template <class Condition>
bool comes_true(const Condition& condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return condition();
}

TEST(CircuitBreaker, ClosesWhenTheStoreWorksAgain) {
  std::atomic<bool> works = false;
  std::atomic<int> probes = 0;
  CircuitBreaker breaker([&] { return ++probes, works.load(); }, {.first_ms = 1, .longest_ms = 2});
  EXPECT_FALSE(breaker.open());
  breaker.trip();
  EXPECT_TRUE(breaker.open());
  EXPECT_TRUE(comes_true([&] { return probes > 2; }));
  EXPECT_TRUE(breaker.open());
  works = true;
  EXPECT_TRUE(comes_true([&] { return !breaker.open(); }));
  breaker.trip();
  EXPECT_TRUE(comes_true([&] { return !breaker.open(); }));
  EXPECT_EQ(breaker.openings(), 2U);
}

TEST(CircuitBreaker, EndsWhileItIsOpen) {
  CircuitBreaker breaker([] { return false; }, {.first_ms = 60'000, .longest_ms = 60'000});
  breaker.trip();
  breaker.trip();
  EXPECT_EQ(breaker.openings(), 1U);
}

TEST(WriteQueue, IsBoundedInBytes) {
  WriteQueue queue(100);
  std::promise<void> go;
  std::shared_future<void> gone = go.get_future().share();
  std::atomic<int> done = 0;
  const auto work = [&done, gone] {
    gone.wait();
    ++done;
  };
  EXPECT_FALSE(queue.add(work, 101));
  EXPECT_TRUE(queue.add(work, 60));
  EXPECT_TRUE(queue.add(work, 40));
  EXPECT_FALSE(queue.add(work, 1)) << "what runs counts too";
  EXPECT_EQ(queue.waiting(), 2U);
  go.set_value();
  queue.flush();
  EXPECT_EQ(done, 2);
  EXPECT_TRUE(queue.add(work, 100));
  queue.flush();
  EXPECT_EQ(done, 3);
  EXPECT_EQ(queue.waiting(), 0U);
}

}  // namespace
}  // namespace llmcache::test
