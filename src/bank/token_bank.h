// The states of all tokens of whole sequences, found by the text that they have in common with a new one.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bank/capacity_bank.h"
#include "bank/slot_vector.h"
#include "bank/token_entry.h"
#include "match/shingle_index.h"

namespace llmcache {

/// Thread-safe. Entries live in partitions that never see each other (a tenant, say).
///
/// Averaging (it gains where questions change behind a passage). A sequence that was
/// computed in full and has long runs of tokens in the same places as an entry gets, on these tokens, the mean of the
/// states over all sequences that had them, itself included; the entry that they came from leaves if most of it lives
/// on so (superseded_from). Running passes are not disturbed: entries never change, and live as long as somebody reads
/// them (and count until then). Tokens in other places are not averaged: their states hold the place.
///
/// Memory: tensors are counted before they become an entry, index and containers as they grow; the sum never exceeds
/// the capacity. What a pass computes is its own until keep(), called when its call has succeeded: only that evicts,
/// makes known and counts. Pending entries are limited by the same capacity, of all running passes together, and not
/// part of it. Entries, pending ones too, must not outlive the bank.
class TokenBank final : public CapacityBank {
 public:
  struct Settings {
    std::size_t capacity_bytes = 0;
    EvictionOptions eviction = {};
    StateLayout layout;
    AlignmentSettings alignment = {};
    std::int64_t least_averaged = 16;  ///< shortest run of tokens that is averaged
    std::int64_t most_averaged = 32;   ///< sequences that a mean remembers; 1: nothing is averaged. At most 65535
    /// An entry leaves if this part of its tokens lives on in the mean. Not less than most of it: documents that share
    /// a form are more than the form.
    double superseded_from = 0.75;
    MemoryAccount* total = nullptr;  ///< which the bank's account is part of; null: of none
  };

  struct Candidate {
    std::shared_ptr<const TokenEntry> entry;
    TokenAlignment alignment;
  };

  struct Averages {
    std::uint64_t averaged = 0;  ///< of the insertions, those that were averaged with an entry
  };
  struct Counters : BankCounters, Averages {};

  explicit TokenBank(Settings settings);

  /// The entry that aligns best (smallest edit fraction; among equals the one whose aligned states are the mean over
  /// most), of the `tried` ones with most text in common; empty if none has any. It counts as used.
  std::optional<Candidate> find(std::string_view partition, const TokenView& tokens, double now_s,
                                std::size_t tried = 3);

  /// Room for a sequence that is computed; null if there is no memory for it, or it could not be kept beside the other
  /// pending ones. Changes nothing that is held or counted.
  std::unique_ptr<PendingEntry> reserve(std::int64_t tokens);

  /// Keeps a sequence that was computed in full, and evicts for it. Never fails: what finds no room is counted as
  /// rejected, and so is null. What the bank has already is not kept twice.
  void keep(std::string_view partition, const TokenView& tokens, std::unique_ptr<PendingEntry> pending, double saved_ms,
            double now_s);

  /// An entry, and what it was kept with. Does not hold it.
  struct Listed {
    std::string partition;
    std::weak_ptr<const TokenEntry> entry;
    double saved_ms = 0;
  };
  /// All entries, the one that would be evicted last in front.
  [[nodiscard]] std::vector<Listed> listed();
  /// Keeps an entry of another process as it was there, if there is room without evicting; false: there is none. One
  /// tensor for each spec of the layout.
  bool restore(std::string_view partition, const TokenView& tokens, const std::vector<std::uint16_t>& counts,
               std::vector<EncodedTensor> tensors, double saved_ms, double now_s);
  /// True if it has just these tokens.
  [[nodiscard]] bool knows(std::string_view partition, const TokenView& tokens);
  /// The entry of just these tokens counts as used, if there is one.
  void use(std::string_view partition, const TokenView& tokens, double now_s);

  [[nodiscard]] const StateLayout& layout() const noexcept { return settings_.layout; }
  [[nodiscard]] Counters counters() const;

 private:
  struct Partition {
    std::uint32_t number = 0;
    std::size_t entries = 0;
  };
  using Partitions = std::pmr::map<std::pmr::string, Partition, std::less<>>;
  struct Node {
    std::shared_ptr<const TokenEntry> entry;
    Partitions::iterator partition;
    double saved_ms = 0;
  };

  [[nodiscard]] std::vector<std::shared_ptr<const TokenEntry>> similar(std::string_view partition,
                                                                       const std::vector<std::uint64_t>& hashes,
                                                                       std::size_t limit);
  [[nodiscard]] std::optional<Candidate> best_in_place(std::string_view partition, const TokenView& tokens,
                                                       const std::vector<std::uint64_t>& hashes);
  [[nodiscard]] std::vector<std::uint16_t> average(PendingEntry& pending, const TokenEntry& entry,
                                                   const TokenAlignment& alignment, std::int64_t& averaged) const;
  void average_block(PendingEntry& pending, const TokenEntry& entry, const AlignedBlock& block,
                     std::vector<std::uint16_t>& counts) const;
  void keep_computed(std::string_view partition, const TokenView& tokens, PendingEntry& pending, double saved_ms,
                     double now_s);
  void insert_computed(std::string_view partition, const TokenView& tokens, PendingEntry& pending,
                       const std::vector<std::uint16_t>& counts, const std::vector<std::uint64_t>& hashes,
                       double saved_ms, double now_s);
  void insert_indexed(std::string_view partition, const std::shared_ptr<const TokenEntry>& entry,
                      const std::vector<std::uint64_t>& hashes, double saved_ms, double now_s);
  [[nodiscard]] std::shared_ptr<const TokenEntry> same(std::string_view partition, const TokenView& tokens);
  [[nodiscard]] std::optional<std::uint32_t> slot_of(const TokenEntry* entry) const;
  void use(const TokenEntry* entry, double now_s);
  [[nodiscard]] std::string_view key_of(std::uint32_t slot) const noexcept override {
    return nodes_[slot].partition->first;
  }
  void remove(std::uint32_t slot) noexcept override;
  void remove_all() noexcept override;
  void drop_if_empty(Partitions::iterator partition) noexcept;

  const Settings settings_;
  MemoryAccount pending_;  ///< of running passes
  Partitions partitions_;
  SlotVector<Node> nodes_;
  ShingleIndex index_;  ///< of slots
  std::uint32_t next_partition_ = 0;
  Averages averages_;
};

}  // namespace llmcache
