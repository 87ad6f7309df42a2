// The benchmarks of llmcache-microbench that have files of their own.
#pragma once

namespace llmcache::bench {

/// Registers counting/WHAT/SIZE with Google Benchmark.
void add_counting_benchmarks();

}  // namespace llmcache::bench
