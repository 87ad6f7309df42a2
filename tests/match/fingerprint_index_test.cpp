// FingerprintIndex against a plain scan; limits of memory; bad input.
#include "llmcache/match/fingerprint_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory_resource>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "llmcache/error.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;
using Match = FingerprintIndex::Match;

constexpr double kTaus[] = {-1, -0.5, 0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1};

/// Counts what is held, and refuses what goes beyond a limit.
class LimitedMemory final : public std::pmr::memory_resource {
 public:
  explicit LimitedMemory(std::size_t limit = std::numeric_limits<std::size_t>::max()) : limit_(limit) {}
  void set_limit(std::size_t limit) { limit_ = limit; }
  /// Refuses allocation number `count` from now on, and all after it.
  void fail_after(std::size_t count) { left_ = count; }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (left_ == 0 || bytes > limit_ - std::min(limit_, used_)) throw std::bad_alloc();
    --left_;
    used_ += bytes;
    return ::operator new (bytes, std::align_val_t{alignment});
  }
  void do_deallocate(void* pointer, std::size_t bytes, std::size_t alignment) override {
    used_ -= bytes;
    ::operator delete (pointer, std::align_val_t{alignment});
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  std::size_t limit_;
  std::size_t used_ = 0;
  std::size_t left_ = std::numeric_limits<std::size_t>::max();
};

/// Every entry compared, in the order of the ids.
class PlainScan {
 public:
  explicit PlainScan(FingerprintKind kind) : kind_(kind) {}
  std::optional<Match> best(const Fingerprint& query, double tau) const {
    std::optional<Match> found;
    for (const auto& [id, fingerprint] : entries) {
      const double value = similarity(kind_, query, fingerprint);
      if (value >= tau && (!found || value > found->similarity)) found = Match{id, value};
    }
    return found;
  }
  std::map<std::uint32_t, Fingerprint> entries;

 private:
  FingerprintKind kind_;
};

void expect_equal(const std::optional<Match>& found, const std::optional<Match>& wanted) {
  ASSERT_EQ(found.has_value(), wanted.has_value()) << (wanted ? wanted->similarity : -2);
  if (!found) return;
  EXPECT_EQ(found->id, wanted->id);
  EXPECT_EQ(found->similarity, wanted->similarity);
}

class FingerprintIndexTest : public ::testing::TestWithParam<FingerprintKind> {
 protected:
  FingerprintKind kind() const { return GetParam(); }

  Fingerprint random_fingerprint() {
    Fingerprint result;
    if (kind() == FingerprintKind::kJaccard) {
      std::vector<std::int64_t> ids(5 + engine_() % 40);
      for (auto& id : ids) id = static_cast<std::int64_t>(engine_() % 12);
      return *Fingerprinter({.kind = kind(), .shingle = 2}, 0).make({}, ids);
    }
    if (const int bits = simhash_bits(kind())) {
      result.bits.resize(static_cast<std::size_t>(bits) / 64);
      for (auto& word : result.bits) word = engine_();
      return result;
    }
    result.vector.resize(kDims);
    std::normal_distribution<float> normal;
    for (float& value : result.vector) value = normal(engine_);
    return normalised(result);
  }
  /// Another one that is `share` of the way to something random.
  Fingerprint changed(const Fingerprint& from, double share) {
    Fingerprint result = from;
    std::bernoulli_distribution change(share);
    for (auto& word : result.bits) {
      for (int bit = 0; bit < 64; ++bit) word ^= std::uint64_t{change(engine_)} << bit;
    }
    for (auto& hash : result.shingles) {
      if (change(engine_)) hash = engine_();
    }
    std::ranges::sort(result.shingles);
    std::normal_distribution<float> normal(0, static_cast<float>(share / std::sqrt(double{kDims})));
    for (float& value : result.vector) value += normal(engine_);
    return result.vector.empty() ? result : normalised(result);
  }
  static Fingerprint normalised(Fingerprint fingerprint) {
    auto& values = fingerprint.vector;
    const float length = std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0F));
    for (float& value : values) value /= length;
    return fingerprint;
  }

  static constexpr std::size_t kDims = 24;
  std::mt19937_64 engine_{77};
};

