// Tenants of a cache: what each may hold and for how long, pinned prefixes, erasing, and what a stranger can tell.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "bank/tenant_key.h"
#include "execute/batch.h"
#include "reuse/chain.h"
#include "reuse/prefix/pinned_prefixes.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

const std::string kDecoder = "tiny-llama-sdpa";
const std::string kEncoder = "tiny-bert-sdpa";

std::uint64_t because(const LayerCacheBase& cache, MissReason reason) {
  return cache.stats().balance.computed_because[static_cast<std::size_t>(reason)];
}

class Tenants : public ::testing::Test {
 protected:
  /// Tokens of its only row that were known.
  static std::int64_t ask(LayerCacheBase& cache, const Request& request, const std::string& tenant) {
    cache.forward(request.inputs, {.output = Output::kLastToken, .tenant = tenant});
    return cache.last_report().sequences.at(0).reused_tokens;
  }
  /// No two seeds (below 200) have the first token in common.
  static Request text(std::int64_t tokens, std::uint64_t seed) {
    Request request = right_padded(model_info(kDecoder), {tokens}, seed);
    request.ids()[0][0] = static_cast<std::int64_t>(10 + seed);
    return request;
  }
  /// What one such text takes.
  static std::size_t bytes_of(std::int64_t tokens) {
    static LayerCache<Module> roomy = cache_of(kDecoder, {.tenants = {.keep_accounts = true}});
    roomy.clear();
    ask(roomy, text(tokens, 1), "one");
    return roomy.stats().tenants.at(2).bytes;
  }
  /// A cache that is made once for all tests, and one around its model with these options.
  static LayerCache<Module> cache_with(Options options) {
    static LayerCache<Module> first = cache_of(kDecoder);
    if (!options.refresh.clock) options.refresh.clock = [] { return now; };
    return first.with_options(std::move(options));
  }
  void SetUp() override { now = 0; }

  inline static double now = 0;
};

TEST_F(Tenants, AFloodTakesOnlyItsOwnQuota) {
  const std::size_t one = bytes_of(40);
  const auto known_after = [&](const TenantOptions& limits) {
    auto cache = cache_with({.capacity_bytes = 40 * one, .tenants = limits});
    for (std::uint64_t seed = 1; seed <= 8; ++seed) ask(cache, text(40, seed), "quiet");
    for (std::uint64_t seed = 100; seed < 180; ++seed) ask(cache, text(40, seed), "flood");
    EXPECT_LE(cache.stats().peak_bytes, 40 * one);
    int known = 0;
    for (std::uint64_t seed = 1; seed <= 8; ++seed) known += ask(cache, text(40, seed), "quiet") == 40 ? 1 : 0;
    if (limits.accounts()) {
      EXPECT_EQ(ask(cache, text(40, 100), "flood"), 0);
      EXPECT_EQ(cache.last_report().sequences[0].evicted_because, MissReason::kOwnQuota);
      EXPECT_EQ(because(cache, MissReason::kOwnQuota), 40U);
      EXPECT_EQ(because(cache, MissReason::kOtherTenant), 0U);
      std::uint64_t evictions = 0;
      for (const BankStats& bank : cache.stats().banks) evictions += bank.quota_evictions;
      EXPECT_EQ(evictions, cache.stats().evictions);
      EXPECT_EQ(cache.stats().tenants.at(1).name, "listed");
      EXPECT_LE(cache.stats().tenants.at(1).bytes, 15 * one);
    }
    return known;
  };
  EXPECT_EQ(known_after({.quota_bytes = {{"flood", 15 * one}}}), 8);
  EXPECT_EQ(known_after({}), 0) << "without a quota they go";
}

