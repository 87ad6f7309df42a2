// Tenants of every bank: quotas, ages, erasing, look-ups of others' entries, and a hundred thousand of them. No model.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bank/tenant_key.h"
#include "bank_adapters.h"
#include "every_allocation.h"
#include "llmcache/options.h"

namespace llmcache::test {
namespace {

/// With sanitizers, fewer.
int times(int count) {
#ifdef LLMCACHE_TESTS_SANITIZED
  return count / 50;
#else
  return count;
#endif
}

/// What keys of a tenant begin with.
std::string owned_by(const std::string& tenant) {
  std::string key;
  append_tenant(key, tenant);
  return key + "p";
}

template <typename Adapter>
class TenantsOf : public ::testing::Test {
 protected:
  /// A bank that goes by `options`, and the clock that it reads.
  struct Limited {
    Limited(std::size_t capacity, const TenantOptions& limits) : options(limits), adapter(capacity) {
      adapter.bank.limit_tenants(options, capacity, [this] { return now; });
    }
    void keep(int number, const std::string& tenant, std::int64_t count = kTokens) {
      adapter.prepared(number, count, owned_by(tenant))();
    }
    bool holds(int number, const std::string& tenant) {
      const Reader reader = adapter.read(number, owned_by(tenant));
      EXPECT_TRUE(!reader || reader()) << number << " of " << tenant;
      return reader != nullptr;
    }
    BankCounters counters() { return adapter.bank.counters(); }
    std::size_t bytes_of(TenantClass kind) {
      TenantUsages usages;
      adapter.bank.add_to(usages);
      return usages[static_cast<std::size_t>(kind)].bytes;
    }
    TenantOptions options;
    double now = 0;
    Adapter adapter;
  };
};
TYPED_TEST_SUITE(TenantsOf, Banks, BankNames);

TYPED_TEST(TenantsOf, AQuotaHoldsAndCostsOnlyItsOwnTenant) {
  typename TestFixture::Limited bank(256 << 10, {.quota_bytes = {{"flood", 32 << 10}}});
  for (int number = 1; number <= 20; ++number) bank.keep(number, "quiet");
  for (int number = 1; number <= 300; ++number) {
    bank.keep(number, "flood");
    ASSERT_LE(bank.bytes_of(TenantClass::kListed), std::size_t{32 << 10});
    ASSERT_TRUE(bank.holds(number, "flood")) << "its latest one";
  }
  for (int number = 1; number <= 20; ++number) EXPECT_TRUE(bank.holds(number, "quiet")) << number;
  EXPECT_FALSE(bank.holds(1, "flood")) << "its oldest one";
  const BankCounters counters = bank.counters();
  EXPECT_EQ(counters.evictions, counters.quota_evictions);
  EXPECT_GT(counters.quota_evictions, 250U);
  EXPECT_GT(bank.bytes_of(TenantClass::kListed), std::size_t{16 << 10}) << "it may use what it has";
}

TYPED_TEST(TenantsOf, WhatIsMoreThanTheQuotaIsRejectedAndNothingElseGoes) {
  typename TestFixture::Limited bank(256 << 10, {.default_quota_bytes = 16 << 10});
  bank.keep(1, "a");
  bank.keep(2, "b");
  bank.keep(3, "a", 2000);  // fits into the bank
  EXPECT_EQ(bank.counters().rejected, 1U);
  EXPECT_EQ(bank.counters().evictions, 0U);
  EXPECT_TRUE(bank.holds(1, "a"));
  EXPECT_TRUE(bank.holds(2, "b"));
}

TYPED_TEST(TenantsOf, ItIsToldWhoseEntryWentForWhom) {
  const auto others = [](typename TestFixture::Limited& bank) { return bank.bytes_of(TenantClass::kOthers); };
  typename TestFixture::Limited bank(48 << 10, {.keep_accounts = true});
  for (int number = 1; number <= 5; ++number) bank.keep(number, "a");
  EXPECT_GE(others(bank), 5 * kEntryBytes);
  EXPECT_EQ(bank.bytes_of(TenantClass::kUnnamed), 0U);
  for (int number = 1; number <= 100; ++number) bank.keep(number, "");
  EXPECT_EQ(others(bank), 0U) << "evicted for the others, and its record forgotten";
  EXPECT_GT(bank.bytes_of(TenantClass::kUnnamed), 0U);
  EXPECT_EQ(bank.counters().quota_evictions, 0U);
}

/// Of one tenant's requests, the share that are known: of 400 sequences, some asked for far more often. Beside each
/// request come `flood` of another tenant, which never asks twice.
template <typename Limited>
double hit_rate(Limited& bank, int flood) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> uniform;
  int next = 1000;
  int hits = 0;
  constexpr int kRequests = 2000;
  for (int i = 0; i < kRequests; ++i) {
    const int number = 1 + static_cast<int>(400 * std::pow(uniform(random), 3));
    if (bank.holds(number, "quiet")) {
      ++hits;
    } else {
      bank.keep(number, "quiet");
    }
    for (int j = 0; j < flood; ++j) bank.keep(++next, "flood");
  }
  return static_cast<double>(hits) / kRequests;
}

TYPED_TEST(TenantsOf, AFloodMovesTheHitRateOfAnotherByAPointAtMost) {
  const std::size_t capacity = 512 << 10;
  const auto rate = [&](const TenantOptions& limits, int flood) {
    typename TestFixture::Limited bank(capacity, limits);
    return hit_rate(bank, flood);
  };
  const TenantOptions halves{.default_quota_bytes = capacity / 5 * 2};
  const double alone = rate(halves, 0);
  EXPECT_GT(alone, 0.3);
  EXPECT_LT(alone, 0.95) << "its own entries have to go too";
  EXPECT_NEAR(rate(halves, 10), alone, 0.01);
  EXPECT_LT(rate({}, 10), rate({}, 0) - 0.1) << "without quotas it does";
}

TYPED_TEST(TenantsOf, AHundredThousandWithOneRequestEachStayWithinTheCapacity) {
  const std::size_t capacity = 1 << 20;
  typename TestFixture::Limited bank(capacity, {.default_quota_bytes = 256 << 10});
  const std::string name(40, 'x');
  const int tenants = times(100000);
  for (int tenant = 1; tenant <= tenants; ++tenant) bank.keep(tenant, name + std::to_string(tenant));
  EXPECT_TRUE(bank.holds(tenants, name + std::to_string(tenants)));
  EXPECT_LE(bank.counters().peak_bytes, capacity);
  EXPECT_EQ(bank.counters().insertions, static_cast<std::uint64_t>(tenants));
  EXPECT_GT(bank.counters().entries, capacity / kEntryBytes / 8);
  bank.adapter.bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U) << "no record is left";
  EXPECT_EQ(bank.bytes_of(TenantClass::kOthers), 0U);
}

