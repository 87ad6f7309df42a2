// CacheMetrics: what Prometheus is given.
#include "llmcache/metrics/prometheus.h"

#include <prometheus/text_serializer.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>

#include "budget_support.h"
#include "memory_store.h"
#include "tier_support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr const char* kEncoder = "tiny-bert-sdpa";

/// Sum of a family's samples of one cache; -1: there is no such family.
double sum_of(const std::vector<prometheus::MetricFamily>& families, const std::string& name,
              const std::string& cache = "a") {
  for (const auto& family : families) {
    if (family.name != name) continue;
    double sum = 0;
    for (const auto& metric : family.metric) {
      if (metric.label.at(0).value == cache) sum += metric.counter.value + metric.gauge.value;
    }
    return sum;
  }
  return -1;
}

TEST(CacheMetricsTest, NamesThatNoScrapeCouldHoldAreRefused) {
  LayerCache<Module> cache = cache_of(kEncoder);
  CacheMetrics metrics;
  metrics.add(cache, R"(a "name" \ of its own)");
  for (const char* name : {"", "a\nb", "caf\xe9", "\xff\xfe", "\x7f"}) {
    EXPECT_THAT([&] { metrics.add(cache, name); }, ThrowsError(ErrorCode::kInvalidOptions, "printable ASCII"));
  }
  EXPECT_THAT([&] { metrics.add(cache, R"(a "name" \ of its own)"); },
              ThrowsError(ErrorCode::kInvalidOptions, "already"));
}

TEST(CacheMetricsTest, SamplesAreTheStats) {
  const auto info = model_info(kEncoder);
  LayerCache<Module> cache = cache_of(kEncoder);
  CacheMetrics metrics;
  metrics.add(cache, "a");
  const auto request = right_padded(info, {9, 4}, 1);
  for (int i = 0; i < 3; ++i) cache.forward(request.inputs);
  const auto families = metrics.Collect();
  const auto stats = cache.stats();
  EXPECT_EQ(sum_of(families, "llmcache_requests_total"), 3);
  EXPECT_EQ(sum_of(families, "llmcache_sequences_total"), 6);
  EXPECT_EQ(sum_of(families, "llmcache_tokens_requested_total"), 39);
  EXPECT_EQ(sum_of(families, "llmcache_tokens_reused_total"), 26);
  EXPECT_EQ(sum_of(families, "llmcache_tokens_computed_total"), 13);
  EXPECT_EQ(sum_of(families, "llmcache_prefix_cache_queries_total"), 39);
  EXPECT_EQ(sum_of(families, "llmcache_prefix_cache_hits_total"), 26);
  EXPECT_EQ(sum_of(families, "llmcache_held_bytes"), static_cast<double>(stats.bytes));
  EXPECT_EQ(sum_of(families, "llmcache_bank_bytes"), static_cast<double>(stats.bytes));
  EXPECT_EQ(sum_of(families, "llmcache_bank_entries"), 2);
  EXPECT_EQ(sum_of(families, "llmcache_budget_audits_total"), -1) << "made for no budget";
}

TEST(CacheMetricsTest, StoresBelowTheMemoryAreThereWithTheirNames) {
  const auto request = right_padded(model_info(kEncoder), {9, 4}, 1);
  const auto store = std::make_shared<MemoryStore>();
  LayerCache<Module> first = cache_of(kEncoder, above(store));
  first.forward(request.inputs);
  wait_for_store(first);
  LayerCache<Module> second = first.with_options(above(store));
  second.forward(request.inputs);
  CacheMetrics metrics;
  metrics.add(first, "a");
  metrics.add(second, "b");
  const auto families = metrics.Collect();
  EXPECT_EQ(sum_of(families, "llmcache_tier_writes_total", "a"), 2);
  EXPECT_EQ(sum_of(families, "llmcache_tier_entries_total", "a"), 2) << "misses";
  EXPECT_EQ(sum_of(families, "llmcache_tier_entries_total", "b"), 2) << "hits";
  EXPECT_EQ(sum_of(families, "llmcache_tier_tokens_total", "b"), 13);
  EXPECT_EQ(sum_of(families, "llmcache_tier_open", "b"), 0);
  const std::string text = prometheus::TextSerializer().Serialize(families);
  EXPECT_THAT(text, AllOf(HasSubstr("llmcache_tier_entries_total{cache=\"b\",outcome=\"hit\"} 2\n"),
                          HasSubstr("llmcache_tier_open{cache=\"a\",store=\"memory\"} 0\n")));
  LayerCache<Module> without = first.with_options({});
  metrics.remove("a");
  metrics.remove("b");
  metrics.add(without, "c");
  EXPECT_EQ(sum_of(metrics.Collect(), "llmcache_tier_lookups_total", "c"), -1);
}

TEST(CacheMetricsTest, HistogramsAreCumulative) {
  LayerCache<Module> cache = cache_of(kEncoder);
  CacheMetrics metrics;
  metrics.add(cache, "a");
  const auto request = right_padded(model_info(kEncoder), {9}, 1);
  for (int i = 0; i < 4; ++i) cache.forward(request.inputs);
  std::map<std::string, std::uint64_t> counts;
  for (const auto& family : metrics.Collect()) {
    if (family.type != prometheus::MetricType::Histogram) continue;
    const auto& histogram = family.metric.at(0).histogram;
    counts[family.name] = histogram.sample_count;
    std::uint64_t before = 0;
    for (const auto& bucket : histogram.bucket) {
      EXPECT_GE(bucket.cumulative_count, before);
      before = bucket.cumulative_count;
    }
    EXPECT_EQ(before, histogram.sample_count);
    EXPECT_GT(histogram.sample_sum, 0);
  }
  const std::map<std::string, std::uint64_t> expected = {{"llmcache_request_duration_seconds", 4},
                                                         {"llmcache_lookup_duration_seconds", 4},
                                                         {"llmcache_engine_duration_seconds", 1},  // one ran layers
                                                         {"llmcache_store_duration_seconds", 4}};
  EXPECT_EQ(counts, expected);
}

