// What a call did (ForwardReport) and what the cache did since it was made (Stats).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/model/verified_envelope.h"
#include "llmcache/snapshot.h"
#include "llmcache/store/store_stats.h"
#include "llmcache/time_histogram.h"

namespace llmcache {

/// Where the result of a sequence came from.
enum class Source {
  kComputed,   ///< all its tokens were computed
  kIdentical,  ///< the whole output of an identical earlier request
  kPrefix,     ///< its first tokens were known, the others were computed
  kPartial,    ///< some tokens computed, the states of others taken from elsewhere (kBudget, forced Plan)
  kSimilar,    ///< the hidden state of another request, above the threshold (kThreshold)
  kEarlyExit,  ///< an answer made before its last layer had run (kBudget)
};

inline constexpr std::size_t kSources = 6;
const char* to_string(Source source) noexcept;

/// Why a token was computed. Numbers and names stay; new ones are added at the end.
enum class MissReason {
  kNew,            ///< nothing that was asked knew it, nor remembers that it did
  kEvicted,        ///< it was known and had to go for room, or there was no room to keep it
  kExpired,        ///< it was known and became too old (TenantOptions, kThreshold), or was used too little (kThreshold)
  kNotWorth,       ///< what is known of its sequence would save less than it costs (kBudget, token reuse)
  kOverBudget,     ///< what could be reused is not near enough for the error budget, or supervision has stopped it
  kOutput,         ///< nothing knew it, and the output asked for ruled out a mechanism that might have (kBudget)
  kNotLookedUp,    ///< nothing was asked: hooks, no capacity, closed mechanisms, a batch or a model that keeps none
  kAudit,          ///< it could have been reused, and was computed to see whether that would have been right
  kFallback,       ///< a mechanism failed, or only the plain model was trusted with the request (Stats::fallbacks)
  kOwnQuota,       ///< it was known and went, or was not kept, because its tenant had used up its quota (TenantOptions)
  kOtherTenant,    ///< it was known and went to make room for another tenant (told if TenantOptions::accounts())
  kStoreMiss,      ///< a store was asked, and had none of it (StoreOptions)
  kStoreTimeout,   ///< a store was asked, and did not answer in time
  kStoreFailed,    ///< a store was asked, and failed, or is left alone because it failed before
  kStoreNotWorth,  ///< a store may have it, and fetching it was expected to take longer than computing it
};

inline constexpr std::size_t kMissReasons = 15;
/// "new", "over budget".
const char* to_string(MissReason reason) noexcept;

/// How the layers were run.
enum class Execution {
  kNone,    ///< nothing was run: every sequence was known
  kDense,   ///< as the plain model runs: [batch, tokens, hidden], padding included
  kPacked,  ///< real tokens only: [1, sum of active tokens, hidden]; of several passes, one at least
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
  Source source = Source::kComputed;  ///< where its result came from
  double similarity = 0;              ///< to the entry it was taken from; 1 for identical, 0 for none
  std::int64_t reused_tokens = 0;     ///< kPrefix, kIdentical: length of the prefix that was known before the call
  std::int64_t shared_tokens = 0;     ///< tokens behind that prefix which another row of the same batch computes for it
  std::int64_t evicted_tokens = 0;    ///< tokens behind these that were known once, as far as is remembered
  MissReason evicted_because = MissReason::kEvicted;  ///< why the first of these went; it may be that of kExpired,
                                                      ///< kOwnQuota and kOtherTenant too
  MissReason miss = MissReason::kNew;                 ///< why the other tokens were computed, if any were
  std::uint64_t number = 0;                           ///< of this sequence: all of a cache's are numbered from 0
  std::int64_t entry = -1;          ///< kSimilar: number of the sequence whose state was used, -1 for one of a
                                    ///< snapshot. Else -1
  std::int64_t resumed_layer = -1;  ///< kSimilar: first layer that ran on that state (L: none). kPrefix: first
                                    ///< layer that the known prefix does not run through. kEarlyExit: first
                                    ///< layer that did not run for it. Else -1
  double expected_error = 0;        ///< kEarlyExit: what its gate expects
  bool audited = false;  ///< a hit that was computed in full too, which is what was answered: source is kComputed
  double error = 0;      ///< that the audit found: relative L2 between what would have been served and that
                         ///< (kThreshold), or its error in the metric of the budget (kBudget)
  std::vector<LayerTokens> layers;  ///< one a layer
  std::int64_t source_tokens = 0;   ///< of an encoder-decoder: tokens of the row's source
  std::int64_t source_reused = 0;   ///< of these, not computed for this row: known, or computed for another row
};

/// Requests that a mechanism could not serve, so that a plainer one did.
struct FallbackStats {
  std::string mechanism;    ///< name of the strategy, or "verification", "request"; docs/errors.md
  std::uint64_t count = 0;  ///< requests
  std::string last_reason;  ///< of the latest one
};

/// What comparing answers with the plain module found (Options::verify_rate).
struct VerificationStats {
  std::uint64_t checks = 0;         ///< answers that were compared
  std::uint64_t first_uses = 0;     ///< of these, the first of their size (VerifiedEnvelope)
  std::uint64_t mismatches = 0;     ///< of these, those that differed
  std::uint64_t failed = 0;         ///< comparisons that could not be made: the plain module raised
  std::uint64_t waiting = 0;        ///< not made yet (Options::verify_in_background)
  std::uint64_t dropped = 0;        ///< for which there was no room in the queue
  std::vector<std::string> closed;  ///< mechanisms that were closed for good, each with the reason
  VerifiedEnvelope envelope;        ///< what was compared so far
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
  double verify_ms = 0;                   ///< of it, comparing the answer with the plain module's
  std::int64_t padding_skipped = 0;       ///< padding tokens that packing did not compute
  bool verified = false;                  ///< this answer was compared with the plain module's, within the call
  bool replaced = false;                  ///< it differed from that, which was returned in its place
  std::string fallback;                   ///< why a mechanism did not serve this call; empty: all did what they should