INSTANTIATE_TEST_SUITE_P(Kinds, FingerprintIndexTest,
                         ::testing::Values(FingerprintKind::kRaw, FingerprintKind::kPca, FingerprintKind::kSimHash64,
                                           FingerprintKind::kSimHash128, FingerprintKind::kSimHash256,
                                           FingerprintKind::kJaccard),
                         [](const auto& kind) { return std::string(to_string(kind.param)); });

TEST_P(FingerprintIndexTest, EmptyFindsNothing) {
  LimitedMemory memory(0);
  FingerprintIndex index(kind(), &memory);
  EXPECT_EQ(index.size(), 0U);
  EXPECT_FALSE(index.best(random_fingerprint(), -1));
  index.erase(0);
  index.erase(1234567);
  index.clear();
  EXPECT_THROW(index.insert(0, random_fingerprint()), std::bad_alloc);
  EXPECT_EQ(index.size(), 0U);
  EXPECT_FALSE(index.best(random_fingerprint(), -1));
  EXPECT_EQ(memory.used(), 0U);
}

TEST_P(FingerprintIndexTest, FindsWhatIsThere) {
  FingerprintIndex index(kind());
  const Fingerprint a = random_fingerprint();
  const Fingerprint b = random_fingerprint();
  index.insert(7, a);
  index.insert(3, b);
  EXPECT_EQ(index.best(a, 0.99)->id, 7U);
  EXPECT_EQ(index.best(b, 0.99)->id, 3U);
  index.erase(7);
  EXPECT_EQ(index.size(), 1U);
  EXPECT_FALSE(index.best(a, 0.99));
  index.insert(7, b);
  EXPECT_EQ(index.best(b, 0.99)->id, 3U) << "of equal ones the lowest id";
  index.erase(3);
  EXPECT_EQ(index.best(b, 0.99)->id, 7U);
  index.clear();
  EXPECT_FALSE(index.best(b, -1));
  index.insert(7, a);
  EXPECT_EQ(index.best(a, 0.99)->id, 7U);
}

TEST_P(FingerprintIndexTest, EqualsAPlainScanUnderRandomChanges) {
  LimitedMemory memory;
  FingerprintIndex index(kind(), &memory);
  PlainScan plain(kind());
  for (int step = 0; step < 3000; ++step) {
    const auto id = static_cast<std::uint32_t>(engine_() % 600);
    if (plain.entries.contains(id)) {
      index.erase(id);
      plain.entries.erase(id);
    } else {
      const bool near = !plain.entries.empty() && engine_() % 2;
      const Fingerprint fingerprint =
          near ? changed(plain.entries.begin()->second, static_cast<double>(engine_() % 3) / 10) : random_fingerprint();
      index.insert(id, fingerprint);
      plain.entries.emplace(id, fingerprint);
    }
    ASSERT_EQ(index.size(), plain.entries.size());
    if (step % 10 != 0 || plain.entries.empty()) continue;
    const Fingerprint query = engine_() % 2 ? changed(plain.entries.rbegin()->second, 0.1) : random_fingerprint();
    for (const double tau : kTaus) {
      SCOPED_TRACE(tau);
      expect_equal(index.best(query, tau), plain.best(query, tau));
    }
  }
  while (!plain.entries.empty()) {
    index.erase(plain.entries.begin()->first);
    plain.entries.erase(plain.entries.begin());
  }
  EXPECT_EQ(index.size(), 0U);
  EXPECT_EQ(memory.used(), 0U) << "erasing gives all memory back";
}

TEST_P(FingerprintIndexTest, WithoutMemoryNothingChanges) {
  LimitedMemory memory;
  FingerprintIndex index(kind(), &memory);
  PlainScan plain(kind());
  std::uint32_t id = 0;
  for (int round = 0; round < 60; ++round) {
    // An insertion that fails at its first, second, ... allocation, until one succeeds.
    const Fingerprint fingerprint = random_fingerprint();
    for (std::size_t allowed = 0;; ++allowed) {
      memory.fail_after(allowed);
      try {
        index.insert(id, fingerprint);
        break;
      } catch (const std::bad_alloc&) {
        ASSERT_LT(allowed, 1000U);
        ASSERT_EQ(index.size(), plain.entries.size());
        expect_equal(index.best(fingerprint, -1), plain.best(fingerprint, -1));
      }
    }
    memory.fail_after(std::numeric_limits<std::size_t>::max());
    plain.entries.emplace(id, fingerprint);
    expect_equal(index.best(fingerprint, -1), plain.best(fingerprint, -1));
    id += 1 + static_cast<std::uint32_t>(engine_() % 40);
  }
  index.clear();
  EXPECT_EQ(memory.used(), 0U);
}