TEST(CacheMetricsTest, SeveralCachesShareFamiliesAndKeepTheirNames) {
  LayerCache<Module> first = cache_of(kEncoder);
  LayerCache<Module> second = first.with_options({.fidelity = Fidelity::kBudget});
  CacheMetrics metrics;
  metrics.add(first, "a");
  metrics.add(second, "b");
  EXPECT_THAT([&] { metrics.add(second, "a"); }, ThrowsError(ErrorCode::kInvalidOptions, "name"));
  first.forward(right_padded(model_info(kEncoder), {9}, 1).inputs);
  const auto families = metrics.Collect();
  EXPECT_EQ(sum_of(families, "llmcache_requests_total", "a"), 1);
  EXPECT_EQ(sum_of(families, "llmcache_requests_total", "b"), 0);
  EXPECT_EQ(sum_of(families, "llmcache_budget_calibrated", "b"), 0);
  std::set<std::string> names;
  for (const auto& family : families) EXPECT_TRUE(names.insert(family.name).second) << family.name << " comes twice";
  const std::string text = prometheus::TextSerializer().Serialize(families);
  EXPECT_THAT(text, AllOf(HasSubstr("llmcache_tokens_computed_total{cache=\"a\",reason=\"not_looked_up\"} 0\n"),
                          HasSubstr("llmcache_bank_bytes{cache=\"b\",bank=\"outputs\"} 0\n"),
                          HasSubstr("# TYPE llmcache_store_duration_seconds histogram\n")));
  metrics.remove("a");
  EXPECT_THAT(prometheus::TextSerializer().Serialize(metrics.Collect()), Not(HasSubstr("cache=\"a\"")));
}

TEST(CacheMetricsTest, TenantsAreToldByTheirClass) {
  LayerCache<Module> cache = cache_of(kEncoder);
  LayerCache<Module> limited = cache.with_options({.tenants = {.quota_bytes = {{"acme", std::size_t{1} << 20}}}});
  CacheMetrics metrics;
  metrics.add(limited, "a");
  const auto request = right_padded(model_info(kEncoder), {9}, 1);
  limited.forward(request.inputs, {.tenant = "acme"});
  limited.forward(request.inputs);
  limited.forward(request.inputs, {.tenant = "bolt"});
  limited.forward(right_padded(model_info(kEncoder), {9}, 2).inputs, {.tenant = "coil"});
  const auto families = metrics.Collect();
  EXPECT_GE(sum_of(families, "llmcache_tenant_bytes"), 4 * 9 * 4);
  EXPECT_EQ(sum_of(families, "llmcache_tenant_entries"), 4);
  EXPECT_EQ(sum_of(families, "llmcache_bank_quota_evictions_total"), 0);
  EXPECT_EQ(sum_of(families, "llmcache_pins"), 0);
  const std::string text = prometheus::TextSerializer().Serialize(families);
  EXPECT_THAT(text, AllOf(HasSubstr("llmcache_tenant_entries{cache=\"a\",class=\"unnamed\"} 1\n"),
                          HasSubstr("llmcache_tenant_entries{cache=\"a\",class=\"listed\"} 1\n"),
                          HasSubstr("llmcache_tenant_entries{cache=\"a\",class=\"others\"} 2\n"),
                          HasSubstr("reason=\"own_quota\"} 0\n")));
  metrics.remove("a");
  metrics.add(cache, "b");
  EXPECT_EQ(sum_of(metrics.Collect(), "llmcache_tenant_bytes", "b"), -1) << "it is not kept who holds what";
}

TEST(CacheMetricsTest, EveryScrapeAddsUpWhile64ThreadsCall) {
  const auto info = model_info("tiny-gpt2-sdpa");
  LayerCache<Module> cache = cache_of("tiny-gpt2-sdpa", {.capacity_bytes = std::size_t{300} << 10});
  CacheMetrics metrics;
  metrics.add(cache, "a");
  std::vector<Request> pool;
  for (std::uint64_t seed = 0; seed < 12; ++seed) pool.push_back(right_padded(info, {20, 7}, seed / 2 + 1));
  constexpr unsigned kThreads = 64;
  std::atomic<unsigned> running{kThreads};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < 10; ++i) {
        const auto output = (t + i) % 3 == 0 ? Output::kLastToken : Output::kAll;
        cache.forward(pool[(7 * t + i) % pool.size()].inputs, {.output = output});
      }
      --running;
    });
  }
  int scrapes = 0;
  do {
    const auto families = metrics.Collect();
    const double requested = sum_of(families, "llmcache_tokens_requested_total");
    EXPECT_EQ(requested,
              sum_of(families, "llmcache_tokens_reused_total") + sum_of(families, "llmcache_tokens_computed_total"));
    EXPECT_EQ(requested, 27 * sum_of(families, "llmcache_requests_total"));
    EXPECT_EQ(sum_of(families, "llmcache_sequences_total"), 2 * sum_of(families, "llmcache_requests_total"));
    ++scrapes;
  } while (running > 0);
  for (auto& thread : threads) thread.join();
  EXPECT_GT(scrapes, 1);
  EXPECT_EQ(sum_of(metrics.Collect(), "llmcache_requests_total"), 640);
  EXPECT_GT(cache.stats().balance.reused(), 0U);
}

}  // namespace
}  // namespace llmcache::test
