// The command line of llmcache-trace.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/eviction.h"

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

/// Nothing to do: help was asked for and is in `text`.
struct TraceHelpAsked {
  std::string text;
};

/// Throws Failure for a bad command line, or if no trace is named and the default one is not found; TraceHelpAsked for
/// --help and --version.
TraceArguments parse_trace_arguments(int argc, const char* const* argv);

}  // namespace llmcache::bench
