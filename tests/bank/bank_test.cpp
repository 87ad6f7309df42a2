// OutputBank against an oracle, and the small parts that need no model: accounts, packing, comparing.
#include <atomic>
#include <list>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "bank/memory.h"
#include "bank/output_bank.h"
#include "bank/tensor_bytes.h"
#include "model/packing.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;

std::string key_of(int number) { return "key " + std::to_string(number); }

/// The only value that key `number` may have: its numbers and its size follow from it.
at::Tensor value_of(int number, std::int64_t size = 64) {
  return at::arange(number * 1000, number * 1000 + size, at::TensorOptions().dtype(at::kFloat)).view({1, -1});
}

class Bank : public ::testing::Test {
 protected:
  static void expect_value(const OutputEntry& entry, int number, std::int64_t size = 64) {
    ASSERT_EQ(entry.key(), key_of(number));
    ASSERT_EQ(entry.tensors().size(), 1U);
    ASSERT_TRUE(at::equal(entry.tensors()[0], value_of(number, size))) << "key " << number;
  }
};

TEST_F(Bank, EveryCapacityHolds) {
  for (std::size_t capacity = 0; capacity < 3000; capacity += 37) {
    OutputBank bank(capacity);
    for (int i = 0; i < 6; ++i) {
      bank.insert(key_of(i), {value_of(i)}, true);
      ASSERT_LE(bank.counters().bytes, capacity);
      if (const auto entry = bank.find(key_of(i), true)) expect_value(*entry, i);
    }
    ASSERT_LE(bank.counters().peak_bytes, capacity);
    bank.clear();
    ASSERT_EQ(bank.counters().bytes, 0U) << "capacity " << capacity;
  }
}

TEST_F(Bank, InsertAndFind) {
  OutputBank bank(1 << 20);
  bank.insert(key_of(1), {value_of(1)}, true);
  bank.insert(key_of(2), {value_of(2)}, false);
  expect_value(*bank.find(key_of(1), true), 1);
  expect_value(*bank.find(key_of(2), false), 2);
  EXPECT_EQ(bank.find(key_of(2), true), nullptr) << "not exact";
  EXPECT_EQ(bank.find(key_of(3), false), nullptr);
  EXPECT_EQ(bank.find("key", false), nullptr) << "a prefix";
  EXPECT_EQ(bank.counters().entries, 2U);
}

TEST_F(Bank, KeysOfAnyBytes) {
  OutputBank bank(1 << 20);
  const std::vector<std::string> keys{"",
                                      std::string(1, '\0'),
                                      std::string(2, '\0'),
                                      std::string("a\0b", 3),
                                      std::string("a\0c", 3),
                                      std::string(5000, 'x'),
                                      std::string(5001, 'x')};
  for (int i = 0; i < static_cast<int>(keys.size()); ++i)
    bank.insert(keys[static_cast<std::size_t>(i)], {value_of(i)}, true);
  for (int i = 0; i < static_cast<int>(keys.size()); ++i) {
    const auto entry = bank.find(keys[static_cast<std::size_t>(i)], true);
    ASSERT_NE(entry, nullptr);
    EXPECT_TRUE(at::equal(entry->tensors()[0], value_of(i)));
  }
}

TEST_F(Bank, KeepsCopies) {
  OutputBank bank(1 << 20);
  auto value = value_of(1);
  bank.insert(key_of(1), {value}, true);
  value.zero_();
  expect_value(*bank.find(key_of(1), true), 1);
}

TEST_F(Bank, KeepsOnlyWhatAViewShows) {
  OutputBank bank(16 << 10);
  const auto large = at::zeros({1000, 1000});
  bank.insert(key_of(1), {large.narrow(0, 0, 1).narrow(1, 0, 64)}, true);
  ASSERT_NE(bank.find(key_of(1), true), nullptr);
  EXPECT_LT(bank.counters().bytes, 2000U);
  EXPECT_EQ(bank.find(key_of(1), true)->tensors()[0].storage().nbytes(), 256U);
}