/// Names that look like a part of "acme", of its keys, or of another's.
std::vector<std::string> names_like_acme() {
  const std::string victim = owned_by("acme");
  std::vector<std::string> names{"", "a", "ac", "acm", "acme ", "acmee", "ACME", "acme/", "acme\n", "p", "acmep"};
  names.push_back(std::string("acme") + '\0');
  names.push_back(std::string(1, '\0') + "acme");
  names.push_back(victim);
  names.push_back(victim.substr(0, 8));
  names.push_back(victim.substr(8));
  names.push_back("acme" + victim);
  names.push_back(std::string(1 << 16, 'a'));
  std::mt19937 random(11);
  while (names.size() < 1000) {
    std::string name = random() % 2 == 0 ? "acme" : victim;
    for (int edits = 1 + static_cast<int>(random() % 3); edits > 0; --edits) {
      const auto at = random() % (name.size() + 1);
      if (random() % 2 == 0 && !name.empty()) {
        name.erase(std::min<std::size_t>(at, name.size() - 1), 1);
      } else {
        name.insert(at, 1, static_cast<char>(random() % 3 == 0 ? 0 : random()));
      }
    }
    if (name != "acme") names.push_back(name);
  }
  return names;
}

TYPED_TEST(TenantsOf, AMillionLookUpsFindNothingOfAnother) {
  typename TestFixture::Limited bank(8 << 20, {.keep_accounts = true});
  constexpr int kKept = 100;
  for (int number = 1; number <= kKept; ++number) bank.keep(number, "acme");
  const auto names = names_like_acme();
  std::uint64_t look_ups = 0;
  std::uint64_t found = 0;
  for (const std::string& name : names) {
    const std::string owner = owned_by(name);
    for (int i = 0; i < times(1000); ++i) {
      found += bank.adapter.read(1 + i % kKept, owner) != nullptr ? 1U : 0U;
      ++look_ups;
    }
  }
  EXPECT_EQ(look_ups, static_cast<std::uint64_t>(times(1000000)));
  EXPECT_EQ(found, 0U);
  for (int number = 1; number <= kKept; ++number) ASSERT_TRUE(bank.holds(number, "acme")) << "they were there";
}

