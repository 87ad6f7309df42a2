// Results of llmcache-trace.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "trace.h"
#include "trace_arguments.h"

namespace llmcache::bench {

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
