#include "trace.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <istream>
#include <iterator>
#include <limits>
#include <memory_resource>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "command_line.h"
#include "failure.h"
#include "files.h"
#include "llmcache/error.h"
#include "llmcache/version.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"
#include "table.h"

namespace llmcache::bench {
namespace {

struct Block {
  std::uint32_t number = 0;
  std::optional<std::int64_t> before = {};
  std::size_t line = 0;
};
using Blocks = std::unordered_map<std::int64_t, Block>;  // by hash id

std::string place(const std::optional<std::int64_t>& before) {
  return before ? fmt::format("behind {}", *before) : "first";
}

/// Gives blocks their dense numbers and checks that each is always behind the same one.
TraceRequest parse_request(const std::string& line, std::size_t number, const std::string& name, Blocks& blocks) {
  TraceRequest request;
  std::vector<std::int64_t> ids;
  try {
    const nlohmann::json json = parse_bounded_json(line);
    const JsonObject object(json);
    request.time_s = object.number("timestamp") / 1000;
    const auto found = json.find("hash_ids");
    if (found == json.end() || !found->is_array() || found->empty()) {
      throw DamagedData("its 'hash_ids' is no list with a block in it");
    }
    for (const nlohmann::json& id : *found) {
      if (!id.is_number_integer()) throw DamagedData(fmt::format("its 'hash_ids' has {}", shown(id.dump())));
      ids.push_back(id.get<std::int64_t>());  // a number of 2^63 and more wraps: still one number for each
    }
  } catch (const DamagedData& error) {
    throw Failure(fmt::format("{}, line {}: {}; a line is a request, with \"timestamp\" and \"hash_ids\"", name, number,
                              error.what()));
  }
  std::optional<std::int64_t> before;
  for (const std::int64_t id : ids) {
    const Block own{static_cast<std::uint32_t>(blocks.size()), before, number};
    const Block& block = blocks.try_emplace(id, own).first->second;
    if (block.before != before) {
      throw Failure(
          fmt::format("{}, line {}: hash id {} is {} here, but {} in line {}; an id stands for the whole prefix, so it "
                      "must always follow the same one",
                      name, number, id, place(before), place(block.before), block.line));
    }
    request.blocks.push_back(block.number);
    before = id;
  }
  return request;
}

/// One request of `blocks` blocks, the first `hits` of which were held.
void count(Replay& result, std::size_t blocks, std::size_t hits) {
  result.blocks += blocks;
  result.hits += hits;
  result.cost += prefix_cost(blocks);
  result.saved += prefix_cost(hits);
}

constexpr const char* kTraceFile = "traces/mooncake_conversation.jsonl";

constexpr const char* kDescription =
    "llmcache-trace: replays a recorded trace of requests against a bank of prefix blocks, without a model, and "
    "prints\n"
    "what each eviction policy would have reused at each capacity, beside the best that any policy could.";

constexpr const char* kFooter = R"(
benchmarks/README.md explains the trace, how it measures, and the policies.

Exit status: 0, or 2 after an error, which is one line on stderr.

Examples
  llmcache-trace
  llmcache-trace --policy lru,s3fifo --capacity 1000,5000 --json trace.json
  llmcache-trace --policy s3fifo --ghost-share 5
  llmcache-trace --trace mine.jsonl --limit 1000
)";

/// $LLMCACHE_RAW_DATA, else shared/data in a folder above the program.
std::filesystem::path default_trace() {
  const char* variable = std::getenv("LLMCACHE_RAW_DATA");
  if (variable != nullptr && *variable != '\0') {
    auto path = std::filesystem::path(variable) / kTraceFile;
    if (std::filesystem::is_regular_file(path)) return path;
    throw Failure(fmt::format(
        "{} is not there, where LLMCACHE_RAW_DATA points; mend that, or name a trace with --trace", path.string()));
  }
  std::error_code error;
  for (auto folder = program_folder(); folder != folder.parent_path(); folder = folder.parent_path()) {
    auto path = folder / "shared" / "data" / kTraceFile;
    if (std::filesystem::is_regular_file(path, error)) return path;
  }
  throw Failure(
      fmt::format("no trace: {} was found in no folder shared/data above the program; set LLMCACHE_RAW_DATA to the "
                  "folder with the raw data sets, or name a trace with --trace",
                  kTraceFile));
}

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

Trace read_trace(std::istream& in, const std::string& name, std::optional<std::int64_t> limit) {
  Trace trace;
  Blocks blocks;
  std::string line;
  for (std::size_t number = 1; std::getline(in, line); ++number) {
    if (limit && static_cast<std::int64_t>(trace.requests.size()) >= *limit) break;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    trace.requests.push_back(parse_request(line, number, name, blocks));
    trace.blocks += trace.requests.back().blocks.size();
  }
  if (in.bad()) throw Failure(fmt::format("{}: cannot be read to its end", name));
  if (trace.requests.empty()) throw Failure(fmt::format("{}: no request in it", name));
  trace.distinct = static_cast<std::uint32_t>(blocks.size());
  return trace;
}

Trace read_trace(const std::filesystem::path& path, std::optional<std::int64_t> limit) {
  std::ifstream in(path);
  if (!in || std::filesystem::is_directory(path)) {
    throw Failure(fmt::format("{}: cannot be read; give a trace with --trace FILE.jsonl", path.string()));
  }
  return read_trace(in, path.string(), limit);
}

double prefix_cost(std::size_t blocks) {
  constexpr double kBlocksAsDearAsMatrices = 52;
  const auto n = static_cast<double>(blocks);
  return n + n * (n - 1) / 2 / kBlocksAsDearAsMatrices;
}

Replay replay(const Trace& trace, std::uint64_t capacity, const EvictionOptions& options) {
  Replay result;
  EvictionPolicy held(options, std::pmr::new_delete_resource());  // a block's number is its slot
  for (const TraceRequest& request : trace.requests) {
    const auto& blocks = request.blocks;
    const auto missed = std::find_if(blocks.begin(), blocks.end(), [&](auto block) { return !held.contains(block); });
    count(result, blocks.size(), static_cast<std::size_t>(missed - blocks.begin()));
    const double mean_cost = prefix_cost(blocks.size()) / static_cast<double>(blocks.size());
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      if (held.contains(*block)) {
        held.hit(*block, request.time_s);
      } else {
        held.insert(*block, EntryCost{1, mean_cost, std::uint64_t{*block} + 1}, request.time_s);
      }
      for (; held.size() > capacity; ++result.evictions) held.erase(held.victim(request.time_s).value());
    }
  }
  return result;
}

