// The benchmarks of llmcache-microbench that have files of their own.
#pragma once

namespace llmcache::bench {

/// Registers index/KIND/SHAPE/ENTRIES/WHAT with Google Benchmark.
void add_index_benchmarks();

}  // namespace llmcache::bench