TEST_F(Tenants, TokensThatWentForAnotherTenantAreToldApart) {
  const std::size_t one = bytes_of(40);
  auto cache = cache_with({.capacity_bytes = 6 * one, .tenants = {.keep_accounts = true}});
  ask(cache, text(40, 1), "a");
  for (std::uint64_t seed = 10; seed < 20; ++seed) ask(cache, text(40, seed), "b");
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 0);
  EXPECT_EQ(because(cache, MissReason::kOtherTenant), 40U);
  EXPECT_EQ(ask(cache, text(40, 10), "b"), 0);
  EXPECT_EQ(because(cache, MissReason::kEvicted), 40U) << "for its own tenant";
  const Stats stats = cache.stats();
  EXPECT_EQ(stats.balance.requested, stats.balance.reused() + stats.balance.computed());
  EXPECT_THAT(stats.to_string(), AllOf(HasSubstr("other tenant"), HasSubstr("tenants:   others: ")));
}

TEST_F(Tenants, WholeOutputsHaveQuotasToo) {
  const auto info = model_info(kEncoder);
  LayerCache<Module> roomy = cache_of(kEncoder, {.tenants = {.keep_accounts = true}});
  roomy.forward(right_padded(info, {20}, 1).inputs);
  const std::size_t one = roomy.stats().tenants.at(0).bytes;
  ASSERT_GT(one, 0U);
  auto cache = roomy.with_options({.capacity_bytes = 20 * one, .tenants = {.default_quota_bytes = 4 * one}});
  const auto known = [&](std::uint64_t seed, const std::string& tenant) {
    cache.forward(right_padded(info, {20}, seed).inputs, {.tenant = tenant});
    return cache.last_report().sequences[0].source == Source::kIdentical;
  };
  EXPECT_FALSE(known(1, "quiet"));
  for (std::uint64_t seed = 10; seed < 60; ++seed) EXPECT_FALSE(known(seed, "flood"));
  EXPECT_TRUE(known(1, "quiet"));
  EXPECT_TRUE(known(59, "flood"));
  EXPECT_FALSE(known(10, "flood"));
  EXPECT_EQ(cache.last_report().sequences[0].miss, MissReason::kOwnQuota);
  EXPECT_LE(cache.stats().tenants.at(2).bytes, 8 * one) << "of both together";
}

TEST_F(Tenants, ManyWithOneRequestEachStayWithinTheCapacity) {
  const std::size_t capacity = 20 * bytes_of(12);
  auto cache = cache_with({.capacity_bytes = capacity, .tenants = {.default_quota_bytes = capacity / 2}});
  for (int tenant = 0; tenant < 300; ++tenant) ask(cache, text(12, 1), "tenant number " + std::to_string(tenant));
  EXPECT_LE(cache.stats().peak_bytes, capacity);
  EXPECT_EQ(cache.stats().prefix_hits + cache.stats().identical_hits, 0U);
  cache.clear();
  EXPECT_EQ(cache.stats().bytes, 0U);
}

TEST_F(Tenants, NothingIsFoundOnceItIsTooOld) {
  auto cache = cache_with({.tenants = {.ttl_s = 60}});
  ask(cache, text(40, 1), "a");
  now = 59;
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 40);
  now = 60;
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 0);
  EXPECT_EQ(because(cache, MissReason::kExpired), 40U);
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 40) << "computed again";
  std::uint64_t expired = 0;
  for (const BankStats& bank : cache.stats().banks) expired += bank.expired;
  EXPECT_EQ(expired, 1U);
}

// --- pins -------------------------------------------------------------------------------------------