TEST_F(Bank, KeepsWhatNobodyElseHoldsAsItIs) {
  OutputBank bank(1 << 20);
  const auto value = value_of(1);
  const auto copied = value_of(2);
  bank.insert(key_of(1), {value, copied}, true, {}, {1, 0});
  const auto entry = bank.find(key_of(1), true);
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->tensors()[0].const_data_ptr(), value.const_data_ptr());
  EXPECT_NE(entry->tensors()[1].const_data_ptr(), copied.const_data_ptr());
  EXPECT_TRUE(at::equal(entry->tensors()[1], copied));
  OutputBank other(1 << 20);
  other.insert(key_of(1), {value, copied}, true);
  EXPECT_EQ(bank.counters().bytes, other.counters().bytes);
}

TEST(TensorBytes, WhoOwnsItsMemory) {
  const c10::NoGradGuard no_grad;
  const auto fresh = [] { return at::ones({3, 4}); };
  EXPECT_TRUE(owns_memory(fresh()));
  // What they are views of is gone when they are asked.
  const auto turned = [&] { return fresh().transpose(0, 1); };
  const auto twice = [&] { return fresh().view({2, 6}).unflatten(1, {3, 2}); };
  EXPECT_TRUE(owns_memory(turned()));
  EXPECT_TRUE(owns_memory(twice()));
  EXPECT_FALSE(owns_memory(at::Tensor()));
  EXPECT_FALSE(owns_memory(fresh().narrow(0, 0, 2))) << "a part";
  EXPECT_FALSE(owns_memory(fresh().narrow(0, 0, 1).expand({3, 4}))) << "of as many numbers, but not its own";
  EXPECT_FALSE(owns_memory(at::ones({6, 8}).slice(0, 0, 6, 2).slice(1, 0, 8, 2)));
  EXPECT_FALSE(owns_memory(fresh().to_sparse()));
  const auto held = fresh();
  const at::Tensor same = held;  // NOLINT(performance-unnecessary-copy-initialization)
  EXPECT_FALSE(owns_memory(same)) << "held twice";
  EXPECT_FALSE(owns_memory(held.transpose(0, 1)));
  EXPECT_FALSE(owns_memory(held.detach()));
  EXPECT_FALSE(owns_memory(held.variable_data()));
  EXPECT_FALSE(owns_memory(held.unflatten(0, {3, 1}).flatten(0, 1)));
}

TEST_F(Bank, TheFirstOfAKeyStaysUnlessABetterOneComes) {
  OutputBank bank(1 << 20);
  bank.insert("k", {value_of(1)}, false);
  bank.insert("k", {value_of(2)}, false);
  EXPECT_TRUE(at::equal(bank.find("k", false)->tensors()[0], value_of(1)));
  bank.insert("k", {value_of(3)}, true);
  EXPECT_TRUE(at::equal(bank.find("k", true)->tensors()[0], value_of(3)));
  bank.insert("k", {value_of(4)}, true);
  bank.insert("k", {value_of(5)}, false);
  EXPECT_TRUE(at::equal(bank.find("k", false)->tensors()[0], value_of(3)));
  EXPECT_EQ(bank.counters().entries, 1U);
  EXPECT_EQ(bank.counters().insertions, 2U);
}

