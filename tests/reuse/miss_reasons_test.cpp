// Why tokens were computed: each reason is brought about, and is the one that is told.
#include <numeric>

#include "budget_support.h"
#include "passages.h"

namespace llmcache::test {
namespace {

std::uint64_t because(const LayerCacheBase& cache, MissReason reason) {
  return cache.stats().balance.computed_because[static_cast<std::size_t>(reason)];
}
std::uint64_t from(const LayerCacheBase& cache, Source source) {
  return cache.stats().balance.reused_from[static_cast<std::size_t>(source)];
}
MissReason told(const LayerCacheBase& cache) { return cache.last_report().sequences.at(0).miss; }

/// Whatever was asked: the parts add up.
void expect_sums(const LayerCacheBase& cache) {
  const Stats stats = cache.stats();
  EXPECT_EQ(stats.balance.requested, stats.tokens);
  EXPECT_EQ(stats.balance.requested, stats.balance.reused() + stats.balance.computed()) << stats.to_string();
  EXPECT_EQ(std::accumulate(stats.sequences_from.begin(), stats.sequences_from.end(), std::uint64_t{0}),
            stats.sequences);
  EXPECT_EQ(stats.times.total.count, stats.requests);
}

/// Bytes that a cache holds after one such request.
std::size_t bytes_of(const std::string& model, const Request& request, const RequestOptions& options = {}) {
  LayerCache<Module> roomy = cache_of(model);
  roomy.forward(request.inputs, options);
  return roomy.stats().bytes;
}

TEST(MissReasons, NewIdenticalAndNewAgainOnceAllWasDropped) {
  const auto request = right_padded(model_info("tiny-bert-sdpa"), {9, 4}, 1);
  LayerCache<Module> cache = cache_of("tiny-bert-sdpa");
  cache.forward(request.inputs);
  EXPECT_EQ(because(cache, MissReason::kNew), 13U);
  cache.forward(request.inputs);
  EXPECT_EQ(from(cache, Source::kIdentical), 13U);
  cache.clear();
  cache.forward(request.inputs);
  EXPECT_EQ(because(cache, MissReason::kNew), 26U);
  expect_sums(cache);
}

TEST(MissReasons, AnOutputThatWentForRoomIsNotNew) {
  const auto info = model_info("tiny-bert-sdpa");
  const auto a = right_padded(info, {40}, 1);
  const auto b = right_padded(info, {40}, 2);
  LayerCache<Module> cache = cache_of(info.name, {.capacity_bytes = bytes_of(info.name, a) * 3 / 2});
  cache.forward(a.inputs);
  cache.forward(b.inputs);
  ASSERT_EQ(cache.stats().evictions, 1U);
  EXPECT_EQ(because(cache, MissReason::kNew), 80U);
  cache.forward(a.inputs);
  EXPECT_EQ(told(cache), MissReason::kEvicted);
  EXPECT_EQ(because(cache, MissReason::kEvicted), 40U);
  cache.forward(a.inputs, {.tenant = "another"});
  EXPECT_EQ(told(cache), MissReason::kNew) << "never known to this one";
  expect_sums(cache);
}

TEST(MissReasons, WhatFoundNoRoomIsNotNew) {
  const auto info = model_info("tiny-bert-sdpa");
  const auto request = right_padded(info, {40}, 1);
  LayerCache<Module> cache = cache_of(info.name, {.capacity_bytes = bytes_of(info.name, request) / 2});
  for (int i = 0; i < 3; ++i) cache.forward(request.inputs);
  EXPECT_EQ(cache.stats().entries, 0U);
  EXPECT_EQ(because(cache, MissReason::kNew), 40U);
  EXPECT_EQ(because(cache, MissReason::kEvicted), 80U);
  expect_sums(cache);
}

TEST(MissReasons, TokensOfAPrefixThatWentAreCounted) {
  const auto info = model_info("tiny-gpt2-sdpa");
  const RequestOptions last{.output = Output::kLastToken};
  const auto a = right_padded(info, {72}, 1);
  const auto b = right_padded(info, {72}, 2);
  Options options;
  options.prefix.capacity_share = 1;
  options.capacity_bytes = bytes_of(info.name, a, last) * 3 / 2;
  LayerCache<Module> cache = cache_of(info.name, options);
  cache.forward(a.inputs, last);
  cache.forward(b.inputs, last);
  ASSERT_GT(cache.stats().evictions, 0U);
  EXPECT_EQ(because(cache, MissReason::kNew), 144U);
  Request half = right_padded(info, {72}, 3);
  half.ids().narrow(1, 0, 50).copy_(a.ids().narrow(1, 0, 50));
  cache.forward(half.inputs, last);
  EXPECT_EQ(cache.last_report().sequences[0].evicted_tokens, 48) << "three blocks of 16";
  EXPECT_EQ(because(cache, MissReason::kEvicted), 48U);
  EXPECT_EQ(because(cache, MissReason::kNew), 144U + 24U);
  cache.forward(b.inputs, last);
  EXPECT_EQ(cache.last_report().sequences[0].evicted_tokens, 72) << "all of it: just this one was there";
  EXPECT_THAT(cache.last_report().to_string(), ::testing::HasSubstr("72 were known once"));
  expect_sums(cache);
}

TEST(MissReasons, PrefixesAndRowsOfOneBatch) {
  const auto info = model_info("tiny-llama-sdpa");
  LayerCache<Module> cache = cache_of(info.name);
  auto request = right_padded(info, {20, 20}, 1);
  request.ids()[1].narrow(0, 0, 12).copy_(request.ids()[0].narrow(0, 0, 12));
  cache.forward(request.inputs);
  EXPECT_EQ(cache.stats().balance.shared, 12U);
  EXPECT_EQ(because(cache, MissReason::kNew), 28U);
  const Request one = request.alone(0);
  auto longer = right_padded(info, {30}, 2);
  longer.ids().narrow(1, 0, 20).copy_(one.ids());
  cache.forward(longer.inputs);
  EXPECT_EQ(from(cache, Source::kPrefix), 20U);
  EXPECT_EQ(because(cache, MissReason::kNew), 38U);
  expect_sums(cache);
}

TEST(MissReasons, NothingIsLookedUpWithoutCapacityWithHooksOrWhereTheCallerSaysSo) {
  const auto info = model_info("tiny-bert-sdpa");
  const auto request = right_padded(info, {9}, 1);
  LayerCache<Module> none = cache_of(info.name, {.capacity_bytes = 0});
  none.forward(request.inputs);
  EXPECT_EQ(told(none), MissReason::kNotLookedUp);

  struct Watcher final : LayerHook {
    HookAction at_layer(LayerStates&) override { return HookAction::kGoOn; }
  };
  LayerCache<Module> hooked = cache_of(info.name);
  hooked.forward(request.inputs, {.hook = std::make_shared<Watcher>()});
  EXPECT_EQ(told(hooked), MissReason::kNotLookedUp);
  EXPECT_EQ(because(hooked, MissReason::kNotLookedUp), 9U);
  expect_sums(hooked);

  LayerCache<Module> similar = cache_of(info.name, {.fidelity = Fidelity::kThreshold});
  similar.forward(request.inputs, {.look_up = false});
  EXPECT_EQ(told(similar), MissReason::kNotLookedUp);
}

TEST(MissReasons, ARequestForThePlainModelIsAFallback) {
  auto request = right_padded(model_info("tiny-bert-sdpa"), {9}, 1);
  request.mask().fill_(2);  // no probe held such a mask
  LayerCache<Module> cache = cache_of("tiny-bert-sdpa");
  cache.forward(request.inputs);
  EXPECT_EQ(because(cache, MissReason::kFallback), 9U);
  expect_sums(cache);
}

TEST(MissReasons, EntriesThatAreTooOldOrWentForRoomInThePapersMode) {
  double now = 1000;
  const auto info = model_info("tiny-bert-sdpa");
  Options options{.fidelity = Fidelity::kThreshold};
  options.threshold.tau = 0.9999;
  options.threshold.fingerprint = {.kind = FingerprintKind::kRaw, .centring = Centring::kOff};
  options.threshold.ttl_seconds = 60;
  options.threshold.cache_layers = {0};
  options.refresh.clock = [&now] { return now; };
  const auto a = right_padded(info, {9}, 1);
  {
    LayerCache<Module> cache = cache_of(info.name, options);
    cache.forward(a.inputs);
    EXPECT_EQ(told(cache), MissReason::kNew);
    cache.forward(a.inputs);
    EXPECT_EQ(from(cache, Source::kSimilar), 9U);
    now += 61;
    cache.forward(a.inputs);
    EXPECT_EQ(told(cache), MissReason::kExpired);
    EXPECT_EQ(because(cache, MissReason::kExpired), 9U);
    EXPECT_EQ(cache.stats().banks.at(0).name, "layer states");
    EXPECT_EQ(cache.stats().banks.at(0).expired, 1U);
    expect_sums(cache);
    options.capacity_bytes =
        static_cast<std::size_t>(static_cast<double>(cache.stats().bytes) * 1.5 / options.threshold.capacity_share);
  }
  LayerCache<Module> small = cache_of(info.name, options);
  small.forward(a.inputs);
  std::uint64_t seed = 2;
  while (small.stats().evictions == 0 && seed < 100) small.forward(right_padded(info, {9}, seed++).inputs);
  ASSERT_GT(small.stats().evictions, 0U);
  small.forward(a.inputs);
  EXPECT_EQ(told(small), MissReason::kEvicted);
  expect_sums(small);
}

TEST(MissReasons, EarlyExitsThatTheBudgetDoesNotAllowAndThoseThatAreAudited) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, 0.1, 0.1};
  options.budget.scores = classes;
  options.budget.audit_rate = 0.3;
  options.budget.token_reuse = false;
  options.budget.exit_layers = {0, 1, 2};
  LayerCache<Module> cache = cache_of(kModel, options);
  ASSERT_TRUE(cache.calibrate(Traffic(1).sample(500)).exit);
  Traffic traffic(2);
  for (int i = 0; i < 60; ++i) cache.forward(traffic.next().inputs);
  EXPECT_GT(from(cache, Source::kEarlyExit), 0U);
  EXPECT_GT(because(cache, MissReason::kOverBudget), 0U);
  EXPECT_GT(because(cache, MissReason::kAudit), 0U);
  EXPECT_EQ(because(cache, MissReason::kNew), 0U) << "each could have left";
  expect_sums(cache);
}