TEST_F(Tenants, APinnedPrefixStaysAndAnswersAsBefore) {
  const std::size_t one = bytes_of(40);
  auto cache = cache_with({.capacity_bytes = 12 * one, .tenants = {.default_quota_bytes = 6 * one, .ttl_s = 1000}});
  Module plain = load_plain(kDecoder);
  const auto prompt = text(40, 1);
  PinLease pin = cache.pin(prompt.inputs, "a", 100);
  EXPECT_TRUE(pin.held());
  EXPECT_EQ(pin.tokens(), 40);
  EXPECT_EQ(cache.stats().pins, 1U);
  EXPECT_GT(cache.stats().pinned_bytes, 0U);
  const auto flood = [&] {
    for (std::uint64_t seed = 10; seed < 40; ++seed) ask(cache, text(40, seed), seed % 2 == 0 ? "a" : "b");
  };
  flood();
  EXPECT_EQ(ask(cache, prompt, "a"), 40);
  EXPECT_EQ(ask(cache, prompt, "b"), 0) << "it is a's";
  const auto got = cache.forward(prompt.inputs, {.tenant = "a"});
  EXPECT_TRUE(close_on_real(got, run_plain(plain, prompt.inputs), prompt, tolerance_of(model_info(kDecoder))));
  pin.release();
  EXPECT_FALSE(pin.held());
  EXPECT_EQ(cache.stats().pins, 0U);
  EXPECT_EQ(cache.stats().pinned_bytes, 0U);
  flood();
  EXPECT_EQ(ask(cache, prompt, "a"), 0);
  EXPECT_LE(cache.stats().peak_bytes, 12 * one);
}

TEST_F(Tenants, AnOwnerWhoIsLostHoldsNothingForLonger) {
  const std::size_t one = bytes_of(40);
  auto cache = cache_with({.capacity_bytes = 6 * one, .tenants = {.pinned_share = 1}});
  PinLease pin = cache.pin(text(40, 1).inputs, "a", 100);
  now = 99;
  EXPECT_TRUE(pin.renew(50));
  now = 148;
  EXPECT_TRUE(pin.held());
  now = 149;
  EXPECT_EQ(cache.stats().pins, 0U);
  EXPECT_EQ(cache.stats().pinned_bytes, 0U);
  EXPECT_FALSE(pin.held());
  EXPECT_FALSE(pin.renew(100));
  for (std::uint64_t seed = 10; seed < 30; ++seed) ask(cache, text(40, seed), "b");
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 0);
  pin.release();
  EXPECT_THAT([&] { pin.renew(0); }, ThrowsError(ErrorCode::kInvalidOptions, "0 seconds"));
}

TEST_F(Tenants, PinsEndWithWhatTheyHold) {
  PinLease outlives;
  {
    auto cache = cache_with({});
    PinLease cleared = cache.pin(text(20, 1).inputs, "a", 100);
    cache.clear();
    EXPECT_FALSE(cleared.held());
    EXPECT_EQ(cache.stats().bytes, 0U);
    PinLease erased = cache.pin(text(20, 1).inputs, "a", 100);
    outlives = cache.pin(text(20, 1).inputs, "b", 100);
    EXPECT_EQ(cache.erase_tenant("a").pins, 1U);
    EXPECT_FALSE(erased.held());
    EXPECT_TRUE(outlives.held());
    PinLease moved = std::move(outlives);
    EXPECT_TRUE(moved.held());
    outlives = std::move(moved);
  }
  EXPECT_FALSE(outlives.held());
  EXPECT_FALSE(outlives.renew(1));
}

TEST_F(Tenants, WhatCannotBePinnedIsRefusedWithTheReason) {
  const std::size_t one = bytes_of(40);
  auto cache = cache_with({.capacity_bytes = 20 * one, .tenants = {.quota_bytes = {{"small", one / 2}}}});
  const auto pin = [&](const Request& request, const std::string& tenant, double seconds = 10) {
    return [&cache, request, tenant, seconds] { static_cast<void>(cache.pin(request.inputs, tenant, seconds)); };
  };
  EXPECT_THAT(pin(text(40, 1), "a", 0), ThrowsError(ErrorCode::kInvalidOptions, "seconds"));
  EXPECT_THAT(pin(text(40, 1), "a", std::numeric_limits<double>::infinity()), ThrowsError(ErrorCode::kInvalidOptions));
  EXPECT_EQ(cache.stats().requests, 0U);
  EXPECT_THAT(pin(text(40, 1), "small"), ThrowsError(ErrorCode::kNotAvailable, "quota"));
  std::vector<PinLease> pins;
  EXPECT_THAT(
      [&] {
        for (std::uint64_t seed = 1; seed < 50; ++seed) pins.push_back(cache.pin(text(40, seed).inputs, "a", 10));
      },
      ThrowsError(ErrorCode::kNotAvailable, "all pinned prefixes"));
  EXPECT_GE(pins.size(), 3U);
  EXPECT_LE(pins.size(), 6U) << "a quarter of the capacity";
  for (const PinLease& held : pins) EXPECT_TRUE(held.held());
  EXPECT_EQ(cache.stats().pins, pins.size());
  LayerCache<Module> encoder = cache_of(kEncoder);
  const auto request = right_padded(model_info(kEncoder), {9}, 1);
  EXPECT_THAT([&] { static_cast<void>(encoder.pin(request.inputs, "a", 10)); },
              ThrowsError(ErrorCode::kNotAvailable, "prefix"));
  EXPECT_EQ(encoder.stats().requests, 0U);
}