TYPED_TEST(TenantsOf, ErasingDropsAllOfOneTenant) {
  for (const bool accounts : {false, true}) {
    SCOPED_TRACE(accounts);
    TypeParam adapter(1 << 20);
    const TenantOptions options{.keep_accounts = true};
    if (accounts) adapter.bank.limit_tenants(options, 1 << 20, [] { return 0.0; });
    for (int number = 1; number <= 10; ++number) {
      for (const char* tenant : {"a", "ab", ""}) adapter.prepared(number, kTokens, owned_by(tenant))();
    }
    const std::size_t before = adapter.bank.counters().bytes;
    const Reader reader = adapter.read(3, owned_by("a"));
    ASSERT_TRUE(reader);
    const TenantErasure erased = adapter.bank.erase_tenant("a");
    EXPECT_EQ(erased.entries, 10U);
    EXPECT_GE(erased.bytes, 9 * kEntryBytes);
    EXPECT_EQ(adapter.bank.counters().bytes, before - erased.bytes);
    EXPECT_TRUE(reader()) << "whoever reads goes on";
    for (int number = 1; number <= 10; ++number) {
      EXPECT_EQ(adapter.read(number, owned_by("a")), nullptr);
      EXPECT_NE(adapter.read(number, owned_by("ab")), nullptr);
      EXPECT_NE(adapter.read(number, owned_by("")), nullptr);
    }
    EXPECT_EQ(adapter.bank.erase_tenant("nobody").entries, 0U);
    EXPECT_EQ(adapter.bank.erase_tenant("ab").entries, 10U);
    EXPECT_EQ(adapter.bank.erase_tenant("").entries, 10U);
  }
}

TYPED_TEST(TenantsOf, WhatIsTooOldIsNotFound) {
  typename TestFixture::Limited bank(1 << 20, {.ttl_s = 10});
  bank.keep(1, "a");
  bank.now = 5;
  bank.keep(2, "a");
  bank.now = 9;
  EXPECT_TRUE(bank.holds(1, "a"));
  bank.now = 10;
  EXPECT_FALSE(bank.holds(1, "a")) << "using it does not prolong it";
  EXPECT_TRUE(bank.holds(2, "a"));
  EXPECT_EQ(bank.counters().aged, 1U);
  bank.now = std::nan("");
  EXPECT_TRUE(bank.holds(2, "a")) << "a clock that cannot be read stands still";
  bank.now = 15;
  bank.keep(1, "a");
  EXPECT_FALSE(bank.holds(2, "a"));
  EXPECT_TRUE(bank.holds(1, "a")) << "computed again";
  bank.now = 100;
  EXPECT_FALSE(bank.holds(1, "a"));
  EXPECT_EQ(bank.counters().entries, 0U);
  EXPECT_EQ(bank.bytes_of(TenantClass::kOthers), 0U);
  EXPECT_EQ(bank.counters().evictions, 0U);
}

TYPED_TEST(TenantsOf, AClockThatThrowsStandsStill) {
  TypeParam adapter(1 << 20);
  const TenantOptions options{.ttl_s = 10};
  adapter.bank.limit_tenants(options, 1 << 20, []() -> double { throw std::runtime_error("no clock"); });
  adapter.prepared(1, kTokens, owned_by("a"))();
  EXPECT_NE(adapter.read(1, owned_by("a")), nullptr);
}

