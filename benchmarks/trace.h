// Request traces of prefix blocks, replayed against an eviction policy without a model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
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

/// Reads a trace: one JSON object a line with "timestamp" (milliseconds) and "hash_ids" (integers, each once in a
/// request, each always behind the same one); other fields are not looked at, empty lines are skipped. At most `limit`
/// requests. Throws Failure that names `name` and the line.
Trace read_trace(std::istream& in, const std::string& name, std::optional<std::int64_t> limit = {});
/// Reads a file. Throws Failure.
Trace read_trace(const std::filesystem::path& path, std::optional<std::int64_t> limit = {});

/// What computing the first `blocks` blocks of a prompt costs, in units of one block's matrix products: each block
/// costs 1, and 1/52 for each block before it, which its tokens attend to. 52 blocks are 26,700 tokens of 512 a block,
/// where attention costs a decoder of 7e9 parameters (32 layers of width 4,096) as much as its matrices: 2 * 7e9 FLOP a
/// token against 4 * 32 * 4,096 for each earlier token.
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

/// Replays the trace against a bank of `capacity` blocks. For each request the blocks of its longest prefix that is
/// held are hits; all its blocks are then used or inserted, from the last to the first, so that a block never looks
/// less recently used than those that need it; while more than `capacity` are held, the policy's victim goes, be it
/// new.
///
/// What a policy is told about a block (EntryCost): 1 byte, as all blocks are of one size and a capacity is a number of
/// blocks; its number as key; and as saved_ms the mean cost of the blocks of the request that it came with. Not its own
/// cost, which grows along the prompt: a block is of use only with all before it, so a policy that keeps the later and
/// dearer ones and evicts the earlier ones keeps nothing. Throws Error(kInvalidOptions).
Replay replay(const Trace& trace, std::uint64_t capacity, const EvictionOptions& options);

/// The most hits that any policy can have with `capacity` blocks, which may know the future and may decline to keep a
/// block: MIN (Belady, IBM Systems Journal 5(2), 1966), which evicts the block whose next use is farthest. As a block's
/// next use is never before that of its predecessors, MIN never keeps a block without those, so what it holds is hits.
Replay replay_belady(const Trace& trace, std::uint64_t capacity);

/// Memory without bound: what is asked for again is a hit.
Replay replay_unbounded(const Trace& trace);

}  // namespace llmcache::bench
