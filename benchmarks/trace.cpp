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
#include "llmcache/bank/slot_table.h"

namespace llmcache::bench {
namespace {

using Json = nlohmann::json;

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

const Json& field(const Json& object, const char* name, const std::string& where) {
  const auto found = object.find(name);
  if (found == object.end()) throw Failure(fmt::format("{}: no field '{}'", where, name));
  return *found;
}

/// JSON for a message, not longer than a line.
std::string shown(const Json& json) {
  const std::string text = json.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

TraceRequest parse_request(const std::string& line, std::size_t number, const std::string& name,
                           BlockNumbers& numbers) {
  const std::string where = fmt::format("{}, line {}", name, number);
  const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) throw Failure(fmt::format("{}: not a JSON object; expected one request a line", where));

  TraceRequest request;
  const Json& timestamp = field(object, "timestamp", where);
  if (!timestamp.is_number()) {
    throw Failure(fmt::format("{}: 'timestamp' is no number; milliseconds are expected", where));
  }
  request.time_s = timestamp.get<double>() / 1000;

  const Json& ids = field(object, "hash_ids", where);
  if (!ids.is_array() || ids.empty()) {
    throw Failure(fmt::format("{}: 'hash_ids' is no list with a block in it", where));
  }
  std::optional<std::int64_t> before;
  for (const Json& id : ids) {
    if (!id.is_number_integer()) {
      throw Failure(fmt::format("{}: 'hash_ids' has {}; whole numbers are expected", where, shown(id)));
    }
    const auto value = id.get<std::int64_t>();  // a number of 2^63 and more wraps: still one number for each
    request.blocks.push_back(numbers.number(value, before, number));
    before = value;
  }
  return request;
}

/// The blocks that are held, the slots that they have in the policy, and free slots.
class Bank {
 public:
  Bank(std::uint32_t distinct, const EvictionOptions& options)
      : policy_(options, std::pmr::new_delete_resource()), slots_(distinct, kNoSlot) {}

  [[nodiscard]] bool holds(std::uint32_t block) const { return slots_[block] != kNoSlot; }
  [[nodiscard]] std::size_t size() const { return policy_.size(); }

  void use(std::uint32_t block, double cost, double time_s) {
    if (holds(block)) {
      policy_.hit(slots_[block], time_s);
      return;
    }
    std::uint32_t slot = static_cast<std::uint32_t>(blocks_.size());
    if (free_.empty()) {
      blocks_.push_back(block);
    } else {
      slot = free_.back();
      free_.pop_back();
      blocks_[slot] = block;
    }
    slots_[block] = slot;
    policy_.insert(slot, EntryCost{1, cost, std::uint64_t{block} + 1}, time_s);
  }

  void evict(double time_s) {
    const std::uint32_t slot = policy_.victim(time_s).value();
    policy_.erase(slot);
    slots_[blocks_[slot]] = kNoSlot;
    free_.push_back(slot);
  }

 private:
  EvictionPolicy policy_;
  std::vector<std::uint32_t> slots_;   ///< by block
  std::vector<std::uint32_t> blocks_;  ///< by slot
  std::vector<std::uint32_t> free_;
};

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
  Bank bank(trace.distinct, options);
  for (const TraceRequest& request : trace.requests) {
    const auto& blocks = request.blocks;
    const auto missed = std::find_if(blocks.begin(), blocks.end(), [&](auto block) { return !bank.holds(block); });
    count(result, blocks.size(), static_cast<std::size_t>(missed - blocks.begin()));
    const double mean_cost = prefix_cost(blocks.size()) / static_cast<double>(blocks.size());
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      bank.use(*block, mean_cost, request.time_s);
      while (bank.size() > capacity) {
        bank.evict(request.time_s);
        ++result.evictions;
      }
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