TEST_F(Tenants, TheNumberOfPinsIsBounded) {
  PinnedPrefixes pins([] { return now; });
  for (int i = 0; i < 4096; ++i) pins.add("a", 10, {});
  EXPECT_THAT([&] { pins.add("a", 10, {}); }, ThrowsError(ErrorCode::kNotAvailable, "4096 pins"));
  EXPECT_EQ(pins.count(), 4096U);
  now = 10;
  EXPECT_NE(pins.add("b", 10, {}), 0U);
  EXPECT_EQ(pins.count(), 1U);
  EXPECT_EQ(pins.drop("a"), 0U);
  EXPECT_EQ(pins.drop("b"), 1U);
}

TEST_F(Tenants, BadLimitsAreRefused) {
  const auto made = [](const TenantOptions& limits) { return [limits] { cache_with({.tenants = limits}); }; };
  EXPECT_THAT(made({.ttl_s = -1}), ThrowsError(ErrorCode::kInvalidOptions, "ttl_s"));
  EXPECT_THAT(made({.ttl_s = std::numeric_limits<double>::quiet_NaN()}), ThrowsError(ErrorCode::kInvalidOptions));
  EXPECT_THAT(made({.pinned_share = 1.5}), ThrowsError(ErrorCode::kInvalidOptions, "pinned_share"));
}

// --- erasing ----------------------------------------------------------------------------------------

TEST_F(Tenants, ErasingLeavesNothingOfOneAndAllOfTheOthers) {
  auto cache = cache_with({});
  for (const char* tenant : {"a", "aa", ""}) {
    for (std::uint64_t seed = 1; seed <= 5; ++seed) ask(cache, text(30, seed), tenant);
    cache.forward(text(12, 50).inputs, {.tenant = tenant});  // its whole output too
  }
  const Stats before = cache.stats();
  const TenantErasure erased = cache.erase_tenant("a");
  EXPECT_EQ(3 * erased.entries, before.entries);
  EXPECT_EQ(cache.stats().bytes, before.bytes - erased.bytes);
  EXPECT_EQ(erased.calls, 0U);
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    EXPECT_EQ(ask(cache, text(30, seed), "aa"), 30);
    EXPECT_EQ(ask(cache, text(30, seed), ""), 30);
    EXPECT_EQ(ask(cache, text(30, seed), "a"), 0);
  }
  EXPECT_EQ(because(cache, MissReason::kEvicted), 0U) << "no trace of it";
}

/// Calls a function in the midst of calls.
class InTheMidst final : public ReuseStrategy {
 public:
  std::string name() const override { return "in the midst"; }
  bool accepts(const Call& /*call*/) const override { return true; }
  void serve(const Call& /*call*/, Answers& /*answers*/) override {}
  void store(const Call& /*call*/, Answers& /*answers*/) override {
    if (then) then();
  }
  bool looks_up() const override { return false; }

  inline static std::function<void()> then;
};