TEST_P(FingerprintIndexTest, StaysWithinALimitWhateverComes) {
  // So tight that the tables of many entries never fit, or only at times.
  for (const std::size_t limit : {50'000, 400'000, 3'000'000}) {
    SCOPED_TRACE(limit);
    LimitedMemory memory(limit);
    FingerprintIndex index(kind(), &memory);
    PlainScan plain(kind());
    std::size_t refused = 0;
    for (std::uint32_t step = 0; step < 6000; ++step) {
      const Fingerprint fingerprint = random_fingerprint();
      try {
        index.insert(step, fingerprint);
        plain.entries.emplace(step, fingerprint);
      } catch (const std::bad_alloc&) {
        ++refused;
        for (int i = 0; i < 20 && !plain.entries.empty(); ++i) {
          index.erase(plain.entries.begin()->first);
          plain.entries.erase(plain.entries.begin());
        }
      }
      ASSERT_LE(memory.used(), limit);
      if (step % 500 == 499 && !plain.entries.empty()) {
        const Fingerprint query = changed(plain.entries.rbegin()->second, 0.02);
        expect_equal(index.best(query, 0.1), plain.best(query, 0.1));
      }
    }
    if (limit == 50'000) {
      EXPECT_GT(refused, 0U);
    }
    ASSERT_EQ(index.size(), plain.entries.size());
  }
}

TEST_P(FingerprintIndexTest, ThresholdsThatAreNoThresholds) {
  FingerprintIndex index(kind());
  const Fingerprint a = random_fingerprint();
  index.insert(0, a);
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(index.best(a, std::nan("")));
  EXPECT_FALSE(index.best(a, infinity));
  EXPECT_FALSE(index.best(a, 1.5));
  EXPECT_TRUE(index.best(a, -infinity));
  EXPECT_TRUE(index.best(a, -7));
}

TEST_P(FingerprintIndexTest, RefusesWhatDoesNotFit) {
  FingerprintIndex index(kind());
  const auto refused = [](const std::string& part, const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "no error with '" << part << "'";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidInput);
      EXPECT_THAT(error.what(), HasSubstr(part));
    }
  };
  const Fingerprint a = random_fingerprint();
  index.insert(5, a);
  refused("5 is in use", [&] { index.insert(5, random_fingerprint()); });
  refused("too large", [&] { index.insert(FingerprintIndex::kMaxId + 1, a); });
  refused("was given", [&] { index.insert(6, Fingerprint{}); });
  refused("was given", [&] { (void)index.best(Fingerprint{}, 0); });
  if (!a.bits.empty()) {
    Fingerprint wide = a;
    wide.bits.resize(3);
    refused("192", [&] { index.insert(6, wide); });
  }
  if (!a.vector.empty()) {
    refused("2 values", [&] { index.insert(6, Fingerprint{.vector = {0.6F, 0.8F}}); });
    Fingerprint odd = a;
    odd.vector[0] = std::numeric_limits<float>::quiet_NaN();
    refused("unit length", [&] { index.insert(6, odd); });
    EXPECT_FALSE(index.best(odd, -1)) << "a query that is no number";
    std::ranges::fill(odd.vector, 0.0F);
    refused("unit length", [&] { index.insert(6, odd); });
  }
  EXPECT_EQ(index.size(), 1U);
  EXPECT_EQ(index.best(a, 0.9)->id, 5U);
}

TEST(FingerprintIndexDims, FollowTheFirstEntry) {
  FingerprintIndex index(FingerprintKind::kRaw);
  index.insert(0, {.vector = {1, 0}});
  index.erase(0);
  index.insert(0, {.vector = {0, 0, 1}});
  EXPECT_EQ(index.best({.vector = {0, 0, 1}}, 0.5)->id, 0U);
  EXPECT_THROW(index.insert(1, {.vector = {1, 0}}), Error);
}

