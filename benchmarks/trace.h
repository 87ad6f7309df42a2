// llmcache-trace: request traces of prefix blocks, replayed against eviction policies without a model. README.md says
// what is measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/eviction.h"

namespace llmcache::bench {

/// One request: its prompt as a chain of blocks. A block stands for all tokens of the prompt up to its end, so equal
/// blocks have equal predecessors, and a block is of use only if all before it in the chain are held too.
struct TraceRequest {
  double time_s = 0;
  std::vector<std::uint32_t> blocks;  ///< numbers below Trace::distinct
};

struct Trace {
  std::vector<TraceRequest> requests;  ///< in the order of the file
  std::uint64_t blocks = 0;            ///< of all requests together
  std::uint32_t distinct = 0;          ///< different blocks
};

/// Reads at most `limit` requests. A hash id must always be behind the same one; empty lines are skipped. Throws
/// Failure that names `name` and the line.
Trace read_trace(std::istream& in, const std::string& name, std::optional<std::int64_t> limit = {});
/// Reads a file. Throws Failure.
Trace read_trace(const std::filesystem::path& path, std::optional<std::int64_t> limit = {});

/// What computing the first `blocks` blocks of a prompt costs: 1 each, and 1/52 for each block before it. At 52 blocks
/// of 512 tokens attention costs a decoder of 7e9 parameters (32 layers of width 4,096) as much as its matrices: 2 *
/// 7e9 FLOP a token against 4 * 32 * 4,096 for each earlier token.
double prefix_cost(std::size_t blocks);

struct Replay {
  std::uint64_t blocks = 0;     ///< asked for
  std::uint64_t hits = 0;       ///< blocks that were held with all before them when their request came
  std::uint64_t evictions = 0;  ///< blocks given up, new ones that were not kept included
  double cost = 0;              ///< of computing all blocks asked for, as prefix_cost
  double saved = 0;             ///< of that, what the hits saved

  [[nodiscard]] double hit_rate() const {
    return blocks == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(blocks);
  }
  [[nodiscard]] double saved_rate() const { return cost > 0 ? saved / cost : 0; }
};

/// Replays the trace against a bank of `capacity` blocks. A request's blocks are used from the last to the first, so
/// that none looks less recently used than those that need it. A policy is told 1 byte of each, and as saved_ms the
/// mean cost of its request's blocks: not its own, which grows along the prompt, as a policy that keeps the later and
/// dearer ones and evicts those before them keeps nothing. Throws Error(kInvalidOptions).
Replay replay(const Trace& trace, std::uint64_t capacity, const EvictionOptions& options);

/// The most hits that any policy can have with `capacity` blocks, which may know the future and may decline to keep a
/// block: MIN (Belady, IBM Systems Journal 5(2), 1966), which evicts the block whose next use is farthest. As a block's
/// next use is never before that of its predecessors, MIN never keeps a block without those, so what it holds is hits.
Replay replay_belady(const Trace& trace, std::uint64_t capacity);

/// Memory without bound: what is asked for again is a hit.
Replay replay_unbounded(const Trace& trace);

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

/// The same for programs.
nlohmann::ordered_json trace_json(const Trace& trace, const TraceArguments& arguments,
                                  const std::vector<TraceResult>& results);

}  // namespace llmcache::bench