class WithInTheMidst {
 public:
  WithInTheMidst() {
    strategy_table().insert(strategy_table().begin(),
                            {.chains = {Fidelity::kLossless},
                             .wanted = [](const StrategyContext&) { return true; },
                             .share = [](const Options&) { return 0.0; },
                             .make = [](const StrategyContext&, std::size_t) -> std::unique_ptr<ReuseStrategy> {
                               return std::make_unique<InTheMidst>();
                             }});
  }
  ~WithInTheMidst() {
    strategy_table().erase(strategy_table().begin());
    InTheMidst::then = {};
  }
};

TEST_F(Tenants, OfACallThatRunsWhileItsTenantIsErasedNothingIsKept) {
  const WithInTheMidst with;
  auto cache = cache_with({});
  ask(cache, text(20, 1), "a");
  ask(cache, text(20, 1), "b");
  TenantErasure erased;
  InTheMidst::then = [&] { erased = cache.erase_tenant("a"); };
  Request longer = text(30, 1);
  longer.ids().narrow(1, 0, 20).copy_(text(20, 1).ids());
  EXPECT_EQ(ask(cache, longer, "a"), 20) << "it had found its beginning before";
  EXPECT_EQ(erased.calls, 1U);
  EXPECT_EQ(ask(cache, longer, "b"), 20) << "a's erasing does not disturb it";
  InTheMidst::then = {};
  EXPECT_EQ(ask(cache, longer, "b"), 30) << "b's call was kept";
  EXPECT_EQ(ask(cache, longer, "a"), 0);
}

