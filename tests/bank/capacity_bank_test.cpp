// What all banks have in common, through a small adapter for each: entries by number, each of some tokens, whose states
// all hold that number.
#include "bank/capacity_bank.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "bank/layer_bank.h"
#include "bank/output_bank.h"
#include "bank/prefix_bank.h"
#include "bank/segment_bank.h"
#include "bank/token_bank.h"
#include "every_allocation.h"
#include "match/size_class.h"

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;

constexpr std::int64_t kTokens = 32;
/// Data of an entry of kTokens tokens: eight float32 each, whatever the bank.
constexpr std::size_t kEntryBytes = kTokens * 8 * sizeof(float);

/// No two numbers have a token in common.
Tokens tokens_of(int number, std::int64_t count = kTokens) {
  Tokens tokens;
  for (std::int64_t t = 0; t < count; ++t) tokens.push_back(100000 * std::int64_t{number} + t);
  return tokens;
}

bool all_are(const at::Tensor& states, int number) {
  return states.numel() > 0 && at::equal(states, at::full_like(states, number));
}

/// Holds an entry while it lives; true if its content is right.
using Reader = std::function<bool()>;

// Each adapter has prepared(): what a pass computes, as the step by which the bank takes it over; and read(): null if
// the entry is not found.

class Outputs {
 public:
  explicit Outputs(std::size_t capacity, MemoryAccount* total = nullptr) : bank(capacity, total) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens) {
    return [this, key = key_of(number), tensors = std::vector{at::full({1, count, 8}, number, at::kFloat)}] {
      bank.insert(key, tensors, true);
    };
  }
  Reader read(int number) {
    auto entry = bank.find(key_of(number), true);
    if (!entry) return nullptr;
    return [entry, number] { return all_are(entry->tensors()[0], number); };
  }

  OutputBank bank;

 private:
  static std::string key_of(int number) { return "the key of number " + std::to_string(number); }
};

class Prefixes {
 public:
  explicit Prefixes(std::size_t capacity, MemoryAccount* total = nullptr)
      : bank({.capacity_bytes = capacity, .eviction = {}, .specs = {{{1, 1, 8}, 1, at::kFloat}}, .total = total}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens) {
    auto tokens = tokens_of(number, count);
    auto lease = std::make_shared<PrefixLease>(bank.find("p", tokens, 0));
    auto ranges = lease->known();
    bank.reserve(*lease, nullptr, count - lease->known_tokens(), 0, size_class(count));
    for (const KeyRange& range : lease->reserved()) {
      range.block->tensor(0).narrow(1, range.offset, range.tokens).fill_(number);
      ranges.push_back(range);
    }
    return [this, lease, tokens, ranges] { bank.commit(*lease, "p", tokens, ranges, 1, 0); };
  }
  Reader read(int number) {
    auto lease = std::make_shared<PrefixLease>(bank.find("p", tokens_of(number), 0));
    if (lease->known_tokens() == 0) return nullptr;
    return [lease, number] {
      return lease->known_tokens() == kTokens && std::ranges::all_of(lease->known(), [&](const KeyRange& range) {
               return all_are(range.block->tensor(0).narrow(1, range.offset, range.tokens), number);
             });
    };
  }

  PrefixBank bank;
};

class Layers {
 public:
  explicit Layers(std::size_t capacity, MemoryAccount* total = nullptr)
      : fingerprinter_({.kind = FingerprintKind::kRaw}, 8),
        bank({.capacity_bytes = capacity, .eviction = {}, .total = total}, {&fingerprinter_}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens) {
    LayerBank::Candidate candidate;
    candidate.number = static_cast<std::uint64_t>(number);
    candidate.key = candidate.number + 1;
    candidate.hidden = at::full({1, count, 8}, number, at::kFloat);
    candidate.inputs = {at::tensor(tokens_of(number, count))};
    candidate.states = {state_of(number)};
    candidate.fingerprints = {fingerprinter_.make(candidate.states[0], {})};
    return [this, candidate] { bank.insert("p", candidate, 0); };
  }
  Reader read(int number) {
    const auto hit = bank.find("p", 0, fingerprinter_.make(state_of(number), {}).value(), 0.9999, 0);
    if (!hit) return nullptr;
    return [entry = hit->entry, number] { return all_are(entry->hidden(), number); };
  }

