// Request traces of prefix blocks, replayed against an eviction policy without a model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <limits>
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

struct Replay {
  std::uint64_t blocks = 0;     ///< asked for
  std::uint64_t hits = 0;       ///< blocks that were held with all before them when their request came
  std::uint64_t evictions = 0;  ///< blocks given up
  [[nodiscard]] double hit_rate() const {
    return blocks == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(blocks);
  }
};

/// Bytes of a block in EntryCost: all are of one size, and a capacity is a number of blocks.
inline constexpr std::size_t kBlockBytes = 1;
/// Milliseconds that a block is said to save, see replay().
double block_cost(std::size_t position);

/// Replays the trace against a bank of `capacity` blocks. For each request the blocks of its longest prefix that is held
/// are hits; all its blocks are then used or inserted, from the last to the first, so that a block never looks less
/// recently used than those that need it; while more than `capacity` are held, the policy's victim goes, be it new.
Replay replay(const Trace& trace, std::uint64_t capacity, const EvictionOptions& options);

/// The most hits that any policy can have with `capacity` blocks, which may know the future and may decline to keep a
/// block: MIN (Belady, IBM Systems Journal 5(2), 1966), which evicts the block whose next use is farthest. As a block's
/// next use is never before that of its predecessors, MIN never keeps a block without those, so what it holds is hits.
Replay replay_belady(const Trace& trace, std::uint64_t capacity);

/// Memory without bound.
Replay replay_unbounded(const Trace& trace);

}  // namespace llmcache::bench