TEST_F(Bank, RandomWorkloadAgreesWithAnOracle) {
  // The oracle knows what may be held, in order of use; how many went is read from the counters.
  constexpr std::size_t kCapacity = 40 << 10;
  constexpr int kKeys = 150;
  OutputBank bank(kCapacity);
  std::list<int> recency;  // most recently used first
  std::mt19937 random(3);
  const auto up_to = [&](int n) { return std::uniform_int_distribution<int>(0, n)(random); };
  const auto size_of = [](int number) { return std::int64_t{16} + number % 7 * 40; };
  const auto use = [&](int number) {
    recency.remove(number);
    recency.push_front(number);
  };
  const auto holds = [&](int number) { return std::find(recency.begin(), recency.end(), number) != recency.end(); };
  for (int step = 0; step < 6000; ++step) {
    const int number = up_to(kKeys - 1);
    const int action = up_to(999);
    if (action < 450) {
      const auto entry = bank.find(key_of(number), true);
      ASSERT_EQ(entry != nullptr, holds(number)) << "key " << number << ", step " << step;
      if (entry) {
        expect_value(*entry, number, size_of(number));
        use(number);
      }
    } else if (action < 998) {
      const auto before = bank.counters();
      bank.insert(key_of(number), {value_of(number, size_of(number))}, true);
      const auto after = bank.counters();
      ASSERT_EQ(after.insertions - before.insertions, holds(number) ? 0U : 1U);
      ASSERT_EQ(after.rejected, 0U);
      for (auto gone = before.evictions; gone < after.evictions; ++gone) {
        ASSERT_FALSE(recency.empty());
        recency.pop_back();
      }
      if (after.insertions > before.insertions) use(number);
    } else {
      bank.clear();
      recency.clear();
      ASSERT_EQ(bank.counters().bytes, 0U);
    }
    const auto counters = bank.counters();
    ASSERT_LE(counters.bytes, kCapacity);
    ASSERT_LE(counters.peak_bytes, kCapacity);
    ASSERT_EQ(counters.entries, recency.size());
    if (step % 100 != 0) continue;
    // All that is held, counted without the bank's help.
    std::size_t tensors = 0;
    for (const int held : std::list<int>(recency.rbegin(), recency.rend())) {
      const auto entry = bank.find(key_of(held), true);
      ASSERT_NE(entry, nullptr);
      tensors += entry->tensors()[0].storage().nbytes() + entry->key().size();
    }
    ASSERT_GE(counters.bytes, tensors);
    ASSERT_LE(counters.bytes, tensors + 600 * recency.size() + 4096);
  }
  EXPECT_GT(bank.counters().evictions, 500U);
  EXPECT_GT(bank.counters().peak_bytes, kCapacity * 9 / 10);
}

TEST_F(Bank, ManyKeysNeverLie) {
  OutputBank bank(64 << 20);
  std::string base(24, 'k');
  for (int i = 0; i < 20000; ++i) {
    std::memcpy(base.data() + 8, &i, sizeof(i));
    bank.insert(base, {at::full({1}, i, at::kInt)}, true);
  }
  EXPECT_EQ(bank.counters().entries, 20000U);
  for (int i = 0; i < 20000; ++i) {
    std::memcpy(base.data() + 8, &i, sizeof(i));
    ASSERT_EQ(bank.find(base, true)->tensors()[0].item<int>(), i);
  }
}

TEST(ThreadsOnABank, InsertFindEvictAndClear) {
  constexpr std::size_t kCapacity = 16 << 10;
  OutputBank bank(kCapacity);
  std::atomic<int> wrong{0};
  std::atomic<int> found{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 800; ++step) {
      const int number = static_cast<int>(random() % 40);
      if (random() % 200 == 0) bank.clear();
      if (random() % 2 == 0) {
        bank.insert(key_of(number), {value_of(number)}, random() % 2 == 0);
      } else if (const auto entry = bank.find(key_of(number), false)) {
        ++found;
        if (entry->key() != key_of(number) || !at::equal(entry->tensors()[0], value_of(number))) ++wrong;
      }
      if (bank.counters().bytes > kCapacity) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) threads.emplace_back(work, t);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(found, 100);
  EXPECT_LE(bank.counters().peak_bytes, kCapacity);
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U) << "nothing is counted twice or forgotten";
}