/// Codes as they come: all alike, in clusters, with few directions, or evenly spread.
class FingerprintIndexSimHash : public ::testing::TestWithParam<std::tuple<int, std::string>> {
 protected:
  [[nodiscard]] std::size_t words() const { return static_cast<std::size_t>(std::get<0>(GetParam())) / 64; }
  [[nodiscard]] FingerprintKind kind() const {
    return fingerprint_kind_from_string("simhash" + std::to_string(std::get<0>(GetParam())));
  }
  Fingerprint code() {
    const std::string& shape = std::get<1>(GetParam());
    Fingerprint result{.bits = std::vector<std::uint64_t>(words())};
    if (shape == "even") {
      for (auto& word : result.bits) word = engine_();
    } else if (shape == "clusters") {
      std::mt19937_64 centre(engine_() % 40);
      for (auto& word : result.bits) word = centre();
      for (std::uint64_t flips = engine_() % 30; flips > 0; --flips) {
        result.bits[engine_() % words()] ^= std::uint64_t{1} << (engine_() % 64);
      }
    } else if (shape == "few") {  // half of the bits never differ
      for (auto& word : result.bits) word = engine_() & 0x00ff00ff00ff00ffULL;
    } else {
      result.bits[0] = engine_() % 3;
    }
    return result;
  }
  std::mt19937_64 engine_{5};
};

INSTANTIATE_TEST_SUITE_P(Shapes, FingerprintIndexSimHash,
                         ::testing::Combine(::testing::Values(64, 128, 256),
                                            ::testing::Values("even", "clusters", "few", "alike")),
                         [](const auto& shape) {
                           return std::get<1>(shape.param) + std::to_string(std::get<0>(shape.param));
                         });

TEST_P(FingerprintIndexSimHash, BucketsFindWhatAScanFinds) {
  LimitedMemory memory;
  FingerprintIndex index(kind(), &memory);
  PlainScan plain(kind());
  const auto check = [&](int queries) {
    for (int i = 0; i < queries; ++i) {
      Fingerprint query = code();
      for (std::uint64_t flips = engine_() % 20; flips > 0; --flips) {
        query.bits[engine_() % words()] ^= std::uint64_t{1} << (engine_() % 64);
      }
      const auto nearest = plain.best(query, -1);
      ASSERT_TRUE(nearest);
      for (const double tau : kTaus) {
        SCOPED_TRACE(tau);
        // The best of all is the best above any tau that it reaches.
        expect_equal(index.best(query, tau), nearest->similarity >= tau ? nearest : std::nullopt);
        if (HasFatalFailure()) return;
      }
      expect_equal(index.best(query, nearest->similarity), nearest);
      expect_equal(index.best(query, std::nextafter(nearest->similarity, 2)), std::nullopt);
    }
  };
  for (std::uint32_t id = 0; id < 18000; ++id) {  // buckets from 16,384 on
    plain.entries.emplace(id, code());
    index.insert(id, plain.entries.at(id));
  }
  check(40);
  for (int step = 0; step < 8000; ++step) {
    const auto id = static_cast<std::uint32_t>(engine_() % 18000);
    if (plain.entries.erase(id) > 0) {
      index.erase(id);
    } else {
      plain.entries.emplace(id, code());
      index.insert(id, plain.entries.at(id));
    }
  }
  ASSERT_EQ(index.size(), plain.entries.size());
  check(40);
  // An insertion into buckets that fails at its first, second, ... allocation.
  for (std::size_t allowed = 0; allowed < 4; ++allowed) {
    Fingerprint fresh = code();
    memory.fail_after(allowed);
    try {
      index.insert(20000 + static_cast<std::uint32_t>(allowed), fresh);
      plain.entries.emplace(20000 + static_cast<std::uint32_t>(allowed), fresh);
    } catch (const std::bad_alloc&) {
      ASSERT_EQ(index.size(), plain.entries.size());
    }
  }
  memory.fail_after(0);  // erasing needs no memory
  while (plain.entries.size() > 3000) {
    index.erase(plain.entries.begin()->first);
    plain.entries.erase(plain.entries.begin());
  }
  check(5);
  memory.fail_after(std::numeric_limits<std::size_t>::max());
  while (!plain.entries.empty()) {
    index.erase(plain.entries.begin()->first);
    plain.entries.erase(plain.entries.begin());
  }
  EXPECT_EQ(memory.used(), 0U);
}

