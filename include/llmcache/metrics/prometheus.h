// What caches did, for Prometheus. Not a part of llmcache.h: this header needs prometheus-cpp (Debian's package
// prometheus-cpp-dev), which the library itself does not. Link llmcache::metrics. docs/operations.md has every metric.
//
//     auto metrics = std::make_shared<llmcache::CacheMetrics>();
//     metrics->add(cache, "embeddings");
//     prometheus::Exposer exposer("127.0.0.1:9464");
//     exposer.RegisterCollectable(metrics);
#pragma once

#include <prometheus/client_metric.h>
#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <prometheus/metric_type.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "llmcache/error.h"
#include "llmcache/layer_cache.h"
#include "llmcache/report.h"
#include "llmcache/store/store_stats.h"
#include "llmcache/time_histogram.h"

namespace llmcache {

/// Metrics of caches, read from LayerCacheBase::stats() when they are collected: between that nothing is done, and
/// calls are held up no longer than stats() holds them up. All samples have a label `cache`.
///
/// In each scrape, for each cache: tokens requested = tokens reused + tokens computed, sequences = sum over sources,
/// and the count of request durations = requests, whatever runs meanwhile.
///
/// Thread-safe.
class CacheMetrics final : public prometheus::Collectable {
 public:
  /// Metrics of `cache` under `name`. The cache must not be moved, and must be there until remove(). Throws
  /// Error(kInvalidOptions) if there is one of this name already, or the name is empty or has other characters than
  /// printable ASCII: Prometheus would reject all that is scraped with it.
  void add(const LayerCacheBase& cache, std::string name) {
    const auto printable = [](char c) { return c >= ' ' && c <= '~'; };
    if (name.empty() || !std::ranges::all_of(name, printable)) {
      throw Error(ErrorCode::kInvalidOptions,
                  "CacheMetrics::add: a name is of printable ASCII characters, one at least");
    }
    const std::lock_guard lock(mutex_);
    if (!caches_.emplace(std::move(name), &cache).second) {
      throw Error(ErrorCode::kInvalidOptions, "CacheMetrics::add: there is a cache of this name already");
    }
  }
  /// The cache of that name, if there is one, is not read any more when this returns.
  void remove(const std::string& name) {
    const std::lock_guard lock(mutex_);
    caches_.erase(name);
  }

  /// All metrics of all caches; a family is there once.
  [[nodiscard]] std::vector<prometheus::MetricFamily> Collect() const override {
    Families all;
    const std::lock_guard lock(mutex_);
    for (const auto& [name, cache] : caches_) {
      const Stats stats = cache->stats();
      all.cache = name;
      add_calls(stats, all);
      add_tokens(stats.balance, all);
      add_times(stats.times, all);
      add_memory(stats, cache->options().capacity_bytes, all);
      add_troubles(stats, all);
      if (stats.budget) add_budget(*stats.budget, all);
      if (!stats.store.tiers.empty()) add_tiers(stats.store, all);
    }
    return std::move(all.families);
  }

 private:
  /// What is collected so far.
  struct Families {
    std::vector<prometheus::MetricFamily> families;
    std::string cache;  ///< whose samples come

    /// A sample in the family of that name, with the label `cache` and, if it has a key, one more.
    prometheus::ClientMetric& sample(const char* name, const char* help, prometheus::MetricType type,
                                     const char* key = nullptr, std::string value = {}) {
      const auto same = [&](const prometheus::MetricFamily& one) { return one.name == name; };
      auto family = std::find_if(families.begin(), families.end(), same);
      if (family == families.end()) {
        families.push_back({name, help, type, {}});
        family = std::prev(families.end());
      }
      prometheus::ClientMetric& metric = family->metric.emplace_back();
      metric.label.push_back({"cache", cache});
      std::replace(value.begin(), value.end(), ' ', '_');
      if (key != nullptr) metric.label.push_back({key, std::move(value)});
      return metric;
    }
    template <class Number>
    void counter(const char* name, const char* help, Number count, const char* key = nullptr, std::string value = {}) {
      sample(name, help, prometheus::MetricType::Counter, key, std::move(value)).counter.value =
          static_cast<double>(count);
    }
    template <class Number>
    void gauge(const char* name, const char* help, Number count, const char* key = nullptr, std::string value = {}) {
      sample(name, help, prometheus::MetricType::Gauge, key, std::move(value)).gauge.value = static_cast<double>(count);
    }
    void histogram(const char* name, const char* help, const TimeHistogram& times) {
      prometheus::ClientMetric::Histogram& out = sample(name, help, prometheus::MetricType::Histogram).histogram;
      out.sample_count = times.count;
      out.sample_sum = times.sum;
      std::uint64_t below = 0;
      for (std::size_t i = 0; i < times.buckets.size(); ++i) {
        below += times.buckets[i];
        const bool last = i == TimeHistogram::kBounds.size();
        out.bucket.push_back({below, last ? std::numeric_limits<double>::infinity() : TimeHistogram::kBounds[i]});
      }
    }
  };