 private:
  static std::vector<float> state_of(int number) {
    std::mt19937 random(static_cast<unsigned>(number));
    std::vector<float> state(8);
    for (float& value : state) value = static_cast<float>(random() % 2000) - 1000;
    return state;
  }
  Fingerprinter fingerprinter_;

 public:
  LayerBank bank;
};

class TokenStates {
 public:
  explicit TokenStates(std::size_t capacity, MemoryAccount* total = nullptr) : bank(settings(capacity, total)) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens) {
    auto reserved = bank.reserve(count);
    for (std::size_t i = 0; reserved && i < 3; ++i) reserved->tensor(i).fill_(number);
    const auto pending = std::make_shared<std::unique_ptr<PendingEntry>>(std::move(reserved));
    return [this, pending, tokens = tokens_of(number, count)] {
      bank.keep("p", {tokens, 1}, std::move(*pending), 1, 0);
    };
  }
  Reader read(int number) {
    const auto tokens = tokens_of(number);
    const auto found = bank.find("p", {tokens, 1}, 0);
    if (!found) return nullptr;
    return [entry = found->entry, number] {
      return all_are(entry->hidden(1), number) && all_are(entry->keys(0, 0, 0), number);
    };
  }

  TokenBank bank;

 private:
  static TokenBank::Settings settings(std::size_t capacity, MemoryAccount* total) {
    TokenBank::Settings settings;
    settings.capacity_bytes = capacity;
    settings.total = total;
    settings.layout.specs = {{{4}, at::kFloat}, {{2}, at::kFloat}, {{2}, at::kFloat}};
    settings.layout.first_key = {{0}};
    settings.layout.hidden = {1, 2};
    return settings;
  }
};

class Segments {
 public:
  explicit Segments(std::size_t capacity, MemoryAccount* total = nullptr)
      : bank({.capacity_bytes = capacity, .eviction = {}, .specs = {{{1, 1, 8}, 1, at::kFloat}}, .total = total}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens) {
    const auto room = std::make_shared<SegmentBank::Room>(bank.reserve("p", tokens_of(number, count)));
    if (room->pending) room->pending->set(0, at::full({1, count, 8}, number, at::kFloat));
    return [this, room] { bank.insert(std::move(*room), 1, 0); };
  }
  Reader read(int number) {
    const auto hits = bank.find("p", tokens_of(number), {}, 0);
    if (hits.empty()) return nullptr;
    return [hits, number] {
      return hits.size() == 1 && hits[0].tokens == kTokens && all_are(hits[0].donor->state(0, 0, kTokens), number);
    };
  }

  SegmentBank bank;
};

template <typename Adapter>
class EveryBank : public ::testing::Test {
 protected:
  static void insert(Adapter& adapter, int number, std::int64_t count = kTokens) { adapter.prepared(number, count)(); }
  static bool holds(Adapter& adapter, int number) {
    const Reader reader = adapter.read(number);
    EXPECT_TRUE(!reader || reader()) << number;
    return reader != nullptr;
  }
  static BankCounters counters(const Adapter& adapter) { return adapter.bank.counters(); }
};

struct Names {
  template <typename Adapter>
  static std::string GetName(int /*number*/) {
    if (std::is_same_v<Adapter, Outputs>) return "Output";
    if (std::is_same_v<Adapter, Prefixes>) return "Prefix";
    if (std::is_same_v<Adapter, Layers>) return "Layer";
    return std::is_same_v<Adapter, TokenStates> ? "Token" : "Segment";
  }
};
using Banks = ::testing::Types<Outputs, Prefixes, Layers, TokenStates, Segments>;
TYPED_TEST_SUITE(EveryBank, Banks, Names);

TYPED_TEST(EveryBank, EmptyTakesNothing) {
  TypeParam adapter(1000);
  EXPECT_EQ(adapter.bank.capacity(), 1000U);
  EXPECT_FALSE(this->holds(adapter, 1));
  adapter.bank.clear();
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, 0U);
  EXPECT_EQ(counters.bytes, 0U);
  EXPECT_EQ(counters.peak_bytes, 0U);
}

