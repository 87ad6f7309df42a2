// A cache above a store: what it finds there, and that nothing the store does changes an answer.
#include <llmcache/store/directory_store.h>
#include <llmcache/store/tiered_store.h>

#include <set>

#include "encoder_decoder_support.h"
#include "memory_store.h"
#include "reuse/tiers/fetch_speed.h"
#include "store/snapshot_entries.h"
#include "store/tier_value.h"
#include "temporary_folder.h"
#include "tier_support.h"

namespace llmcache::test {
namespace {

std::set<std::string> keys_of(const MemoryStore& store) {
  std::set<std::string> keys;
  for (const auto& [key, value] : store.values()) keys.insert(key);
  return keys;
}

// --- two caches, one store ------------------------------------------------------------------------------

class TiersOf : public ::testing::TestWithParam<std::string> {};

TEST_P(TiersOf, TheSecondCacheComputesNothingOfWhatTheFirstHas) {
  const ModelInfo info = model_info(GetParam());
  Module plain = load_model(info.name);
  const auto store = std::make_shared<MemoryStore>();
  LayerCache<Module> first = cache_of(info.name, above(store));
  LayerCache<Module> second = cache_of(info.name, above(store));
  const bool causal = first.profile().prefix_reuse;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const Request request = right_padded(info, {16, 7, 12}, seed);
    expect_plain_answer(first, plain, info, request);
    wait_for_store(first);
    expect_plain_answer(second, plain, info, request);
    // Of prefixes whole blocks of 4 tokens, of outputs all.
    EXPECT_EQ(reused_tokens(second), causal ? 16 + 4 + 12 : 35);
    EXPECT_TRUE(same_bits(second.forward(request.inputs), second.forward(request.inputs)));
  }
  const StoreStats stats = second.stats().store;
  EXPECT_GT(stats.hits, 0U);
  EXPECT_EQ(stats.damaged + stats.failures + stats.timeouts, 0U);
  EXPECT_EQ(second.stats().verification.mismatches, 0U);
  EXPECT_GT(first.stats().store.writes, 0U);
  EXPECT_EQ(first.stats().store.writes_dropped, 0U);
}

INSTANTIATE_TEST_SUITE_P(Models, TiersOf,
                         ::testing::Values("tiny-bert-sdpa", "tiny-bert-pooled", "tiny-bert-sdpa-bf16",
                                           "tiny-gpt2-sdpa", "tiny-llama-eager", "tiny-llama-sdpa-bf16",
                                           "tiny-scripted"),
                         test_name);

TEST(Tiers, ALongerTextGoesOnFromTheBlocksOfAShorterOne) {
  const ModelInfo info = model_info(kCausalModel);
  Module plain = load_model(kCausalModel);
  const auto store = std::make_shared<MemoryStore>();
  LayerCache<Module> first = cache_of(kCausalModel, above(store));
  LayerCache<Module> second = cache_of(kCausalModel, above(store));
  const Request whole = right_padded(info, {24}, 1);
  Request begins = right_padded(info, {13}, 1);
  begins.ids().copy_(whole.ids().narrow(1, 0, 13));
  first.forward(begins.inputs);
  wait_for_store(first);
  EXPECT_EQ(store->values().size(), 3U) << "12 of 13 tokens fill blocks";
  expect_plain_answer(second, plain, info, whole);
  EXPECT_EQ(reused_tokens(second), 12);
  wait_for_store(second);
  EXPECT_EQ(store->values().size(), 6U);
  // What is known is not asked for again.
  const auto lookups = store->stats()[0].lookups;
  second.forward(whole.inputs);
  EXPECT_EQ(store->stats()[0].lookups, lookups);
}

TEST(Tiers, ATenantThatIsErasedIsGoneFromTheStoreToo) {
  for (const char* name : {kCausalModel, kEncoderModel}) {
    const ModelInfo info = model_info(name);
    Module plain = load_model(name);
    const auto store = std::make_shared<MemoryStore>();
    Options options = above(store);
    options.store.tenant_secrets = {{"a", "sixteen bytes or more"}};
    LayerCache<Module> cache = cache_of(name, options);
    const Request request = right_padded(info, {16}, 5);
    for (const char* tenant : {"", "a", "ab", "b"}) cache.forward(request.inputs, {.tenant = tenant});
    wait_for_store(cache);
    const std::size_t each = store->values().size() / 4;
    ASSERT_EQ(store->values().size(), 4 * each);
    // What waits to be written is written, and goes.
    const Request late = right_padded(info, {12}, 6);
    cache.forward(late.inputs, {.tenant = "a"});
    EXPECT_EQ(cache.erase_tenant("a").store_failure, "");
    wait_for_store(cache);
    EXPECT_EQ(store->values().size(), 3 * each);
    LayerCache<Module> other = cache_of(name, options);
    for (const char* tenant : {"", "a", "ab", "b"}) {
      expect_plain_answer(other, plain, info, request, tenant);
      EXPECT_EQ(reused_tokens(other), std::string(tenant) == "a" ? 0 : 16) << tenant;
    }
    EXPECT_EQ(cache.erase_tenant("nobody").store_failure, "");
    store->erase_outcome = StoreOutcome::kFailed;
    EXPECT_EQ(cache.erase_tenant("b").store_failure, "memory: failed");
  }
}

TEST(Tiers, AreKeptOverARestartInADirectory) {
  const TemporaryFolder folder;
  for (const char* name : {kCausalModel, kEncoderModel}) {
    const ModelInfo info = model_info(name);
    Module plain = load_model(name);
    const Request request = right_padded(info, {16, 8}, 5);
    const auto open = [&] {
      return std::make_shared<DirectoryStore>(
          DirectoryStoreOptions{.path = folder / name, .capacity_bytes = std::uint64_t{64} << 20});
    };
    {
      LayerCache<Module> cache = cache_of(name, above(open()));
      cache.forward(request.inputs);
      wait_for_store(cache);
    }
    LayerCache<Module> cache = cache_of(name, above(open()));
    expect_plain_answer(cache, plain, info, request);
    EXPECT_EQ(reused_tokens(cache), 24);
    EXPECT_EQ(cache.stats().store.tiers.at(0).name, "directory");
    EXPECT_GT(cache.stats().store.bytes_read, 0U);
  }
}

TEST(Tiers, TheDirectoryInFrontTakesWhatTheOneBehindHad) {
  const TemporaryFolder folder;
  const ModelInfo info = model_info(kCausalModel);
  Module plain = load_model(kCausalModel);
  const Request request = right_padded(info, {16}, 5);
  const auto back = std::make_shared<MemoryStore>();
  LayerCache<Module> first = cache_of(kCausalModel, above(back));
  first.forward(request.inputs);
  wait_for_store(first);
  const auto front = std::make_shared<DirectoryStore>(DirectoryStoreOptions{.path = folder.path()});
  const auto both = std::make_shared<TieredStore>(std::vector<std::shared_ptr<StateStore>>{front, back});
  LayerCache<Module> second = cache_of(kCausalModel, above(both));
  expect_plain_answer(second, plain, info, request);
  EXPECT_EQ(reused_tokens(second), 16);
  both->flush();
  EXPECT_EQ(front->stats()[0].entries, 4U);
  EXPECT_EQ(second.stats().store.tiers.size(), 2U);
}

TEST(Tiers, WhatFollowsFromASourceIsComputedByOneProcessAlone) {
  Subject& model = subject("seq2seq-bart");
  const ModelProfile& profile = model.cache.profile();
  const auto store = std::make_shared<MemoryStore>();
  Options options = above(store);
  options.prefix.capacity_share = Options{}.prefix.capacity_share;
  LayerCache<Module> first = model.cache.with_options(options);
  LayerCache<Module> second = model.cache.with_options(options);
  const Ids source = {20, 21, 22, 23, 24};
  const Request request = request_of(profile, {{source, {30, 31}}, {source, {32, 33}}});
  first.forward(request.inputs);
  EXPECT_EQ(reused_of_source(first), (Ids{0, 5}));
  wait_for_store(first);
  const auto of_sources = [](const auto& all) {
    return std::ranges::count_if(all, [](const auto& one) { return one.first.find(":s:") != std::string::npos; });
  };
  EXPECT_EQ(of_sources(store->values()), 1);
  const Request other = request_of(profile, {{source, {40, 41}}, {{25, 26}, {42, 43}}});
  const auto got = second.forward(other.inputs);
  EXPECT_TRUE(close_on_real(got, run_plain(model.plain, other.inputs), other, tolerance_of(model.info)));
  EXPECT_EQ(reused_of_source(second), (Ids{5, 0}));
  EXPECT_EQ(second.last_report().fallback, "");
  wait_for_store(second);
  EXPECT_EQ(of_sources(store->values()), 2);
  EXPECT_EQ(second.stats().store.damaged, 0U);
  // Of damaged values nothing is taken.
  auto values = store->values();
  for (auto& [key, value] : values) value[value.size() / 2] = static_cast<char>(value[value.size() / 2] ^ 1);
  store->set(values);
  LayerCache<Module> third = model.cache.with_options(options);
  const auto again = third.forward(other.inputs);
  EXPECT_TRUE(close_on_real(again, run_plain(model.plain, other.inputs), other, tolerance_of(model.info)));
  EXPECT_EQ(reused_of_source(third), (Ids{0, 0}));
  EXPECT_GE(third.stats().store.damaged, 2U);
  // Of another tenant neither.
  wait_for_store(third);  // it writes anew what was damaged
  store->set({});
  first.forward(request.inputs, {.tenant = "acme"});
  wait_for_store(first);
  LayerCache<Module> fourth = model.cache.with_options(options);
  fourth.forward(request.inputs);
  EXPECT_EQ(reused_of_source(fourth), (Ids{0, 5}));
}

TEST(Tiers, OutputsOfOneFidelityDoNotStandForThoseOfAnother) {
  const ModelInfo info = model_info(kEncoderModel);
  Module plain = load_model(kEncoderModel);
  const auto store = std::make_shared<MemoryStore>();
  const Request request = right_padded(info, {16, 3, 3}, 5);  // its padding is worth packing
  LayerCache<Module> packed = cache_of(kEncoderModel, above(store));
  packed.forward(request.inputs);
  wait_for_store(packed);
  LayerCache<Module> second = cache_of(kEncoderModel, above(store));
  const auto got = second.forward(request.inputs, {.fidelity = Fidelity::kIdentical});
  EXPECT_TRUE(same_bits(got, run_plain(plain, request.inputs)));
  EXPECT_EQ(reused_tokens(second), 0);
  wait_for_store(second);
  LayerCache<Module> third = cache_of(kEncoderModel, above(store));
  EXPECT_EQ(real_difference(third.forward(request.inputs, {.fidelity = Fidelity::kIdentical}), got, request), 0);
  EXPECT_EQ(reused_tokens(third), 22);
}

// --- whose entries --------------------------------------------------------------------------------------

TEST(Tiers, TenantsStayApart) {
  const ModelInfo info = model_info(kCausalModel);
  Module plain = load_model(kCausalModel);
  const auto store = std::make_shared<MemoryStore>();
  const Request request = right_padded(info, {16}, 5);
  LayerCache<Module> first = cache_of(kCausalModel, above(store));
  first.forward(request.inputs, {.tenant = "acme"});
  wait_for_store(first);
  const auto of_acme = keys_of(*store);
  LayerCache<Module> second = cache_of(kCausalModel, above(store));
  for (const char* other : {"", "acme2", "acm"}) {
    expect_plain_answer(second, plain, info, request, other);
    EXPECT_EQ(reused_tokens(second), 0) << other;
    wait_for_store(second);
  }
  EXPECT_EQ(keys_of(*store).size(), 4 * of_acme.size());
  expect_plain_answer(second, plain, info, request, "acme");
  EXPECT_EQ(reused_tokens(second), 16);
}

TEST(Tiers, ASecretMakesKeysThatNobodyElseCanTell) {
  const ModelInfo info = model_info(kCausalModel);
  Module plain = load_model(kCausalModel);
  const Request request = right_padded(info, {16}, 5);
  const auto store = std::make_shared<MemoryStore>();
  Options with_secret = above(store);
  with_secret.store.tenant_secrets = {{"acme", std::string(32, 's')}};
  std::vector<std::set<std::string>> keys;
  for (const Options& options : {above(store), with_secret}) {
    store->set({});
    LayerCache<Module> cache = cache_of(kCausalModel, options);
    cache.forward(request.inputs, {.tenant = "acme"});
    wait_for_store(cache);
    keys.push_back(keys_of(*store));
    ASSERT_EQ(keys.back().size(), 4U);
  }
  for (const std::string& key : keys[0]) EXPECT_FALSE(keys[1].contains(key));
  // Who has the secret finds them, who has another, or none, does not.
  LayerCache<Module> knowing = cache_of(kCausalModel, with_secret);
  expect_plain_answer(knowing, plain, info, request, "acme");
  EXPECT_EQ(reused_tokens(knowing), 16);
  with_secret.store.tenant_secrets["acme"].back() = 't';
  for (const Options& options : {above(store), with_secret}) {
    LayerCache<Module> other = cache_of(kCausalModel, options);
    expect_plain_answer(other, plain, info, request, "acme");
    EXPECT_EQ(reused_tokens(other), 0);
  }
}

TEST(Tiers, AnotherModelFindsNothing) {
  const auto store = std::make_shared<MemoryStore>();
  const ModelInfo info = script_info(Script{});
  const Request request = right_padded(info, {8}, 1);
  LayerCache<Module> first(make_module(Script{}), above(store));
  first.forward(request.inputs);
  wait_for_store(first);
  ASSERT_FALSE(store->values().empty());
  Module other = make_module(Script{});
  {
    const c10::NoGradGuard no_grad;
    other.attr("table").toTensor().select(0, 3).add_(1);
  }
  LayerCache<Module> second(other, above(store));
  second.forward(request.inputs);
  EXPECT_EQ(reused_tokens(second), 0);
  EXPECT_GT(second.stats().store.misses, 0U);
  LayerCache<Module> third(make_module(Script{}), above(store));
  third.forward(request.inputs);
  EXPECT_EQ(reused_tokens(third), 8);
}

TEST(Tiers, WeightsThatWereChangedHaveKeysOfTheirOwn) {
  const auto store = std::make_shared<MemoryStore>();
  const Request request = right_padded(script_info(Script{}), {8}, 1);
  Module module = make_module(Script{});
  LayerCache<Module> cache(module, above(store));
  const auto before = cache.forward(request.inputs).toTensor().clone();
  wait_for_store(cache);
  {
    const c10::NoGradGuard no_grad;
    module.attr("table").toTensor().mul_(1.5);
  }
  cache.weights_changed();
  const auto after = cache.forward(request.inputs);
  EXPECT_EQ(reused_tokens(cache), 0);
  EXPECT_TRUE(same_bits(after, run_plain(module, request.inputs)));
  EXPECT_FALSE(same_bits(after, before));
}

TEST(Tiers, ClearingEmptiesTheMemoryAlone) {
  const auto store = std::make_shared<MemoryStore>();
  const Request request = right_padded(model_info(kCausalModel), {16}, 1);
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  cache.forward(request.inputs);
  wait_for_store(cache);
  cache.clear();
  EXPECT_EQ(cache.stats().entries, 0U);
  cache.forward(request.inputs);
  EXPECT_EQ(reused_tokens(cache), 16);
  // Prefixes of keys say whose they are.
  TierKeys keys(TierDomain::kPrefixBlock, "none", "", "", "");
  const std::string first = *keys_of(*store).begin();
  const std::string tenant = first.substr(0, first.rfind(':', first.rfind(':') - 1) + 1);
  EXPECT_EQ(store->erase_prefix(tenant, store_deadline(1'000)), StoreOutcome::kDone);
  EXPECT_TRUE(store->values().empty());
}

TEST(Tiers, CallsWithHooksAskForNothing) {
  class Watching final : public LayerHook {
    HookAction at_layer(LayerStates& /*at*/) override { return HookAction::kGoOn; }
  };
  const auto store = std::make_shared<MemoryStore>();
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  cache.forward(right_padded(model_info(kCausalModel), {16}, 1).inputs, {.hook = std::make_shared<Watching>()});
  wait_for_store(cache);
  EXPECT_EQ(cache.stats().store.lookups, 0U);
  EXPECT_TRUE(store->values().empty());
}

// --- what fails -----------------------------------------------------------------------------------------

class FailingTiers : public ::testing::Test {
 protected:
  FailingTiers() : plain(load_model(kCausalModel)), info(model_info(kCausalModel)) {
    LayerCache<Module> first = cache_of(kCausalModel, above(store));
    first.forward(request().inputs);
    wait_for_store(first);
  }
  [[nodiscard]] Request request(std::uint64_t seed = 7) const { return right_padded(info, {16}, seed); }

  const std::shared_ptr<MemoryStore> store = std::make_shared<MemoryStore>();
  Module plain;
  const ModelInfo info;
};

TEST_F(FailingTiers, AreAsNone) {
  for (const StoreOutcome outcome : {StoreOutcome::kFailed, StoreOutcome::kRefused, StoreOutcome::kTimeout}) {
    store->outcome = outcome;
    Options options = above(store);
    options.store.deadline_ms = 5;
    LayerCache<Module> cache = cache_of(kCausalModel, options);
    for (const std::uint64_t seed : {7, 8, 9}) expect_plain_answer(cache, plain, info, request(seed));
    const StoreStats stats = cache.stats().store;
    EXPECT_EQ(stats.hits, 0U);
    EXPECT_EQ(stats.timeouts, outcome == StoreOutcome::kTimeout ? 3U : 0U);
    EXPECT_EQ(stats.failures, outcome == StoreOutcome::kTimeout ? 0U : 3U);
    EXPECT_EQ(stats.misses, 0U) << "whether it has them is not known";
  }
}

TEST_F(FailingTiers, AreAskedOncePerRequestThen) {
  store->outcome = StoreOutcome::kFailed;
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  const auto before = store->stats()[0].lookups;
  cache.forward(right_padded(info, {16, 16, 16, 16}, 3).inputs);
  EXPECT_EQ(store->stats()[0].lookups, before + 1);
}

TEST_F(FailingTiers, DropWhatTheyDoNotTake) {
  store->put_outcome = StoreOutcome::kNoRoom;
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  expect_plain_answer(cache, plain, info, request(8));
  wait_for_store(cache);
  EXPECT_EQ(cache.stats().store.writes, 0U);
  EXPECT_EQ(cache.stats().store.writes_dropped, 4U);
}

TEST_F(FailingTiers, WritesThatWaitAreBounded) {
  Options options = above(store);
  options.store.max_pending_write_bytes = 1;
  LayerCache<Module> cache = cache_of(kCausalModel, options);
  expect_plain_answer(cache, plain, info, request(8));
  EXPECT_EQ(cache.stats().store.writes_dropped, 4U);
  EXPECT_EQ(cache.stats().store.waiting, 0U);
}

TEST_F(FailingTiers, NothingIsTakenOfAValueWithAByteChanged) {
  const auto whole = store->values();
  // The block that is asked for first holds the fewest tokens in front of it, and so is the smallest.
  const auto smallest = std::ranges::min_element(whole, {}, [](const auto& one) { return one.second.size(); });
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  const auto answer = run_plain(plain, request().inputs);
  std::uint64_t damaged = 0;
  // All of the headers, and a part of the numbers: each byte of a small value is in tier_value_test.cpp.
  for (std::size_t at = 0; at < smallest->second.size(); at += at < 150 ? 1 : 53) {
    auto values = whole;
    std::string& value = values[smallest->first];
    value[at] = static_cast<char>(value[at] ^ 0x20);
    store->set(std::move(values));
    cache.clear();
    EXPECT_TRUE(close_on_real(cache.forward(request().inputs), answer, request(), tolerance_of(info))) << at;
    ASSERT_EQ(reused_tokens(cache), 0) << at;
    ASSERT_EQ(cache.stats().store.damaged, ++damaged) << at;
    wait_for_store(cache);
  }
  EXPECT_NO_THROW(entry_of_tier_value(store->values().at(smallest->first), TierDomain::kPrefixBlock, smallest->first))
      << "it was erased, and written anew";
}

TEST_F(FailingTiers, ForgedEntriesWithRightChecksDoNoHarm) {
  const auto whole = store->values();
  ASSERT_EQ(whole.size(), 4U);
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  // Each key gets the entry of each other one, in a value that is right but for that.
  for (const auto& [key, value] : whole) {
    for (const auto& [other, entry] : whole) {
      if (other == key) continue;
      auto values = whole;
      std::string forged = begin_tier_value(key);
      forged += entry_of_tier_value(entry, TierDomain::kPrefixBlock, other);
      finish_tier_value(forged, TierDomain::kPrefixBlock, key);
      values[key] = forged;
      store->set(std::move(values));
      cache.clear();
      const auto damaged = cache.stats().store.damaged;
      expect_plain_answer(cache, plain, info, request());
      EXPECT_EQ(cache.stats().store.damaged, damaged + 1);
      EXPECT_LT(reused_tokens(cache), 16);
      wait_for_store(cache);  // it erases what was damaged
    }
  }
}

TEST_F(FailingTiers, AMemoryWithoutRoomIsCounted) {
  Options options = above(store);
  options.capacity_bytes = 2'000;
  LayerCache<Module> cache = cache_of(kCausalModel, options);
  expect_plain_answer(cache, plain, info, request());
  EXPECT_EQ(reused_tokens(cache), 0);
  EXPECT_EQ(cache.stats().store.no_room, 1U);
  EXPECT_LE(cache.stats().peak_bytes, options.capacity_bytes);
}

// --- ahead, and from many threads -------------------------------------------------------------------------

TEST_F(FailingTiers, PrefetchBringsThemBeforeTheRequest) {
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  cache.prefetch(request().inputs);
  wait_for_store(cache);
  StoreStats stats = cache.stats().store;
  EXPECT_EQ(stats.prefetches, 1U);
  EXPECT_EQ(stats.hits, 4U);
  const auto asked = store->stats()[0].lookups;
  expect_plain_answer(cache, plain, info, request());
  EXPECT_EQ(reused_tokens(cache), 16);
  EXPECT_EQ(store->stats()[0].lookups, asked) << "the request itself asks for nothing";
  EXPECT_EQ(cache.stats().requests, 1U);
}

TEST_F(FailingTiers, PrefetchRefusesWhatForwardDoes) {
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  EXPECT_THAT([&] { cache.prefetch({}); }, ThrowsError(ErrorCode::kInvalidInput));
  EXPECT_THAT([&] { cache.prefetch(request().inputs, {.fidelity = Fidelity::kThreshold}); },
              ThrowsError(ErrorCode::kInvalidOptions));
  LayerCache<Module> without = cache.with_options({});
  EXPECT_NO_THROW(without.prefetch(request().inputs));
  EXPECT_EQ(without.stats().store.prefetches, 0U);
}

TEST_F(FailingTiers, ManyThreadsOfTwoCachesAgree) {
  LayerCache<Module> first = cache_of(kCausalModel, above(store));
  LayerCache<Module> second = first.with_options(above(store));
  std::vector<at::Tensor> answers;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    answers.push_back(run_plain(plain, request(seed).inputs).toTensor());
  }
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      LayerCache<Module>& cache = t % 2 == 0 ? first : second;
      for (unsigned i = 0; i < 20; ++i) {
        const unsigned seed = (i * 5 + t) % 6;
        if (i % 7 == 3) cache.clear();
        if (i % 4 == 1) cache.prefetch(request(seed).inputs);
        const auto got = cache.forward(request(seed).inputs);
        EXPECT_TRUE(close_on_real(got, answers[seed], request(seed), tolerance_of(info)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  wait_for_store(first);
  wait_for_store(second);
  EXPECT_EQ(first.stats().store.damaged + second.stats().store.damaged, 0U);
  EXPECT_GT(first.stats().store.hits + second.stats().store.hits, 0U);
}

// --- whether it pays --------------------------------------------------------------------------------------

TEST(FetchSpeed, TriesWhatItDoesNotKnow) {
  FetchSpeed speed;
  EXPECT_TRUE(speed.worth(1 << 30, 1));
  speed.computed(100, 50);
  EXPECT_DOUBLE_EQ(speed.compute_ms(10), 5);
  EXPECT_TRUE(speed.worth(1 << 30, 1)) << "how fast the store is has not been measured";
  EXPECT_EQ(speed.values_within(20, 1 << 20), 1U);
}

TEST(FetchSpeed, ComparesFetchingWithComputing) {
  FetchSpeed speed;
  speed.computed(100, 100);      // 1 ms a token
  speed.fetched(1'000'000, 10);  // 100 MB/s
  EXPECT_NEAR(speed.bytes_per_s(), 1e8, 1);
  EXPECT_TRUE(speed.worth(4'000'000, 64));   // 40 ms against 64
  EXPECT_FALSE(speed.worth(4'000'000, 32));  // 40 ms against 32
  EXPECT_EQ(speed.values_within(100, 1'000'000), 5U);
  EXPECT_EQ(speed.values_within(1, 1'000'000), 1U);
}

TEST(FetchSpeed, AStoreThatHasLittleMustAnswerFast) {
  FetchSpeed speed;
  speed.computed(100, 100);  // 1 ms a token
  speed.fetched(0, 2);       // an answer takes 2 ms
  EXPECT_TRUE(speed.worth(1'000, 16)) << "it is not known yet what it has";
  for (int i = 0; i < 100; ++i) speed.found(false);
  EXPECT_FALSE(speed.worth(1'000, 16));
  EXPECT_TRUE(speed.worth(1'000, 160)) << "even one hit in twenty saves more";
  EXPECT_FALSE(speed.worth(1'000, 1));
  for (int i = 0; i < 10; ++i) speed.found(true);
  EXPECT_TRUE(speed.worth(1'000, 16));
}

TEST_F(FailingTiers, WhatIsSlowerThanComputingIsNotAskedFor) {
  Options options = above(store);
  options.store.only_if_faster = true;
  LayerCache<Module> cache = cache_of(kCausalModel, options);
  store->delay_ms = 2'000;  // in time for the deadline, and for nothing else
  expect_plain_answer(cache, plain, info, request(8));
  EXPECT_EQ(cache.stats().store.not_worth, 0U) << "it has to be found out";
  const auto asked = store->stats()[0].lookups;
  for (const std::uint64_t seed : {9, 10, 7}) expect_plain_answer(cache, plain, info, request(seed));
  EXPECT_EQ(cache.stats().store.not_worth, 3U);
  EXPECT_EQ(store->stats()[0].lookups, asked);
  // Who waits for something else may ask.
  cache.prefetch(request(7).inputs);
  wait_for_store(cache);
  EXPECT_EQ(store->stats()[0].lookups, asked) << "the memory has it";
  cache.clear();
  cache.prefetch(request(7).inputs);
  wait_for_store(cache);
  EXPECT_EQ(cache.stats().store.hits, 4U);
}

// --- what is told of it -----------------------------------------------------------------------------------

class ToldOfTiers : public FailingTiers {
 protected:
  /// Why the tokens of the latest call were computed; each has one reason.
  static MissReason told(const LayerCache<Module>& cache) {
    const TokenBalance balance = cache.stats().balance;
    EXPECT_EQ(balance.requested, balance.reused() + balance.computed());
    return cache.last_report().sequences.at(0).miss;
  }
  static std::uint64_t because(const LayerCache<Module>& cache, MissReason reason) {
    return cache.stats().balance.computed_because.at(static_cast<std::size_t>(reason));
  }
};

TEST_F(ToldOfTiers, AStoreThatHadNothingOrGaveNoAnswerIsTheReason) {
  const std::vector<std::pair<StoreOutcome, MissReason>> cases = {{StoreOutcome::kDone, MissReason::kStoreMiss},
                                                                  {StoreOutcome::kTimeout, MissReason::kStoreTimeout},
                                                                  {StoreOutcome::kFailed, MissReason::kStoreFailed},
                                                                  {StoreOutcome::kRefused, MissReason::kStoreFailed}};
  for (const auto& [outcome, reason] : cases) {
    store->outcome = outcome;
    Options options = above(store);
    options.store.deadline_ms = outcome == StoreOutcome::kTimeout ? 5 : 5'000;
    LayerCache<Module> cache = cache_of(kCausalModel, options);
    cache.forward(request(8).inputs);
    EXPECT_EQ(told(cache), reason) << to_string(reason);
    EXPECT_EQ(because(cache, reason), 16U) << to_string(reason);
    EXPECT_THAT(cache.last_report().to_string(), ::testing::HasSubstr(std::string("not reused: ") + to_string(reason)));
    EXPECT_THAT(cache.stats().to_string(), ::testing::HasSubstr(to_string(reason)));
    // What the memory has is not asked for: what is new behind it then was asked of nobody.
    cache.forward(request(8).inputs);
    EXPECT_EQ(because(cache, reason), 16U);
  }
}

TEST_F(ToldOfTiers, WhatFillsNoBlockBehindWhatCameIsNew) {
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  Request longer = right_padded(info, {18}, 7);
  longer.ids().narrow(1, 0, 16).copy_(request().ids());
  cache.forward(longer.inputs);
  EXPECT_EQ(cache.last_report().sequences[0].reused_tokens, 16);
  EXPECT_EQ(told(cache), MissReason::kNew);
  EXPECT_EQ(because(cache, MissReason::kNew), 2U);
}

TEST_F(ToldOfTiers, RowsBehindOneThatTheStoreFailedForAreToldSoToo) {
  store->outcome = StoreOutcome::kFailed;
  LayerCache<Module> cache = cache_of(kCausalModel, above(store));
  cache.forward(right_padded(info, {16, 16, 2}, 3).inputs);
  EXPECT_EQ(because(cache, MissReason::kStoreFailed), 34U);
}

TEST_F(ToldOfTiers, FetchingThatWouldTakeLongerThanComputingIsTheReason) {
  Options options = above(store);
  options.store.only_if_faster = true;
  LayerCache<Module> cache = cache_of(kCausalModel, options);
  store->delay_ms = 500;
  cache.forward(request(8).inputs);
  store->delay_ms = 0;
  cache.forward(request(7).inputs);
  EXPECT_EQ(told(cache), MissReason::kStoreNotWorth);
  EXPECT_EQ(because(cache, MissReason::kStoreNotWorth), 16U);
}

TEST_F(ToldOfTiers, WhatTheMemoryLostIsEvictedUnlessTheStoreGaveNoAnswer) {
  for (const bool fails : {false, true}) {
    store->set({});
    store->outcome = StoreOutcome::kDone;
    Options options = above(store);
    options.capacity_bytes = std::size_t{40} << 10;
    options.store.max_pending_write_bytes = 1;  // nothing is written
    LayerCache<Module> cache = cache_of(kCausalModel, options);
    for (const std::uint64_t seed : {1, 2, 3, 4, 5, 6, 8, 9, 10, 11}) cache.forward(request(seed).inputs);
    ASSERT_GT(cache.stats().evictions, 0U);
    if (fails) store->outcome = StoreOutcome::kFailed;
    const auto before = because(cache, MissReason::kEvicted);
    cache.forward(request(1).inputs);
    EXPECT_EQ(because(cache, MissReason::kEvicted) > before, !fails);
    EXPECT_EQ(because(cache, MissReason::kStoreFailed) > 0, fails);
    EXPECT_EQ(told(cache), fails ? MissReason::kStoreFailed : MissReason::kStoreMiss);
  }
}

TEST(FetchSpeed, TriesNowAndThenWhatDidNotPay) {
  FetchSpeed speed;
  speed.computed(100, 1);
  speed.fetched(1'000'000, 1'000);
  int tried = 0;
  for (int i = 0; i < 1'024; ++i) tried += speed.worth(1'000'000, 1) ? 1 : 0;
  EXPECT_EQ(tried, 4);
}

TEST(FetchSpeed, IgnoresPassesOfFewTokens) {
  FetchSpeed speed;
  speed.computed(1, 100);
  speed.computed(0, 100);
  EXPECT_EQ(speed.compute_ms(1), 0);
}

}  // namespace
}  // namespace llmcache::test
