// llmcache-trace: its command line and its results.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/eviction.h"
#include "trace.h"

namespace llmcache::bench {

/// The optimum's name among the policies.
inline constexpr const char* kBelady = "belady";

struct TraceArguments {
  std::filesystem::path trace;
  std::vector<std::string> policies = {"lru", "decay", "s3fifo", "gdsf", kBelady};
  std::vector<std::int64_t> capacities = {1000, 5000, 10000, 50000};  ///< blocks
  EvictionOptions eviction;                                           ///< settings of the policies
  std::optional<std::int64_t> limit;
  std::optional<std::filesystem::path> json;
};

/// Throws Failure for a bad command line, or if no trace is named and the default one is not found; HelpAsked for
/// --help and --version.
TraceArguments parse_trace_arguments(int argc, const char* const* argv);

/// One policy at one capacity.
struct TraceResult {
  std::string policy;
  std::int64_t capacity = 0;  ///< blocks
  Replay replay;
};

/// All policies at all capacities, in the order of the arguments.
std::vector<TraceResult> replay_all(const Trace& trace, const TraceArguments& arguments);

/// For people: a line on the trace, then hit rate and saved cost, one line a policy, one column a capacity.
std::string trace_text(const Trace& trace, const TraceArguments& arguments, const std::vector<TraceResult>& results);

/// For programs: trace, requests, blocks, distinct_blocks, unbounded_hit_rate, unbounded_saved_rate, settings, and
/// results[] of policy, capacity, hit_rate, saved_rate, evictions.
nlohmann::ordered_json trace_json(const Trace& trace, const TraceArguments& arguments,
                                  const std::vector<TraceResult>& results);

}  // namespace llmcache::bench