TYPED_TEST(EveryBank, FindsWhatItKeeps) {
  TypeParam adapter(1 << 20);
  for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
  this->insert(adapter, 2);
  for (int number = 1; number <= 3; ++number) EXPECT_TRUE(this->holds(adapter, number)) << number;
  EXPECT_FALSE(this->holds(adapter, 4));
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, 3U) << "nothing is kept twice";
  EXPECT_EQ(counters.insertions, 3U);
  EXPECT_EQ(counters.evictions + counters.rejected, 0U);
  EXPECT_GE(counters.bytes, 3 * kEntryBytes);
  EXPECT_GE(counters.peak_bytes, counters.bytes);
}

TYPED_TEST(EveryBank, CapacityHoldsIndexIncluded) {
  for (std::size_t capacity = 0; capacity < 12 * kEntryBytes; capacity += 173) {
    SCOPED_TRACE(capacity);
    MemoryAccount total(capacity);
    TypeParam adapter(capacity, &total);
    for (int number = 1; number <= 12; ++number) {
      this->insert(adapter, number);
      const BankCounters counters = this->counters(adapter);
      ASSERT_LE(counters.bytes, capacity);
      ASSERT_LE(counters.peak_bytes, capacity);
      ASSERT_GE(counters.bytes, counters.entries * kEntryBytes);
      ASSERT_EQ(counters.insertions + counters.rejected, static_cast<std::uint64_t>(number));
      ASSERT_EQ(total.used(), counters.bytes);
      ASSERT_EQ(total.peak(), counters.peak_bytes);
      this->holds(adapter, number);
    }
    EXPECT_TRUE(capacity >= kEntryBytes || this->counters(adapter).rejected == 12U);
    adapter.bank.clear();
    ASSERT_EQ(this->counters(adapter).bytes, 0U);
  }
}

TYPED_TEST(EveryBank, LeastRecentlyUsedGoesFirst) {
  TypeParam adapter(64 << 10);
  std::vector<int> order;  // least recently used first
  std::mt19937 random(5);
  for (int number = 1; number <= 150; ++number) {
    for (int uses = static_cast<int>(random() % 3); uses > 0 && !order.empty(); --uses) {
      const auto used = order.begin() + static_cast<std::ptrdiff_t>(random() % order.size());
      ASSERT_TRUE(this->holds(adapter, *used));
      std::rotate(used, used + 1, order.end());
    }
    const auto before = this->counters(adapter).evictions;
    this->insert(adapter, number);
    const auto evicted = this->counters(adapter).evictions - before;
    ASSERT_LE(evicted, order.size());
    const std::vector<int> gone(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(evicted));
    order.erase(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(evicted));
    order.push_back(number);
    for (const int old : gone) ASSERT_FALSE(this->holds(adapter, old)) << old;
    for (const int held : order) ASSERT_TRUE(this->holds(adapter, held)) << held;
  }
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.entries, order.size());
  EXPECT_EQ(counters.insertions, 150U);
  EXPECT_EQ(counters.evictions, 150U - order.size());
  EXPECT_EQ(counters.rejected, 0U);
  EXPECT_GT(order.size(), 5U);
  EXPECT_LT(order.size(), 70U);
}

TYPED_TEST(EveryBank, TooLargeIsRejectedWithoutEvicting) {
  TypeParam adapter(64 << 10);
  for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
  this->insert(adapter, 9, 4000);
  const BankCounters counters = this->counters(adapter);
  EXPECT_EQ(counters.rejected, 1U);
  EXPECT_EQ(counters.evictions, 0U);
  EXPECT_EQ(counters.entries, 3U);
  for (int number = 1; number <= 3; ++number) EXPECT_TRUE(this->holds(adapter, number)) << number;
  EXPECT_FALSE(this->holds(adapter, 9));
}

TYPED_TEST(EveryBank, ClearForgetsAndReleasesButCountsOn) {
  TypeParam adapter(32 << 10);
  for (int round = 1; round <= 3; ++round) {
    for (int number = 1; number <= 20; ++number) this->insert(adapter, number);
    const BankCounters before = this->counters(adapter);
    adapter.bank.clear();
    const BankCounters after = this->counters(adapter);
    EXPECT_EQ(after.entries, 0U);
    EXPECT_EQ(after.bytes, 0U);
    EXPECT_EQ(after.insertions, static_cast<std::uint64_t>(20 * round));
    EXPECT_EQ(after.evictions, before.evictions) << "what is cleared is not evicted";
    EXPECT_EQ(after.peak_bytes, before.peak_bytes);
    for (int number = 1; number <= 20; ++number) EXPECT_FALSE(this->holds(adapter, number)) << number;
  }
}