TEST(BankMemory, AccountNeverPassesItsLimit) {
  MemoryAccount account(100);
  EXPECT_TRUE(account.try_reserve(60));
  EXPECT_FALSE(account.try_reserve(41));
  EXPECT_EQ(account.used(), 60U);
  EXPECT_FALSE(account.try_reserve(SIZE_MAX)) << "no overflow";
  EXPECT_TRUE(account.try_reserve(40));
  EXPECT_TRUE(account.try_reserve(0));
  account.release(100);
  EXPECT_EQ(account.used(), 0U);
  EXPECT_EQ(account.peak(), 100U);
}

// --- packing ----------------------------------------------------------------------------------------

/// Rows of 2 and 3 tokens (the second padded on the left) of a batch of 3 x 5; row 1 is padding.
PackedLayout small_layout() {
  PackedLayout layout;
  layout.batch = 3;
  layout.padded_length = 5;
  layout.rows = 5;
  layout.sequences = {{0, 0, 2, 0, 2, {}}, {2, 1, 3, 2, 3, {}}};
  layout.position = at::tensor({0, 1, 1, 2, 3}, at::kLong);
  layout.flat_index = at::tensor({0, 1, 11, 12, 13}, at::kLong);
  return layout;
}

TEST(BankPacking, PackAndUnpack) {
  const auto layout = small_layout();
  const auto all = at::arange(3 * 5 * 2, at::kFloat).view({3, 5, 2});
  const auto packed = pack_rows(all, {0, 1, -1}, layout);
  EXPECT_THAT(packed.sizes().vec(), ElementsAre(1, 5, 2));
  EXPECT_TRUE(at::equal(packed[0][2], all[2][1]));
  auto want = at::zeros_like(all);
  want[0].narrow(0, 0, 2).copy_(all[0].narrow(0, 0, 2));
  want[2].narrow(0, 1, 3).copy_(all[2].narrow(0, 1, 3));
  EXPECT_TRUE(at::equal(unpack_rows(packed, {0, 1, -1}, layout), want));
  // Other places for the dimensions, merged ones, and values that all rows of the batch share.
  const auto heads = all.permute({2, 1, 0}).contiguous();
  EXPECT_TRUE(
      at::equal(unpack_rows(pack_rows(heads, {2, 1, -1}, layout), {2, 1, -1}, layout), want.permute({2, 1, 0})));
  const auto merged = all.view({15, 2});
  EXPECT_TRUE(at::equal(unpack_rows(pack_rows(merged, {-1, -1, 0}, layout), {-1, -1, 0}, layout), want.view({15, 2})));
  EXPECT_TRUE(at::equal(pack_rows(all[1], {-1, 0, -1}, layout), all[1].index_select(0, layout.position)));
}

TEST(BankPacking, NearlyEqual) {
  const auto a = at::tensor({1.0F, 100.0F});
  EXPECT_TRUE(nearly_equal(a, a));
  EXPECT_TRUE(nearly_equal(a + 1e-3, a)) << "against the largest magnitude";
  EXPECT_FALSE(nearly_equal(a + 1.0, a));
  EXPECT_FALSE(nearly_equal(a, a.to(at::kDouble)));
  EXPECT_FALSE(nearly_equal(a, at::tensor({1.0F, 100.0F, 1.0F})));
  const auto nan = at::tensor({std::nanf(""), 100.0F});
  EXPECT_TRUE(nearly_equal(nan, nan));
  EXPECT_FALSE(nearly_equal(nan, a));
  EXPECT_FALSE(nearly_equal(a, nan));
  const auto infinite = at::tensor({1.0F, std::numeric_limits<float>::infinity()});
  EXPECT_TRUE(nearly_equal(infinite, infinite));
  EXPECT_FALSE(nearly_equal(infinite, a));
  EXPECT_FALSE(nearly_equal(infinite, -infinite));
  EXPECT_FALSE(nearly_equal(at::tensor({1, 2}), at::tensor({1, 3})));
  EXPECT_TRUE(nearly_equal(at::zeros({0}), at::zeros({0})));
}

}  // namespace
}  // namespace llmcache::test