TEST(MissReasons, TokenStatesThatAreNotWorthReusing) {
  const auto info = model_info("tiny-bert-sdpa");
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0;
  LayerCache<Module> cache = cache_of(info.name, options);
  ASSERT_TRUE(cache.calibrate(inputs_of(documents(info, 300, 100))).reuse);
  const auto base = right_padded(info, {40}, 9000);
  cache.forward(base.inputs);
  EXPECT_EQ(told(cache), MissReason::kNew);
  Request edited = base;
  edited.inputs = copy_of(base.inputs);
  edited.ids()[0][20] = 77;
  cache.forward(edited.inputs);
  EXPECT_GT(from(cache, Source::kPartial), 0U);
  Request mostly_other = right_padded(info, {40}, 9001);
  mostly_other.ids().narrow(1, 30, 10).copy_(base.ids().narrow(1, 30, 10));
  cache.forward(mostly_other.inputs);
  EXPECT_EQ(told(cache), MissReason::kNotWorth);
  EXPECT_EQ(because(cache, MissReason::kNotWorth), 40U);
  expect_sums(cache);
}

TEST(MissReasons, AnOutputThatRulesOutSegmentsAndSegmentsThatWent) {
  const auto info = model_info("tiny-llama-sdpa");
  LayerCache<Module> cache = cache_of(info.name, passage_budget());
  PassagePrompts prompt(info);
  const auto profile = cache.calibrate(prompt.sample());
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  const RequestOptions last{.output = Output::kLastToken};
  for (int i = 0; i < 20; ++i) cache.forward(prompt(), last);
  EXPECT_GT(from(cache, Source::kPartial), 0U);
  EXPECT_EQ(because(cache, MissReason::kOutput), 0U);
  cache.forward(prompt(), {.output = Output::kNewTokens});
  EXPECT_GT(because(cache, MissReason::kOutput), 0U);
  expect_sums(cache);

  // Room for a few prompts only.
  Options options = passage_budget();
  options.capacity_bytes = bytes_of(info.name, right_padded(info, {134}, 1), last) * 6;
  LayerCache<Module> small = cache_of(info.name, options);
  small.use_calibration(profile);
  const auto first = right_padded(info, {134}, 500);
  small.forward(first.inputs, last);
  std::uint64_t seed = 501;
  while (small.stats().evictions == 0 && seed < 540) small.forward(right_padded(info, {134}, seed++).inputs, last);
  ASSERT_GT(small.stats().evictions, 0U);
  small.forward(first.inputs, last);
  EXPECT_EQ(because(small, MissReason::kEvicted), 134U);
  expect_sums(small);
}

}  // namespace
}  // namespace llmcache::test
