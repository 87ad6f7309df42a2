// Reuse beyond the exact prefix in causal models: known passages in a new order (retrieval-augmented prompts), and what
// stands behind an edit. Their keys and values are taken from where they were computed before, turned to their new
// positions, although what stands before them is another text now.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bank/segment_bank.h"
#include "execute/batch.h"
#include "execute/engine.h"
#include "llmcache/options.h"
#include "model/wrapped_model.h"
#include "reuse/deferred_writes.h"
#include "reuse/segment_reuse/segment_pass.h"
#include "reuse/snapshot/snapshot_part.h"

namespace llmcache {

/// Settings of a SegmentReuse.
struct SegmentOptions {
  /// Passages are found by blocks of this many tokens, 1 or more.
  std::size_t block_tokens = 16;
  /// Passages that are met in several sequences are also kept as the mean of their states over up to this many of them,
  /// which is nearer to what a new surrounding makes of them than the states of one. 0 or 1: none are.
  std::uint16_t most_averaged = 16;
  EvictionOptions eviction = {};
  /// How states are held. Where that rounds what the model computes nothing is exact, a known beginning neither.
  BankFormat format = BankFormat::kAsComputed;
};

/// What is known of a sequence.
struct SegmentMatch {
  /// Ascending, without overlap. The first one may be exact: a prefix, whose reuse is lossless where
  /// keeps_exactly().
  std::vector<SegmentHit> segments;
  std::int64_t exact_tokens = 0;  ///< of a prefix whose reuse is lossless
  /// Of all token-layers, those that run() will compute at these settings.
  double computed_fraction = 1;
};

/// Thread-safe.
class SegmentReuse {
 public:
  /// The model must be causal and run any subset of tokens, otherwise
  /// Error(kNotAvailable). It is run a few times: to find how its keys turn with the position, and to see that a
  /// sequence comes out right that takes its beginning from another one; Error(kNotAvailable) if it does not. Throws
  /// what the model throws. `total`: the account that the bank's is part of; null: of none.
  SegmentReuse(const WrappedModel& wrapped, const SegmentOptions& options, std::size_t capacity_bytes,
               MemoryAccount* total = nullptr);

  /// Both throw Error(kInvalidOptions) for settings that do not fit the model, and Error(kNotAvailable) for a
  /// recompute_share between 0 and 1 if its layers are not self-contained.
  ///
  /// What the bank knows of each row; empty where that is nothing. Rows with padding in front are not looked up: in
  /// some models it decides positions.
  [[nodiscard]] std::vector<std::optional<SegmentMatch>> find(const Batch& batch, const std::string& tenant,
                                                              const SegmentSettings& settings);

  /// Runs a batch that can be packed (check_packable) and has a real token. `matches`, one a row, are what find() gave
  /// for it, or less: a row without match is computed in full, an exact segment alone is lossless where
  /// keeps_exactly(). The last token is always computed, unless it belongs to a known prefix. Fills `report`, its
  /// sequences included (Source::kPartial: something is not exact; reused_tokens: the prefix, where its reuse is
  /// lossless). The result covers the tokens that `output` names, where kNewTokens are those behind `reused_tokens`;
  /// all of them where the head is not token-wise. None if these are no tokens. Rows that were computed exactly are
  /// kept once `writes` are taken, unless what comes out is not finite; until then they are the call's own.
  c10::IValue run(const Batch& batch, const std::string& tenant, std::vector<std::optional<SegmentMatch>> matches,
                  const SegmentSettings& settings, Output output, ForwardReport& report, DeferredWrites& writes);
  /// The same, and commits. If it throws nothing of the call is kept.
  c10::IValue run(const Batch& batch, const std::string& tenant, std::vector<std::optional<SegmentMatch>> matches,
                  const SegmentSettings& settings, Output output, ForwardReport& report);

  /// Computes what is not known exactly of each row, and keeps it.
  void keep(const Batch& batch, const std::string& tenant, ForwardReport& report);

  /// How keys turn with their position. Not movable: only segments that stay in their place are found.
  [[nodiscard]] const KeyPositions& positions() const noexcept { return layout_.positions; }
  void clear() { bank_.clear(); }
  void each_bank(const BankVisitor& visit) { visit(bank_); }
  [[nodiscard]] SegmentBank::Counters counters() const { return bank_.counters(); }
  /// True if the format rounds nothing that this model computes: then a known prefix is exact.
  [[nodiscard]] bool keeps_exactly() const noexcept { return bank_.lossless(); }
  /// What a snapshot holds of the bank.
  [[nodiscard]] std::unique_ptr<SnapshotPart> snapshot_part();

 private:
  [[nodiscard]] SegmentBank::Settings bank_settings(const SegmentOptions& options, std::size_t capacity_bytes,
                                                    MemoryAccount* total);
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<SegmentRow> rows_of(const Batch& batch, const std::string& tenant) const;
  [[nodiscard]] std::vector<std::optional<SegmentMatch>> find_in(SegmentBank& bank, const Batch& batch,
                                                                 const std::string& tenant,
                                                                 const SegmentSettings& settings) const;
  c10::IValue run_in(SegmentBank& bank, const Batch& batch, const std::string& tenant,
                     std::vector<std::optional<SegmentMatch>> matches, const SegmentSettings& settings,
                     std::optional<Output> output, ForwardReport& report, DeferredWrites& writes) const;
  void check(const SegmentSettings& settings) const;
  void plan(SegmentRow& row, const SegmentBank& bank, const SegmentSettings& settings) const;
  [[nodiscard]] Selection select(const Plan& plan, const std::vector<SegmentRow>& rows,
                                 std::optional<Output> output) const;
  void verify(const SegmentOptions& options);
  void keep(SegmentBank& bank, SegmentBank::Room room, double ms) const;
  void average_passages(SegmentBank& bank, const SegmentEntry& entry, double saved_ms) const;

  const WrappedModel& wrapped_;
  const Model& model_;
  SegmentLayout layout_;
  const SegmentBank::Settings settings_;
  const std::int64_t most_averaged_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  SegmentBank bank_;
};

}  // namespace llmcache
