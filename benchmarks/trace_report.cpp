#include "trace_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "table.h"

namespace llmcache::bench {
namespace {

std::string matrix(const std::string& title, const TraceArguments& arguments, const std::vector<TraceResult>& results,
                   double (Replay::*rate)() const, double unbounded) {
  std::vector<std::string> headers = {title};
  for (const std::int64_t capacity : arguments.capacities) headers.push_back(fmt::format("{}", capacity));
  Table table(headers, 1);
  auto result = results.begin();
  for (const std::string& policy : arguments.policies) {
    std::vector<std::string> cells = {policy};
    for (std::size_t i = 0; i < arguments.capacities.size(); ++i, ++result) {
      cells.push_back(fmt::format("{:.4f}", (result->replay.*rate)()));
    }
    table.add(cells);
  }
  std::vector<std::string> cells(arguments.capacities.size() + 1, fmt::format("{:.4f}", unbounded));
  cells[0] = "no limit";
  table.add(cells);
  return table.text();
}

}  // namespace

std::vector<TraceResult> replay_all(const Trace& trace, const TraceArguments& arguments) {
  std::vector<TraceResult> results;
  for (const std::string& policy : arguments.policies) {
    for (const std::int64_t capacity : arguments.capacities) {
      const auto blocks = static_cast<std::uint64_t>(capacity);
      EvictionOptions options = arguments.eviction;
      if (policy != kBelady) options.policy = eviction_from_string(policy);
      results.push_back(
          {policy, capacity, policy == kBelady ? replay_belady(trace, blocks) : replay(trace, blocks, options)});
    }
  }
  return results;
}

std::string trace_text(const Trace& trace, const TraceArguments& arguments, const std::vector<TraceResult>& results) {
  const Replay unbounded = replay_unbounded(trace);
  return fmt::format("{}: {} requests, {} blocks, {} different ones\n\n{}\n{}", arguments.trace.string(),
                     trace.requests.size(), trace.blocks, trace.distinct,
                     matrix("hit rate at capacity", arguments, results, &Replay::hit_rate, unbounded.hit_rate()),
                     matrix("saved at capacity", arguments, results, &Replay::saved_rate, unbounded.saved_rate()));
}

nlohmann::ordered_json trace_json(const Trace& trace, const TraceArguments& arguments,
                                  const std::vector<TraceResult>& results) {
  const Replay unbounded = replay_unbounded(trace);
  nlohmann::ordered_json json;
  json["trace"] = arguments.trace.filename().string();
  json["requests"] = trace.requests.size();
  json["blocks"] = trace.blocks;
  json["distinct_blocks"] = trace.distinct;
  json["unbounded_hit_rate"] = unbounded.hit_rate();
  json["unbounded_saved_rate"] = unbounded.saved_rate();
  json["settings"] = {{"half_life_s", arguments.eviction.decay.half_life_s},
                      {"small_share", arguments.eviction.s3_fifo.small_share},
                      {"ghost_share", arguments.eviction.s3_fifo.ghost_share},
                      {"hits_to_stay", arguments.eviction.s3_fifo.hits_to_stay}};
  json["results"] = nlohmann::ordered_json::array();
  for (const TraceResult& result : results) {
    json["results"].push_back({{"policy", result.policy},
                               {"capacity", result.capacity},
                               {"hit_rate", result.replay.hit_rate()},
                               {"saved_rate", result.replay.saved_rate()},
                               {"evictions", result.replay.evictions}});
  }
  return json;
}

}  // namespace llmcache::bench
