// Reuse of token states between near-identical sequences of a bidirectional encoder: an edited document, a passage
// under another question, moved text. Tokens that a cached sequence does not have are computed, the others come from
// it, corrected by a sample (execute/corrected_states.h). Approximate: whoever calls decides by measured error what to
// accept.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bank/token_bank.h"
#include "execute/batch.h"
#include "execute/corrected_states.h"
#include "llmcache/report.h"
#include "model/output_positions.h"
#include "model/wrapped_model.h"
#include "reuse/snapshot/snapshot_part.h"

namespace llmcache {

/// What a TokenReuse keeps.
struct TokenReuseOptions {
  /// Layers whose entering states are kept beside keys and values, ascending, 1 to layers - 1. A setting with
  /// full_layers = k needs layer L - k here, a widened sequence the layer where it is widened. Each costs `hidden`
  /// numbers a token; keys and values of one layer cost twice that.
  std::vector<std::int32_t> kept_layers;
  std::int64_t least_tokens = 16;    ///< shorter sequences are neither kept nor looked up: as quick to compute
  std::int64_t least_shifted = 6;    ///< see AlignmentSettings
  std::int64_t least_averaged = 16;  ///< see TokenBank::Settings
  std::int64_t most_averaged = 32;   ///< see TokenBank::Settings; 1: no averaging
  EvictionOptions eviction = {};
  BankFormat format = BankFormat::kAsComputed;  ///< how states are held

  /// Throws Error(kInvalidOptions) that names the field.
  void validate(std::int32_t layers) const;
};

/// How much of a matched sequence is computed. What a calibration chooses.
struct TokenReuseSettings {
  std::int64_t samples = 16;            ///< see ActiveSetSettings; 0: the core only, nothing is corrected
  std::int64_t neighbours = 1;          ///< likewise
  std::int32_t full_layers = 0;         ///< last layers that run on all tokens; 0 to layers - 1
  double max_edit_fraction = 0.5;       ///< sequences with more edits are computed in full
  double max_computed_fraction = 0.75;  ///< likewise, those of which more would be computed: reuse costs time too
  /// A pooled output that is read at marked tokens: these are computed if at most this part of the sequence is marked.
  double max_read_fraction = 0.5;
  /// Where the samples' shift (SampleShift::relative, no unit) in the layers [first_watched, last_watched] is above
  /// this, the sequence is computed in full; where it is not finite, whatever the layer.
  double stop_shift = std::numeric_limits<double>::infinity();
  /// Where it is above this, all tokens run from the next kept layer on.
  double widen_shift = std::numeric_limits<double>::infinity();
  std::int32_t first_watched = 1;
  std::int32_t last_watched = 3;

  /// Throws Error(kInvalidOptions) that names the field.
  void validate(std::int32_t layers, const TokenReuseOptions& options) const;
};

/// Thread-safe.
class TokenReuse {
 public:
  struct Match {
    std::shared_ptr<const TokenEntry> donor;
    TokenAlignment alignment;
    std::vector<std::int64_t> read;  ///< tokens that a pooling mask marks; empty if the model has none
    double edit_fraction = 0;        ///< TokenAlignment::edit_fraction
    std::int64_t shifted = 0;        ///< aligned tokens that stand elsewhere in the donor
  };
  using Matches = std::vector<std::optional<Match>>;  ///< one a row of a batch

  /// A sequence that was computed in full, to be kept or dropped.
  struct Computed {
    RowKey key;
    std::unique_ptr<PendingEntry> states;  ///< null: there is no room to keep them
    double ms = 0;                         ///< its share of the pass
  };
  struct Result {
    c10::IValue value;               ///< the model's, for the whole batch
    std::vector<Computed> computed;  ///< if asked for
    /// By row and layer; empty for rows that were not run with reuse.
    std::vector<std::vector<SampleShift>> shifts;
  };

  /// Throws Error(kNotAvailable) with the reason if states of this model's tokens cannot be reused, and
  /// Error(kInvalidOptions). Runs the model on tiny sequences, also to see that reuse gives back an identical one.
  /// `total`: the account that the bank's is part of; null: of none.
  TokenReuse(const WrappedModel& wrapped, TokenReuseOptions options, std::size_t capacity_bytes,
             MemoryAccount* total = nullptr);

  /// For each row the cached sequence that it has most in common with. Rows without, shorter ones than least_tokens,
  /// and left-padded ones have none.
  [[nodiscard]] Matches find(const Batch& batch, const std::string& tenant);
  /// Token-layers that running a match computes, divided by all of the sequence.
  [[nodiscard]] double computed_fraction(const Match& match, const TokenReuseSettings& settings) const;

  /// Runs a batch that can be packed (check_packable) and has a real token: matched rows with reuse as far as
  /// `settings` allow, the others in full, all in one pass; those that a monitor stopped in a second one. `tenant` and
  /// `capture`: the rows that were computed in full come back in Result::computed, with their states as far as there is
  /// room. Nothing is kept, counted or evicted. Fills `report`.
  [[nodiscard]] Result run(const Batch& batch, const Matches& matches, const TokenReuseSettings& settings,
                           const std::string& tenant, bool capture, ForwardReport& report);

  /// Keeps what run() computed in full, as an entry or in the means of one; evicts for it. Sequences whose states are
  /// not finite are dropped, those without states counted as rejected.
  void keep(std::vector<Computed> computed);

  void clear() { bank_->clear(); }
  void each_bank(const BankVisitor& visit) { visit(*bank_); }
  /// What a snapshot holds of its bank.
  [[nodiscard]] std::unique_ptr<SnapshotPart> snapshot_part();
  [[nodiscard]] TokenBank::Counters counters() const { return bank_->counters(); }
  [[nodiscard]] const OutputPositions& output_positions() const noexcept { return positions_; }
  /// Whether text may be reused in another place than where it was cached.
  [[nodiscard]] bool supports_shift() const noexcept { return supports_shift_; }

 private:
  class Pass;

  [[nodiscard]] StateLayout layout() const;
  [[nodiscard]] std::unique_ptr<TokenBank> make_bank(std::size_t capacity_bytes,
                                                     BankFormat format = BankFormat::kAsComputed,
                                                     MemoryAccount* total = nullptr) const;
  void verify();
  [[nodiscard]] double now() const;
  [[nodiscard]] std::vector<char> left_out() const;
  [[nodiscard]] std::vector<RowKey> keys_of(const Batch& batch, const std::string& tenant) const;
  [[nodiscard]] std::vector<std::int64_t> read_tokens(const Batch& batch, std::int64_t row) const;
  [[nodiscard]] ActiveSet active_set(const Match& match, const TokenReuseSettings& settings) const;
  [[nodiscard]] bool accepts(const Match& match, const TokenReuseSettings& settings) const;
  void run_pass(const Batch& batch, const Matches& matches, const TokenReuseSettings& settings,
                const std::string& tenant, bool capture, Result& result, std::vector<std::int64_t>& stopped,
                ForwardReport& report);
  void run_stopped(const Batch& batch, const std::vector<std::int64_t>& stopped, const std::string& tenant,
                   bool capture, Result& result, ForwardReport& report);

  const WrappedModel& wrapped_;
  const Model& model_;
  const TokenReuseOptions options_;
  const std::int32_t layers_;
  OutputPositions positions_;
  bool supports_shift_ = false;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::unique_ptr<TokenBank> bank_;
};

}  // namespace llmcache