TYPED_TEST(TenantsOf, MemoryThatCannotBeHadLeavesTheBooksRight) {
  typename TestFixture::Limited bank(1 << 20, {.default_quota_bytes = 24 << 10, .ttl_s = 10});
  for (int number = 1; number <= 3; ++number) bank.keep(number, "a");
  int number = 10;
  const auto check = [&](bool /*threw*/) {
    std::uint64_t held = 0;
    for (int one = 1; one <= number; ++one) held += bank.holds(one, "a") ? 1U : 0U;
    TenantUsages usages;
    bank.adapter.bank.add_to(usages);
    const TenantUsage& others = usages[static_cast<std::size_t>(TenantClass::kOthers)];
    EXPECT_EQ(held, bank.counters().entries);
    EXPECT_EQ(held, others.entries);
    EXPECT_GE(others.bytes, held * kEntryBytes);
    EXPECT_LE(others.bytes, std::size_t{24 << 10});
    ++number;
  };
  at_every_allocation([&] { bank.adapter.prepared(number, kTokens, owned_by("a"))(); }, check);
  bank.adapter.bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
  EXPECT_EQ(bank.bytes_of(TenantClass::kOthers), 0U);
}

TYPED_TEST(TenantsOf, ManyThreadsAtOnce) {
  typename TestFixture::Limited bank(256 << 10, {.default_quota_bytes = 64 << 10});
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < 200; ++i) {
        const std::string owner = owned_by("tenant " + std::to_string(random() % 6));
        const int number = static_cast<int>(random() % 50);
        if (random() % 50 == 0) {
          bank.adapter.bank.erase_tenant("tenant " + std::to_string(random() % 6));
        } else if (const Reader reader = bank.adapter.read(number, owner)) {
          if (!reader()) ++wrong;
        } else {
          bank.adapter.prepared(number, kTokens, owner)();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(bank.counters().peak_bytes, std::size_t{256 << 10});
  for (int tenant = 0; tenant < 6; ++tenant) bank.adapter.bank.erase_tenant("tenant " + std::to_string(tenant));
  EXPECT_EQ(bank.counters().entries, 0U);
  EXPECT_EQ(bank.bytes_of(TenantClass::kOthers), 0U);
  bank.adapter.bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0U);
}

// --- prefixes: what is held on to, and trees --------------------------------------------------------

class PinnedInBank : public ::testing::Test {
 protected:
  static constexpr std::size_t kCapacity = 64 << 10;

  void limit(const TenantOptions& limits) {
    options = limits;
    prefixes.bank.limit_tenants(options, kCapacity, [this] { return now; });
  }
  void keep(int number, const std::string& tenant) { prefixes.prepared(number, kTokens, owned_by(tenant))(); }
  PrefixBank::Kept pinned(int number, const std::string& tenant, double share = 1) {
    return prefixes.bank.keep(owned_by(tenant), tokens_of(number), share);
  }
  bool holds(int number, const std::string& tenant) { return prefixes.read(number, owned_by(tenant)) != nullptr; }

  TenantOptions options;
  double now = 0;
  Prefixes prefixes{kCapacity};
};

TEST_F(PinnedInBank, StaysWhileItsOwnTenantAndOthersNeedRoom) {
  limit({.quota_bytes = {{"a", 16 << 10}}, .ttl_s = 100});
  keep(1, "a");
  {
    const auto kept = pinned(1, "a");
    ASSERT_EQ(kept.refused, "");
    EXPECT_GE(prefixes.bank.counters().kept_bytes, kEntryBytes);
    for (int number = 2; number <= 100; ++number) keep(number, "a");
    for (int number = 2; number <= 200; ++number) keep(number, "b");
    now = 1000;
    EXPECT_TRUE(holds(1, "a")) << "neither evicted nor too old";
    EXPECT_FALSE(holds(100, "a")) << "too old";
    EXPECT_EQ(prefixes.bank.counters().entries, 1U);
  }
  EXPECT_EQ(prefixes.bank.counters().kept_bytes, 0U);
  EXPECT_FALSE(holds(1, "a")) << "nobody holds on to it any more";
  EXPECT_EQ(prefixes.bank.counters().bytes, 0U);
}