TEST_F(Tenants, ThreadsAskPinAndEraseAtOnce) {
  const std::size_t one = bytes_of(30);
  auto cache = cache_with({.capacity_bytes = 12 * one, .tenants = {.default_quota_bytes = 5 * one}});
  Module plain = load_plain(kDecoder);
  std::vector<Request> requests;
  std::vector<c10::IValue> wanted;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    requests.push_back(text(30, seed));
    wanted.push_back(run_plain(plain, requests.back().inputs));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 40; ++i) {
        const std::string tenant(1, static_cast<char>('a' + random() % 3));
        const std::size_t which = random() % requests.size();
        if (random() % 10 == 0) cache.erase_tenant(tenant);
        try {
          PinLease pin;
          if (random() % 4 == 0) pin = cache.pin(requests[which].inputs, tenant, 10);
          const auto got = cache.forward(requests[which].inputs, {.tenant = tenant});
          if (real_difference(got, wanted[which], requests[which]) > tolerance_of(model_info(kDecoder))) ++wrong;
        } catch (const Error& error) {
          if (error.code() != ErrorCode::kNotAvailable) ++wrong;  // no room to pin it just now
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(cache.stats().peak_bytes, 12 * one);
  EXPECT_EQ(cache.stats().pins, 0U);
  for (const char* tenant : {"a", "b", "c"}) cache.erase_tenant(tenant);
  EXPECT_EQ(cache.stats().entries, 0U);
  EXPECT_EQ(cache.stats().tenants.at(2).bytes, 0U);
}

// --- what a stranger can tell -----------------------------------------------------------------------

/// All of a report that says how much was done: times follow from that.
std::string work_of(const ForwardReport& report) {
  std::string text = std::string(to_string(report.execution)) + " " + std::to_string(report.layer_ms.size());
  for (const SequenceReport& row : report.sequences) {
    text += " " + std::to_string(row.reused_tokens) + " " + std::to_string(row.shared_tokens) + " " +
            std::to_string(row.evicted_tokens) + " " + to_string(row.miss);
    for (const LayerTokens& layer : row.layers) text += " " + std::to_string(layer.computed);
  }
  return text;
}

TEST_F(Tenants, AnothersPrefixCostsAsMuchAsOneThatNobodyKnows) {
  for (const bool limits : {false, true}) {
    auto cache = cache_with({.tenants = {.keep_accounts = limits}});
    ask(cache, text(40, 1), "acme");
    const auto probe = [&](std::uint64_t seed, const std::string& tenant) {
      ask(cache, text(40, seed), tenant);
      return work_of(cache.last_report());
    };
    ASSERT_NE(probe(1, "acme"), probe(2, "acme")) << "one's own can be told";
    for (const char* stranger : {"", "acm", "acme ", "p"}) {
      EXPECT_EQ(probe(1, stranger), probe(3, stranger)) << stranger;
    }
  }
}

TEST_F(Tenants, EveryKeyBeginsWithItsTenantAlone) {
  const std::string hidden(8, '\0');
  std::vector<std::string> names{"", "a", "ab", "acme", "acme\n", hidden, hidden + "acme", std::string(100000, 'a')};
  std::string nested;
  append_tenant(nested, "acme");
  names.push_back(nested);
  names.push_back("acme" + nested);
  std::set<std::string> keys;
  std::size_t made = 0;
  for (const std::string& name : names) {
    for (std::int64_t first = 0; first < 3; ++first) {
      for (const std::string& bytes : {std::string("acmeacme"), std::string(8, 'a'), hidden}) {
        std::int64_t id = 0;
        std::memcpy(&id, bytes.data(), sizeof id);  // ids that look like a part of a name
        Batch batch;
        const at::Tensor ids = at::full({1, 6}, id, at::kLong);
        batch.inputs = {ids};
        batch.on_host = {ids};
        batch.types = "\4";
        batch.rows = 1;
        batch.padded_length = 6;
        batch.spans = {{first, 6 - first}};
        for (const std::string& key :
             {batch.whole_key(0, name, true), batch.whole_key(0, name, false), batch.keys(name)[0].partition}) {
          EXPECT_EQ(tenant_of(key), name);
          keys.insert(name + "|" + key);
          ++made;
        }
        EXPECT_EQ(tenant_of(batch.source_key(0, name)), name);
      }
    }
  }
  EXPECT_GT(keys.size(), made / 2);
}

// --- snapshots --------------------------------------------------------------------------------------

TEST_F(Tenants, WhatASnapshotGivesCountsForItsTenantAndNoPinIsSaved) {
  const auto path = std::filesystem::path(::testing::TempDir()) / ("tenants-" + std::to_string(::getpid()));
  const std::size_t one = bytes_of(40);
  {
    auto cache = cache_with({.tenants = {.keep_accounts = true}});
    const PinLease pin = cache.pin(text(40, 1).inputs, "a", 100);
    for (std::uint64_t seed = 2; seed <= 6; ++seed) ask(cache, text(40, seed), "a");
    ask(cache, text(40, 1), "b");
    cache.save(path);
  }
  auto cache = cache_with({.tenants = {.default_quota_bytes = 4 * one}});
  const SnapshotReport loaded = cache.load(path);
  EXPECT_EQ(loaded.refused, "");
  EXPECT_EQ(cache.stats().pins, 0U);
  EXPECT_EQ(cache.stats().evictions, 0U) << "what has no room is left";
  EXPECT_EQ(cache.stats().tenants.at(2).entries, cache.stats().entries);
  EXPECT_EQ(ask(cache, text(40, 1), "b"), 40);
  EXPECT_EQ(ask(cache, text(40, 6), "a"), 40) << "the latest of them";
  EXPECT_EQ(ask(cache, text(40, 2), "a"), 0) << "there is no quota for all";
  EXPECT_GT(cache.erase_tenant("a").entries, 0U);
  EXPECT_EQ(ask(cache, text(40, 6), "a"), 0);
  std::filesystem::remove(path);
}

TEST_F(Tenants, WhatIsTooOldIsNotSaved) {
  const auto path = std::filesystem::path(::testing::TempDir()) / ("old-tenants-" + std::to_string(::getpid()));
  auto cache = cache_with({.tenants = {.ttl_s = 60}});
  ask(cache, text(40, 1), "a");
  now = 30;
  ask(cache, text(40, 2), "a");
  now = 70;
  EXPECT_EQ(cache.save(path).entries(), 1U);
  cache.clear();
  EXPECT_EQ(cache.load(path).entries(), 1U);
  EXPECT_EQ(ask(cache, text(40, 2), "a"), 40);
  EXPECT_EQ(ask(cache, text(40, 1), "a"), 0);
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace llmcache::test