  static void add_calls(const Stats& stats, Families& all) {
    all.counter("llmcache_requests_total", "Calls of forward() that returned", stats.requests);
    for (std::size_t i = 0; i < kSources; ++i) {
      all.counter("llmcache_sequences_total", "Rows of these calls, by where their results came from",
                  stats.sequences_from[i], "source", to_string(static_cast<Source>(i)));
    }
    all.counter("llmcache_layer_tokens_computed_total", "Tokens times layers that ran on them",
                stats.layer_tokens_computed);
    all.counter("llmcache_layer_tokens_reused_total", "Tokens times layers that were spared them",
                stats.layer_tokens_reused);
    all.counter("llmcache_padding_tokens_skipped_total", "Padding tokens that packing did not compute",
                stats.padding_skipped);
  }

  static void add_tokens(const TokenBalance& balance, Families& all) {
    constexpr auto kReused = "llmcache_tokens_reused_total";
    constexpr auto kReusedHelp = "Tokens that were known, or that at least one layer was spared, by where from";
    const auto from = [&](Source source) { return balance.reused_from[static_cast<std::size_t>(source)]; };
    all.counter("llmcache_prefix_cache_queries_total", "Tokens that were asked for", balance.requested);
    all.counter("llmcache_prefix_cache_hits_total", "Tokens of known prefixes and of identical sequences",
                from(Source::kIdentical) + from(Source::kPrefix));
    all.counter("llmcache_tokens_requested_total", "Tokens that were asked for; reused and computed ones together",
                balance.requested);
    for (const Source source :
         {Source::kIdentical, Source::kPrefix, Source::kPartial, Source::kSimilar, Source::kEarlyExit}) {
      all.counter(kReused, kReusedHelp, from(source), "source", to_string(source));
    }
    all.counter(kReused, kReusedHelp, balance.shared, "source", "shared");
    for (std::size_t i = 0; i < kMissReasons; ++i) {
      all.counter("llmcache_tokens_computed_total", "Tokens that were not reused, by the reason",
                  balance.computed_because[i], "reason", to_string(static_cast<MissReason>(i)));
    }
  }

  static void add_times(const CallTimes& times, Families& all) {
    all.histogram("llmcache_request_duration_seconds", "Whole calls of forward()", times.total);
    all.histogram("llmcache_lookup_duration_seconds", "Looking for what is known, of a call", times.lookup);
    all.histogram("llmcache_engine_duration_seconds", "Running the model, of a call that ran layers", times.engine);
    all.histogram("llmcache_store_duration_seconds", "Keeping what was computed, of a call", times.store);
  }

  static void add_memory(const Stats& stats, std::size_t capacity, Families& all) {
    all.gauge("llmcache_capacity_bytes", "What the cache may hold", capacity);
    all.gauge("llmcache_held_bytes", "What it holds, tensors and indexes", stats.bytes);
    all.gauge("llmcache_peak_bytes", "The most that it held at once", stats.peak_bytes);
    for (const BankStats& bank : stats.banks) {
      all.gauge("llmcache_bank_bytes", "What is held, by kind", bank.bytes, "bank", bank.name);
      all.gauge("llmcache_bank_entries", "Entries held, by kind", bank.entries, "bank", bank.name);
      all.counter("llmcache_bank_insertions_total", "Entries kept", bank.insertions, "bank", bank.name);
      all.counter("llmcache_bank_evictions_total", "Entries dropped for room", bank.evictions, "bank", bank.name);
      all.counter("llmcache_bank_quota_evictions_total", "Of these, for the quota of their own tenant",
                  bank.quota_evictions, "bank", bank.name);
      all.counter("llmcache_bank_rejections_total", "Entries not kept for want of room", bank.rejected, "bank",
                  bank.name);
      all.counter("llmcache_bank_expirations_total", "Entries dropped for age", bank.expired, "bank", bank.name);
    }
    for (const TenantClassStats& tenants : stats.tenants) {
      all.gauge("llmcache_tenant_bytes", "What tenants hold as quotas count it, by their class", tenants.bytes, "class",
                tenants.name);
      all.gauge("llmcache_tenant_entries", "Entries of tenants, by their class", tenants.entries, "class",
                tenants.name);
    }
    all.gauge("llmcache_pins", "Prefixes that are held on to", stats.pins);
    all.gauge("llmcache_pinned_bytes", "What these hold on to", stats.pinned_bytes);
  }