TEST_F(PinnedInBank, IsRefusedBeyondItsShareAndWhereItIsNotKnown) {
  limit({.quota_bytes = {{"a", 16 << 10}}});
  keep(1, "a");
  keep(2, "a");
  keep(1, "b");
  EXPECT_NE(pinned(3, "a").refused.find("only 0 of its 32 tokens"), std::string::npos);
  EXPECT_NE(pinned(1, "a", 0.01).refused.find("all pinned prefixes"), std::string::npos);
  const auto first = pinned(1, "a", 0.1);
  EXPECT_EQ(first.refused, "");
  const auto again = pinned(1, "a", 0.1);
  EXPECT_EQ(again.refused, "") << "the same prefix takes nothing more";
  EXPECT_NE(pinned(2, "a", 0.1).refused.find("of its tenant"), std::string::npos) << "1638 bytes of its quota";
  EXPECT_EQ(pinned(1, "b", 0.1).refused, "") << "it has none";
  EXPECT_TRUE(holds(2, "a"));
}

TEST_F(PinnedInBank, ClearAndEraseLeaveTheBooksRight) {
  limit({.default_quota_bytes = 32 << 10});
  keep(1, "a");
  auto kept = pinned(1, "a");
  EXPECT_EQ(prefixes.bank.erase_tenant("a").entries, 1U);
  EXPECT_FALSE(holds(1, "a"));
  EXPECT_GT(prefixes.bank.counters().kept_bytes, 0U) << "memory that the lease still has";
  keep(1, "a");
  EXPECT_TRUE(holds(1, "a"));
  prefixes.bank.clear();
  kept.lease = {};
  EXPECT_EQ(prefixes.bank.counters().kept_bytes, 0U);
  prefixes.bank.clear();  // the record of the tenant too, to whom the lease was charged
  EXPECT_EQ(prefixes.bank.counters().bytes, 0U);
}

TEST_F(PinnedInBank, WhatContinuesAnOldPrefixGoesWithIt) {
  limit({.ttl_s = 10});
  const std::string owner = owned_by("a");
  const auto keep_tokens = [&](const Tokens& tokens) {
    auto lease = prefixes.bank.find(owner, tokens, 0);
    auto ranges = lease.known();
    const auto count = static_cast<std::int64_t>(tokens.size());
    ASSERT_TRUE(prefixes.bank.reserve(lease, nullptr, count - lease.known_tokens(), 0, size_class(count)));
    ranges.insert(ranges.end(), lease.reserved().begin(), lease.reserved().end());
    prefixes.bank.commit(lease, owner, tokens, ranges, 1, 0);
  };
  const auto known = [&](const Tokens& tokens) { return prefixes.bank.find(owner, tokens, 0).known_tokens(); };
  Tokens base = tokens_of(1);
  Tokens left(base.begin(), base.begin() + 16);
  left.resize(40, 7);
  keep_tokens(base);
  now = 6;
  keep_tokens(left);  // splits the first one: what both have in common is as old as that
  EXPECT_EQ(known(base), 32);
  EXPECT_EQ(known(left), 40);
  now = 10;
  EXPECT_EQ(known(base), 0);
  EXPECT_EQ(known(left), 0) << "it cannot be found without its beginning";
  EXPECT_EQ(prefixes.bank.counters().entries, 0U);
  EXPECT_EQ(prefixes.bank.counters().bytes, 0U);
  // A pass that began before does not bring back what became too old meanwhile.
  keep_tokens(base);
  Tokens more = base;
  more.resize(48, 9);
  auto lease = prefixes.bank.find(owner, more, 0);
  auto ranges = lease.known();
  ASSERT_TRUE(prefixes.bank.reserve(lease, nullptr, 16, 0, 6));
  ranges.insert(ranges.end(), lease.reserved().begin(), lease.reserved().end());
  now = 20;
  prefixes.bank.commit(lease, owner, more, ranges, 1, 0);
  EXPECT_EQ(known(more), 0);
  EXPECT_EQ(prefixes.bank.find(owner, more, 0).evicted().cause, EvictedKeys::Cause::kAge);
}

TEST(TenantKeys, NoKeyOfATenantBeginsLikeAnothers) {
  const auto names = names_like_acme();
  for (const std::string& name : names) {
    const std::string key = owned_by(name) + "acme";
    ASSERT_EQ(tenant_of(key), name);
    ASSERT_FALSE(key.starts_with(owned_by("acme")));
  }
  EXPECT_EQ(tenant_of(""), "");
  EXPECT_EQ(tenant_of("short"), "");
  EXPECT_EQ(tenant_of("\xff\xff\xff\xff\xff\xff\xff\xff, which no key is as long as"), "");
}

}  // namespace
}  // namespace llmcache::test
