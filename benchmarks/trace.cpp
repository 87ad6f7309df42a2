#include "trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <istream>
#include <iterator>
#include <limits>
#include <memory_resource>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>
#include <utility>

#include "failure.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::bench {
namespace {

/// Gives blocks their dense numbers and checks that each is always behind the same one.
class BlockNumbers {
 public:
  explicit BlockNumbers(const std::string& where) : where_(where) {}

  std::uint32_t number(std::int64_t id, std::optional<std::int64_t> before, std::size_t line) {
    const auto [found, is_new] =
        blocks_.try_emplace(id, Block{static_cast<std::uint32_t>(blocks_.size()), before, line});
    const Block& block = found->second;
    if (!is_new && block.before != before) {
      throw Failure(
          fmt::format("{}, line {}: hash id {} is {} here, but {} in line {}; an id stands for the whole prefix, so it "
                      "must always follow the same one",
                      where_, line, id, place(before), place(block.before), block.line));
    }
    return block.number;
  }

  [[nodiscard]] std::uint32_t size() const { return static_cast<std::uint32_t>(blocks_.size()); }

 private:
  struct Block {
    std::uint32_t number;
    std::optional<std::int64_t> before;
    std::size_t line;
  };

  static std::string place(const std::optional<std::int64_t>& before) {
    return before ? fmt::format("behind {}", *before) : "first";
  }

  const std::string& where_;
  std::unordered_map<std::int64_t, Block> blocks_;
};

TraceRequest parse_request(const std::string& line, std::size_t number, const std::string& name,
                           BlockNumbers& numbers) {
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
    request.blocks.push_back(numbers.number(id, before, number));
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

}  // namespace

Trace read_trace(std::istream& in, const std::string& name, std::optional<std::int64_t> limit) {
  Trace trace;
  BlockNumbers numbers(name);
  std::string line;
  for (std::size_t number = 1; std::getline(in, line); ++number) {
    if (limit && static_cast<std::int64_t>(trace.requests.size()) >= *limit) break;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    trace.requests.push_back(parse_request(line, number, name, numbers));
    trace.blocks += trace.requests.back().blocks.size();
  }
  if (in.bad()) throw Failure(fmt::format("{}: cannot be read to its end", name));
  if (trace.requests.empty()) throw Failure(fmt::format("{}: no request in it", name));
  trace.distinct = numbers.size();
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

}  // namespace llmcache::bench