  static void add_troubles(const Stats& stats, Families& all) {
    for (const FallbackStats& fallback : stats.fallbacks) {
      all.counter("llmcache_fallbacks_total", "Requests that a mechanism could not serve", fallback.count, "mechanism",
                  fallback.mechanism);
    }
    const VerificationStats& verification = stats.verification;
    all.counter("llmcache_verifications_total", "Answers compared with the plain module's", verification.checks);
    all.counter("llmcache_verification_mismatches_total", "Of these, those that differed", verification.mismatches);
    all.gauge("llmcache_closed_mechanisms", "Mechanisms closed because an answer differed", verification.closed.size());
    all.counter("llmcache_snapshot_saves_total", "Snapshots written", stats.snapshot.saves);
    all.counter("llmcache_snapshot_failures_total", "Snapshots that could not be written", stats.snapshot.failed);
  }

  static void add_budget(const BudgetStats& budget, Families& all) {
    all.gauge("llmcache_budget_calibrated", "1 if a calibration that allows reuse is in force", budget.calibrated);
    all.gauge("llmcache_budget_threshold_index", "Threshold in force: 0 is the certified one", budget.threshold_index);
    all.gauge("llmcache_budget_thresholds", "Thresholds there are; all reuse is stopped where the index is this",
              budget.thresholds);
    all.counter("llmcache_budget_audits_total", "Answers compared with the full computation", budget.audits);
    all.counter("llmcache_budget_audit_errors_total", "Sum of their errors, in the metric of the budget",
                budget.audit_errors);
    all.counter("llmcache_budget_audits_failed_total", "Audits that raised an error", budget.audits_failed);
  }

  static void add_tiers(const StoreStats& store, Families& all) {
    constexpr auto kEntries = "llmcache_tier_entries_total";
    constexpr auto kEntriesHelp = "Entries that stores were asked for, by what came of it";
    constexpr auto kWrites = "llmcache_tier_writes_total";
    constexpr auto kWritesHelp = "Entries that were to be written to stores, by what came of it";
    constexpr auto kAborted = "llmcache_tier_lookups_aborted_total";
    constexpr auto kAbortedHelp = "Look-ups in stores that were given up, by the reason";
    all.counter("llmcache_tier_lookups_total", "Rows for which the stores below the memory were asked", store.lookups);
    all.counter("llmcache_tier_tokens_wanted_total", "Tokens that memory lacked of these rows", store.tokens_wanted);
    all.counter("llmcache_tier_tokens_total", "Tokens that came from stores", store.tokens);
    all.counter(kEntries, kEntriesHelp, store.hits, "outcome", "hit");
    all.counter(kEntries, kEntriesHelp, store.misses, "outcome", "miss");
    all.counter(kEntries, kEntriesHelp, store.damaged, "outcome", "damaged");
    all.counter(kEntries, kEntriesHelp, store.no_room, "outcome", "no room");
    all.counter(kAborted, kAbortedHelp, store.timeouts, "reason", "timeout");
    all.counter(kAborted, kAbortedHelp, store.failures, "reason", "failure");
    all.counter(kAborted, kAbortedHelp, store.not_worth, "reason", "not worth");
    all.counter(kWrites, kWritesHelp, store.writes, "outcome", "written");
    all.counter(kWrites, kWritesHelp, store.writes_known, "outcome", "known");
    all.counter(kWrites, kWritesHelp, store.writes_dropped, "outcome", "dropped");
    all.counter("llmcache_tier_prefetches_total", "Requests that were announced by prefetch()", store.prefetches);
    all.counter("llmcache_tier_read_bytes_total", "Bytes of entries that came from stores", store.bytes_read);
    all.counter("llmcache_tier_written_bytes_total", "Bytes of entries written to stores", store.bytes_written);
    constexpr double kMsPerSecond = 1'000;
    all.counter("llmcache_tier_wait_seconds_total", "Time that calls spent looking in stores",
                store.wait_ms / kMsPerSecond);
    all.gauge("llmcache_tier_waiting", "Entries waiting to be written or fetched ahead", store.waiting);
    for (const TierStats& tier : store.tiers) add_tier(tier, all);
  }

  static void add_tier(const TierStats& tier, Families& all) {
    all.gauge("llmcache_tier_open", "1 while a store is left alone because it failed", tier.open ? 1 : 0, "store",
              tier.name);
    all.counter("llmcache_tier_openings_total", "Times that this began", tier.openings, "store", tier.name);
    all.gauge("llmcache_tier_held_bytes", "What a store holds, where it tells", tier.bytes, "store", tier.name);
    all.gauge("llmcache_tier_held_entries", "Entries that a store holds, where it tells", tier.entries, "store",
              tier.name);
    all.counter("llmcache_tier_evictions_total", "Entries that a store dropped for room, where it tells",
                tier.evictions, "store", tier.name);
  }

  mutable std::mutex mutex_;
  std::map<std::string, const LayerCacheBase*> caches_;  ///< by name
};

}  // namespace llmcache