  /// Token-layers computed divided by (real tokens x layers); 0 if nothing was computed.
  [[nodiscard]] double computed_fraction() const noexcept;
  /// One line for a log: rows by source, tokens known and computed, milliseconds, and a fallback if there was one.
  [[nodiscard]] std::string summary() const;
  /// A table of the above for people; ends in a newline.
  [[nodiscard]] std::string to_string() const;
};

/// Every token that was asked for, in one part each: reused, by where from, or computed, by why. A token counts as
/// reused if it was known before the call (kIdentical, kPrefix), if another row of its batch computed it, or if at
/// least one layer was spared it (kPartial, kSimilar, kEarlyExit).
struct TokenBalance {
  std::uint64_t requested = 0;                                 ///< real tokens
  std::array<std::uint64_t, kSources> reused_from{};           ///< by Source; none of kComputed
  std::uint64_t shared = 0;                                    ///< computed by another row of the same batch
  std::array<std::uint64_t, kMissReasons> computed_because{};  ///< by MissReason

  /// Adds those of one call.
  void add(const ForwardReport& report) noexcept;
  [[nodiscard]] std::uint64_t reused() const noexcept;    ///< sum of the parts
  [[nodiscard]] std::uint64_t computed() const noexcept;  ///< likewise; requested() = reused() + computed()
};

/// What the calls took, seconds. A part that a call did not have is not in its histogram.
struct CallTimes {
  TimeHistogram lookup;  ///< ForwardReport::lookup_ms
  TimeHistogram engine;  ///< embed_ms, layer_ms and head_ms, of calls that ran layers by parts
  TimeHistogram store;   ///< store_ms
  TimeHistogram total;   ///< total_ms: `count` is Stats::requests
};

/// One kind of what is kept; of kinds with several banks all of them.
struct BankStats {
  /// "outputs", "prefixes", "sources", "segments", "token states", "early exits", "layer states"
  std::string name;
  std::uint64_t entries = 0;          ///< held now
  std::size_t bytes = 0;              ///< held now, tensors and index
  std::uint64_t insertions = 0;       ///< entries kept
  std::uint64_t evictions = 0;        ///< for room
  std::uint64_t rejected = 0;         ///< for which there was no room
  std::uint64_t expired = 0;          ///< too old, or used too little
  std::uint64_t quota_evictions = 0;  ///< of the evictions, for the quota of the entry's own tenant
};

/// What the tenants of a class hold, in all banks. Told if TenantOptions::accounts().
struct TenantClassStats {
  /// "unnamed": requests without a tenant; "listed": tenants of TenantOptions::quota_bytes; "others".
  std::string name;
  std::uint64_t entries = 0;  ///< held now
  std::size_t bytes = 0;      ///< that quotas count: with keys and what the index takes for them
};

/// What the divergence monitor (RefreshOptions) and the bank of one cached layer did. Threshold mode only.
struct LayerStats {
  std::int64_t layer = 0;              ///< whose output is kept, from 0
  double tau = 0;                      ///< in force now
  std::uint64_t hits = 0;              ///< sequences that went on from here
  std::uint64_t entries = 0;           ///< held now
  std::size_t bytes = 0;               ///< held now, tensors and index
  std::size_t peak_bytes = 0;          ///< never above the layer's share of the capacity
  std::uint64_t insertions = 0;        ///< entries kept
  std::uint64_t evictions = 0;         ///< for room
  std::uint64_t rejected = 0;          ///< larger than the layer's share
  std::uint64_t expired = 0;           ///< by TTL
  std::uint64_t decayed = 0;           ///< by the temporal decay flush
  std::uint64_t audits = 0;            ///< hits computed in full too
  std::uint64_t audited_entries = 0;   ///< entries held that were audited
  std::uint64_t dropped = 0;           ///< entries over tolerance
  std::uint64_t decision_changes = 0;  ///< audits with another decision
  double cosine_error_mean = 0;        ///< of the audits: 1 - cosine
  double cosine_error_max = 0;
  double relative_error_mean = 0;  ///< of the audits: relative L2
  double relative_error_max = 0;
};

/// What Fidelity::kBudget did.
struct BudgetStats {
  bool calibrated = false;                    ///< a calibration that allows reuse is in force
  std::size_t threshold_index = 0;            ///< of its thresholds, in force now: 0 is the certified one, further ones
                                              ///< are safer; `thresholds`: supervision has stopped all reuse
  std::size_t thresholds = 0;                 ///< there are
  std::uint64_t early_exits = 0;              ///< sequences
  std::uint64_t token_reuses = 0;             ///< sequences of which token states were taken from a near-identical one
  std::uint64_t segment_reuses = 0;           ///< sequences of which segments beyond an exact prefix were known
  std::vector<std::uint64_t> exits_by_layer;  ///< of these, by the first layer that did not run
  std::uint64_t audits = 0;                   ///< answers compared with the full computation
  double audit_errors = 0;                    ///< sum of their errors
  std::uint64_t audits_waiting = 0;           ///< background audits not made yet
  std::uint64_t audits_dropped = 0;   ///< background audits there was no time for: after 64 in a row nothing is reused
  std::uint64_t audits_failed = 0;    ///< audits that raised an error: after 8 in a row nothing is reused
  std::string audit_failure;          ///< reason of the latest one
  std::uint64_t closings = 0;         ///< times that supervision stopped a threshold
  std::uint64_t reopenings = 0;       ///< times that it allowed one again
  std::size_t bytes = 0;              ///< of the calibrated banks
  std::size_t calibrating_bytes = 0;  ///< what a calibration that is running holds now, beside all other bytes
};

/// Totals since construction. Counters never go back, clear() included; `entries` and `bytes` are
/// what is held now. What calls add (requests to padding_skipped but for similar_hits, balance, times) is that of whole
/// calls, of the same ones for all of it.
struct Stats {
  std::uint64_t requests = 0;         ///< calls of forward that returned
  std::uint64_t sequences = 0;        ///< rows in them
  std::uint64_t identical_hits = 0;   ///< rows answered from an identical request
  std::uint64_t prefix_hits = 0;      ///< rows of which a part was known (kLossless, causal models)
  std::uint64_t tokens_reused = 0;    ///< real tokens of these, and of identical requests, that were known
  std::uint64_t source_tokens = 0;    ///< of encoder-decoders: tokens of the sources of all rows
  std::uint64_t source_reused = 0;    ///< of these, not computed for their row: known, or computed for another row
  std::uint64_t similar_hits = 0;     ///< rows that went on from another request's state (kThreshold)
  std::uint64_t tokens = 0;           ///< real tokens asked for
  std::uint64_t tokens_computed = 0;  ///< tokens that went through at least one layer
  std::uint64_t padding_skipped = 0;  ///< padding tokens that packing did not compute
  std::array<std::uint64_t, kSources> sequences_from{};  ///< of the sequences, by Source
  std::uint64_t layer_tokens_computed = 0;               ///< tokens times layers that ran on them
  std::uint64_t layer_tokens_reused = 0;                 ///< tokens times layers that were spared them
  TokenBalance balance;                                  ///< of the tokens: requested = reused + computed, with reasons
  CallTimes times;                                       ///< of the requests
  std::uint64_t insertions = 0;                          ///< entries kept
  std::uint64_t evictions = 0;                           ///< entries dropped for room
  std::uint64_t rejected = 0;                            ///< entries too large for the capacity
  std::uint64_t entries = 0;                             ///< entries held now
  std::size_t bytes = 0;                                 ///< bytes held now, tensors and index
  std::size_t peak_bytes = 0;                            ///< largest `bytes` so far; never above the capacity
  std::uint64_t unusable_states = 0;      ///< sequences whose states were not finite, or had no fingerprint: not kept
  std::vector<BankStats> banks;           ///< one a kind of what is kept
  std::vector<TenantClassStats> tenants;  ///< one a class; empty where it is not kept who holds what
  std::uint64_t pins = 0;                 ///< of prefixes, in force now (LayerCacheBase::pin())
  std::size_t pinned_bytes = 0;           ///< that they hold on to
  std::vector<LayerStats> layers;         ///< one a cached layer, shallow to deep; empty without kThreshold
  std::optional<BudgetStats> budget;      ///< of a cache made for kBudget
  std::vector<FallbackStats> fallbacks;   ///< one a mechanism that did not serve every request it should have
  VerificationStats verification;
  SnapshotStats snapshot;  ///< of save(), load() and Options::snapshot
  StoreStats store;        ///< of Options::store

  [[nodiscard]] double hit_rate() const noexcept;  ///< all hits, early exits among them, / sequences
  /// A few lines for people; ends in a newline.
  [[nodiscard]] std::string to_string() const;
};

}  // namespace llmcache