Replay replay_belady(const Trace& trace, std::uint64_t capacity) {
  constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();
  std::vector<std::uint64_t> next_use(trace.blocks);
  std::vector<std::uint64_t> seen(trace.distinct, kNever);
  std::uint64_t position = trace.blocks;
  for (auto request = trace.requests.rbegin(); request != trace.requests.rend(); ++request) {
    for (auto block = request->blocks.rbegin(); block != request->blocks.rend(); ++block) {
      next_use[--position] = std::exchange(seen[*block], position);
    }
  }

  constexpr std::uint64_t kNotHeld = kNever - 1;
  std::vector<std::uint64_t> use_of_held(trace.distinct, kNotHeld);
  std::set<std::pair<std::uint64_t, std::uint32_t>> held;  // by next use
  Replay result;
  for (const TraceRequest& request : trace.requests) {
    std::size_t hits = 0;
    for (const std::uint32_t block : request.blocks) {
      const std::uint64_t next = next_use[position++];
      if (use_of_held[block] != kNotHeld) {
        ++hits;
        held.erase({use_of_held[block], block});
      }
      use_of_held[block] = next;
      held.emplace(next, block);
      if (held.size() > capacity) {
        const auto farthest = std::prev(held.end());
        use_of_held[farthest->second] = kNotHeld;
        held.erase(farthest);
        ++result.evictions;
      }
    }
    count(result, request.blocks.size(), hits);
  }
  return result;
}

Replay replay_unbounded(const Trace& trace) { return replay(trace, trace.distinct, {}); }

TraceArguments parse_trace_arguments(int argc, const char* const* argv) {
  TraceArguments arguments;
  auto& decay = arguments.eviction.decay;
  auto& s3_fifo = arguments.eviction.s3_fifo;
  const auto range = [](double low, double high) { return CLI::Range(low, high).description(""); };
  CLI::App app(kDescription, "llmcache-trace");
  app.footer(kFooter);
  app.set_version_flag("--version", "llmcache-trace " LLMCACHE_VERSION);
  app.add_option("--trace", arguments.trace, "the trace [Mooncake's, see below]")->type_name("FILE");
  const auto add = [&](const char* name, auto& value, const char* type, const char* help) {
    return app.add_option(name, value, help)->type_name(type)->capture_default_str();
  };
  add("--policy", arguments.policies, "NAME", "which policies")
      ->delimiter(',')
      ->check(CLI::IsMember({"lru", "decay", "s3fifo", "gdsf", kBelady}).description(""));
  add("--capacity", arguments.capacities, "N", "capacities in blocks")->delimiter(',')->check(range(1, 1e12));
  add("--half-life", decay.half_life_s, "S", "decay: seconds after which a use counts half");
  add("--small-share", s3_fifo.small_share, "X", "s3fifo: share of the small queue, 0 to 1");
  add("--ghost-share", s3_fifo.ghost_share, "X", "s3fifo: evicted blocks remembered for each block held");
  add("--hits-to-stay", s3_fifo.hits_to_stay, "N", "s3fifo: hits in the small queue that lead to the main one, 1 to 3")
      ->check(range(1, 3));
  add("--limit", arguments.limit, "N", "requests of the trace, from its start; else all")->check(range(1, 1e12));
  add("--json", arguments.json, "FILE", "write the results to this file");

  parse(app, argc, argv);
  try {
    arguments.eviction.validate();
  } catch (const Error& error) {
    throw Failure(fmt::format("{}; llmcache-trace --help lists the options", error.what()));
  }
  if (arguments.trace.empty()) arguments.trace = default_trace();
  return arguments;
}

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
  auto lines = nlohmann::ordered_json::array();
  for (const TraceResult& result : results) {
    lines.push_back({{"policy", result.policy},
                     {"capacity", result.capacity},
                     {"hit_rate", result.replay.hit_rate()},
                     {"saved_rate", result.replay.saved_rate()},
                     {"evictions", result.replay.evictions}});
  }
  return {{"trace", arguments.trace.filename().string()},
          {"requests", trace.requests.size()},
          {"blocks", trace.blocks},
          {"distinct_blocks", trace.distinct},
          {"unbounded_hit_rate", unbounded.hit_rate()},
          {"unbounded_saved_rate", unbounded.saved_rate()},
          {"settings",
           {{"half_life_s", arguments.eviction.decay.half_life_s},
            {"small_share", arguments.eviction.s3_fifo.small_share},
            {"ghost_share", arguments.eviction.s3_fifo.ghost_share},
            {"hits_to_stay", arguments.eviction.s3_fifo.hits_to_stay}}},
          {"results", std::move(lines)}};
}

}  // namespace llmcache::bench