TEST(FingerprintIndexLarge, ScansOnWhereBucketsFindNoRoom) {
  std::mt19937_64 engine(8);
  constexpr std::size_t kTight = 500'000;  // 20,000 codes of 16 bytes, and no tables
  LimitedMemory memory(kTight);
  FingerprintIndex index(FingerprintKind::kSimHash128, &memory);
  PlainScan plain(FingerprintKind::kSimHash128);
  const auto add = [&](std::uint32_t first, std::uint32_t last) {
    for (std::uint32_t id = first; id < last; ++id) {
      plain.entries.emplace(id, Fingerprint{.bits = {engine(), engine()}});
      index.insert(id, plain.entries.at(id));
    }
  };
  const auto check = [&] {
    for (int i = 0; i < 10; ++i) {
      Fingerprint query = plain.entries.at(static_cast<std::uint32_t>(engine() % plain.entries.size()));
      for (int flips = 0; flips < 8; ++flips) query.bits[0] ^= std::uint64_t{1} << (engine() % 64);
      for (const double tau : kTaus) expect_equal(index.best(query, tau), plain.best(query, tau));
    }
  };
  add(0, 20'000);
  EXPECT_LE(memory.used(), kTight);
  check();
  memory.set_limit(std::numeric_limits<std::size_t>::max());
  add(20'000, 26'000);
  EXPECT_GT(memory.used(), 10 * kTight / 2) << "the tables are there once there is room";
  check();
}

TEST(FingerprintIndexLarge, FinerBucketsFindWhatAScanFinds) {
  std::mt19937_64 engine(9);
  LimitedMemory memory;
  FingerprintIndex index(FingerprintKind::kSimHash128, &memory);
  std::vector<std::array<std::uint64_t, 2>> codes(402'000);  // finer buckets from 400,000 on
  Fingerprint code{.bits = {0, 0}};
  for (std::uint32_t id = 0; id < codes.size(); ++id) {
    codes[id] = {engine(), engine()};
    code.bits.assign(codes[id].begin(), codes[id].end());
    index.insert(id, code);
  }
  for (std::uint32_t id = 0; id < codes.size(); id += 2) index.erase(id);
  for (int i = 0; i < 30; ++i) {
    const auto from = static_cast<std::uint32_t>(engine() % codes.size()) | 1;
    code.bits.assign(codes[from].begin(), codes[from].end());
    for (std::uint64_t flips = engine() % 45; flips > 0; --flips) {
      code.bits[engine() % 2] ^= std::uint64_t{1} << (engine() % 64);
    }
    std::optional<Match> nearest;
    for (std::uint32_t id = 1; id < codes.size(); id += 2) {
      const double value = simhash_similarity(hamming(code.bits, codes[id]), 128);
      if (!nearest || value > nearest->similarity) nearest = Match{id, value};
    }
    for (const double tau : kTaus) {
      SCOPED_TRACE(tau);
      expect_equal(index.best(code, tau), nearest->similarity >= tau ? nearest : std::nullopt);
    }
  }
  index.clear();
  EXPECT_EQ(memory.used(), 0U);
}

TEST(FingerprintIndexLarge, InvertedListsFindMostNeighboursInClusteredData) {
  // 40,000 vectors around 2,000 centres, cosine of about 0.85 within a cluster.
  constexpr std::size_t kDims = 64;
  constexpr std::uint32_t kEntries = 40'000;
  std::mt19937_64 engine(3);
  std::normal_distribution<float> normal;
  std::vector<float> centres(2000 * kDims);
  for (float& value : centres) value = normal(engine);
  const auto near_centre = [&] {
    const std::size_t centre = engine() % 2000;
    Fingerprint result{.vector = std::vector<float>(kDims)};
    double square = 0;
    for (std::size_t d = 0; d < kDims; ++d) {
      result.vector[d] = centres[centre * kDims + d] + 0.4F * normal(engine);
      square += double{result.vector[d]} * double{result.vector[d]};
    }
    for (float& value : result.vector) value /= static_cast<float>(std::sqrt(square));
    return result;
  };
  LimitedMemory memory;
  FingerprintIndex index(FingerprintKind::kRaw, &memory);
  PlainScan plain(FingerprintKind::kRaw);
  for (std::uint32_t id = 0; id < kEntries; ++id) {
    plain.entries.emplace(id, near_centre());
    index.insert(id, plain.entries.at(id));
  }
  for (std::uint32_t id = 0; id < kEntries; id += 10) {
    index.erase(id);
    plain.entries.erase(id);
  }
  int hits = 0;
  int same = 0;
  for (int i = 0; i < 200; ++i) {
    const Fingerprint query = near_centre();
    const auto wanted = plain.best(query, 0.8);
    const auto found = index.best(query, 0.8);
    hits += wanted ? 1 : 0;
    same += wanted && found && found->id == wanted->id ? 1 : 0;
    if (found) {
      EXPECT_EQ(found->similarity, similarity(FingerprintKind::kRaw, query, plain.entries.at(found->id)));
      EXPECT_LE(found->similarity, wanted->similarity);
    }
  }
  EXPECT_GT(hits, 150);
  EXPECT_GE(same, hits * 95 / 100);
  while (!plain.entries.empty()) {
    index.erase(plain.entries.begin()->first);
    plain.entries.erase(plain.entries.begin());
  }
  EXPECT_EQ(memory.used(), 0U);
}

TEST(FingerprintIndexLarge, BandsFindNearSets) {
  std::mt19937_64 engine(4);
  const auto set_of = [&](std::size_t count) {
    std::vector<std::uint64_t> result(count);
    for (auto& hash : result) hash = engine();
    std::ranges::sort(result);
    return result;
  };
  LimitedMemory memory;
  FingerprintIndex index(FingerprintKind::kJaccard, &memory);
  PlainScan plain(FingerprintKind::kJaccard);
  for (std::uint32_t id = 0; id < 3000; ++id) {  // bands from 1,024 on
    plain.entries.emplace(id, Fingerprint{.shingles = set_of(20 + engine() % 100)});
    index.insert(id, plain.entries.at(id));
  }
  for (int step = 0; step < 2000; ++step) {
    const auto id = static_cast<std::uint32_t>(engine() % 3000);
    if (plain.entries.erase(id) > 0) {
      index.erase(id);
    } else {
      plain.entries.emplace(id, Fingerprint{.shingles = set_of(50)});
      index.insert(id, plain.entries.at(id));
    }
  }
  std::map<int, std::array<int, 2>> found_of;  // by tenths of the similarity
  for (int i = 0; i < 500; ++i) {
    auto from = plain.entries.lower_bound(static_cast<std::uint32_t>(engine() % 2900));
    Fingerprint query = from->second;
    const std::size_t changes = engine() % (query.shingles.size() / 3 + 1);
    for (std::size_t k = 0; k < changes; ++k) query.shingles[engine() % query.shingles.size()] = engine();
    std::ranges::sort(query.shingles);
    const auto wanted = plain.best(query, 0.5);
    const auto found = index.best(query, 0.5);
    if (!wanted) continue;
    auto& [all, same] = found_of[static_cast<int>(wanted->similarity * 10)];
    ++all;
    if (found) {
      EXPECT_EQ(found->similarity, similarity(FingerprintKind::kJaccard, query, plain.entries.at(found->id)));
      same += found->id == wanted->id ? 1 : 0;
    }
    expect_equal(index.best(query, 0.49), plain.best(query, 0.49));  // too loose for bands: the scan
  }
  for (const auto& [tenth, counts] : found_of) {
    const double similarity = tenth / 10.0;
    const double expected = 1 - std::pow(1 - std::pow(similarity, 4), 32);
    ASSERT_GT(counts[0], 5) << tenth;
    EXPECT_GE(counts[1], (expected - 0.05) * counts[0]) << similarity << ": " << counts[1] << " of " << counts[0];
  }
  EXPECT_GE(found_of.size(), 5U);
  while (!plain.entries.empty()) {
    index.erase(plain.entries.begin()->first);
    plain.entries.erase(plain.entries.begin());
  }
  EXPECT_EQ(memory.used(), 0U);
}

}  // namespace
}  // namespace llmcache::test
