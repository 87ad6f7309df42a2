// What counting costs a call: counting/totals/ROWS adds a report of so many rows of 12 layers to the totals,
// counting/evicted/TOKENS looks for what was evicted of a sequence all of whose tokens were, counting/nothing_evicted
// for one of which none was.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <random>
#include <vector>

#include "bank/evicted_keys.h"
#include "call_totals.h"
#include "microbench.h"

namespace llmcache::bench {
namespace {

constexpr std::size_t kCountedLayers = 12;

void totals(benchmark::State& state) {
  SequenceReport sequence;
  sequence.tokens = 128;
  sequence.layers.assign(kCountedLayers, {128, 0});
  ForwardReport report;
  report.sequences.assign(static_cast<std::size_t>(state.range(0)), sequence);
  report.layer_ms.assign(kCountedLayers, 0.5);
  report.total_ms = 6;
  CallTotals totals;
  for (auto _ : state) totals.add(report);
}

/// Beside others, as many as are remembered.
void evicted(benchmark::State& state, bool known) {
  std::mt19937_64 random(1);
  constexpr std::size_t kRemembered = std::size_t{1} << 15;
  EvictedKeys keys(kRemembered);
  for (std::size_t i = 0; i < kRemembered; ++i) keys.add(random(), EvictedKeys::Cause::kRoom);
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(state.range(0)));
  for (auto& token : tokens) token = static_cast<std::int64_t>(random() % 50000);
  if (known) add_evicted_prefixes(keys, "tenant", tokens, 1, 0, EvictedKeys::Cause::kRoom);
  for (auto _ : state) benchmark::DoNotOptimize(count_evicted(keys, "tenant", tokens, 1, 0));
}

}  // namespace

void add_counting_benchmarks() {
  benchmark::RegisterBenchmark("counting/totals", totals)->Arg(1)->Arg(8)->Arg(64);
  benchmark::RegisterBenchmark("counting/evicted", evicted, true)->Arg(32)->Arg(512)->Arg(4096);
  benchmark::RegisterBenchmark("counting/nothing_evicted", evicted, false)->Arg(512);
}

}  // namespace llmcache::bench
