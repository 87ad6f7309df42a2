// What a call did (ForwardReport) and what the cache did since it was made (Stats).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace llmcache {

/// Where the result of a sequence came from.
enum class Source {
  kComputed,   ///< all its tokens were computed
  kIdentical,  ///< the whole output of an identical earlier request
  kPartial,    ///< some tokens computed, the states of others taken from a donor (forced Plan)
};

const char* to_string(Source source) noexcept;

/// How the layers were run.
enum class Execution {
  kNone,    ///< nothing was run: every sequence was known
  kDense,   ///< as the plain model runs: [batch, tokens, hidden], padding included
  kPacked,  ///< real tokens only: [1, sum of active tokens, hidden]
};

const char* to_string(Execution execution) noexcept;

/// Token counts of one layer of one sequence. Padding counts nowhere.
struct LayerTokens {
  std::int32_t computed = 0;
  std::int32_t reused = 0;
};

/// One sequence (row of the batch) of a call.
struct SequenceReport {
  std::int64_t tokens = 0;            ///< real tokens, padding excluded
  Source source = Source::kComputed;  ///
  double similarity = 0;              ///< to the entry it was taken from; 1 for identical, 0 for none
  std::vector<LayerTokens> layers;    ///< one a layer
};

/// What one call of LayerCache::forward did. Times are wall-clock milliseconds.
struct ForwardReport {
  Execution execution = Execution::kNone;
  std::vector<SequenceReport> sequences;  ///< one a row, in the order of the batch
  std::vector<double> layer_ms;           ///< one a layer; 0 for a layer that was not run
  double lookup_ms = 0;                   ///< checking inputs, keys and look-up
  double embed_ms = 0;                    ///< the model's work before its first layer
  double head_ms = 0;                     ///< the model's work behind its last layer
  double store_ms = 0;                    ///< keeping what was computed
  double total_ms = 0;                    ///< the whole call

  /// Token-layers computed divided by (real tokens x layers); 0 if nothing was computed.
  [[nodiscard]] double computed_fraction() const noexcept;
  /// A table of the above for people.
  [[nodiscard]] std::string to_string() const;
};

/// Totals since construction. Counters never go back, clear() included; `entries` and `bytes` are
/// what is held now.
struct Stats {
  std::uint64_t requests = 0;         ///< calls of forward that returned
  std::uint64_t sequences = 0;        ///< rows in them
  std::uint64_t identical_hits = 0;   ///< rows answered from an identical request
  std::uint64_t tokens = 0;           ///< real tokens asked for
  std::uint64_t tokens_computed = 0;  ///< tokens that went through at least one layer
  std::uint64_t padding_skipped = 0;  ///< padding tokens that packing did not compute
  std::uint64_t insertions = 0;       ///< entries kept
  std::uint64_t evictions = 0;        ///< entries dropped for room
  std::uint64_t rejected = 0;         ///< entries too large for the capacity
  std::uint64_t entries = 0;          ///< entries held now
  std::size_t bytes = 0;              ///< bytes held now, tensors and index
  std::size_t peak_bytes = 0;         ///< largest `bytes` so far; never above the capacity

  [[nodiscard]] double hit_rate() const noexcept;  ///< identical_hits / sequences
  [[nodiscard]] std::string to_string() const;
};

}  // namespace llmcache