TYPED_TEST(EveryBank, PeakOfTheTotalIsTheMostAtOnce) {
  MemoryAccount total(128 << 10);
  TypeParam a(64 << 10, &total);
  TypeParam b(64 << 10, &total);
  for (int number = 1; number <= 8; ++number) this->insert(a, number);
  a.bank.clear();
  this->insert(b, 1);
  EXPECT_EQ(total.used(), this->counters(b).bytes);
  EXPECT_EQ(total.peak(), this->counters(a).peak_bytes) << "not the sum of peaks at different moments";
  for (int number = 1; number <= 8; ++number) this->insert(a, number);
  EXPECT_EQ(total.used(), this->counters(a).bytes + this->counters(b).bytes);
  EXPECT_GT(total.peak(), this->counters(a).peak_bytes);
  EXPECT_LE(total.peak(), this->counters(a).peak_bytes + this->counters(b).peak_bytes);
}

TYPED_TEST(EveryBank, AnEntryCountsUntilItsReadersAreDone) {
  TypeParam adapter(64 << 10);
  this->insert(adapter, 1);
  auto reader = adapter.read(1);
  ASSERT_TRUE(reader);
  for (int number = 2; number <= 100; ++number) {
    this->insert(adapter, number);
    ASSERT_LE(this->counters(adapter).peak_bytes, std::size_t{64} << 10);
  }
  adapter.bank.clear();
  EXPECT_FALSE(this->holds(adapter, 1));
  EXPECT_TRUE(reader());
  EXPECT_GE(this->counters(adapter).bytes, kEntryBytes) << "it still takes memory";
  reader = nullptr;
  EXPECT_EQ(this->counters(adapter).bytes, 0U);
}

TYPED_TEST(EveryBank, FailedAllocationsLeaveNothingHalfDone) {
  for (const std::size_t capacity : {std::size_t{1} << 20, std::size_t{24} << 10}) {
    TypeParam adapter(capacity);
    std::uint64_t turns = 3;
    for (int number = 1; number <= 3; ++number) this->insert(adapter, number);
    std::function<void()> keep = adapter.prepared(static_cast<int>(++turns));
    at_every_allocation([&] { keep(); },
                        [&](bool threw) {
                          EXPECT_FALSE(threw);
                          const BankCounters counters = this->counters(adapter);
                          EXPECT_EQ(counters.insertions + counters.rejected, turns);
                          EXPECT_EQ(counters.insertions - counters.evictions, counters.entries);
                          EXPECT_LE(counters.peak_bytes, capacity);
                          std::uint64_t held = 0;
                          for (int number = 1; number <= static_cast<int>(turns); ++number)
                            held += this->holds(adapter, number) ? 1 : 0;
                          EXPECT_EQ(held, counters.entries);
                          keep = adapter.prepared(static_cast<int>(++turns));
                        });
    EXPECT_TRUE(this->holds(adapter, static_cast<int>(turns - 1))) << "the last one had all its memory";
    keep = nullptr;
    adapter.bank.clear();
    EXPECT_EQ(this->counters(adapter).bytes, 0U);
  }
}

TYPED_TEST(EveryBank, ThreadsInsertFindEvictAndClear) {
  constexpr std::size_t kCapacity = 48 << 10;
  TypeParam adapter(kCapacity);
  std::atomic<int> wrong{0};
  std::atomic<int> found{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 400; ++step) {
      const int number = 1 + static_cast<int>(random() % 30);
      if (random() % 100 == 0) adapter.bank.clear();
      if (random() % 2 == 0) {
        this->insert(adapter, number);
      } else if (this->holds(adapter, number)) {
        ++found;
      }
      if (this->counters(adapter).bytes > kCapacity) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, seed);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(found, 50);
  EXPECT_LE(this->counters(adapter).peak_bytes, kCapacity);
  adapter.bank.clear();
  EXPECT_EQ(this->counters(adapter).bytes, 0U) << "nothing is counted twice or forgotten";
}

}  // namespace
}  // namespace llmcache::test
