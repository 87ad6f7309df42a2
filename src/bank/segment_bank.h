// States of whole sequences, found by any run of their tokens, and means of those of passages that several of them
// have.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bank/capacity_bank.h"
#include "bank/prefix_bank.h"
#include "bank/slot_vector.h"
#include "bank/stored_states.h"
#include "match/block_hash_index.h"

namespace llmcache {

/// What a SegmentEntry has the states of.
struct SegmentOrigin {
  std::int64_t position = 0;   ///< of its first token, which its keys are turned to; above 0 only of a passage
  std::uint16_t averaged = 1;  ///< sequences that they are the mean over; 1: those of one whole sequence
};

/// States of one sequence that was computed in full, or means of those of a passage, one tensor a KeySpec. Written
/// while it is pending, as the working memory of a pass, before the bank takes it over; then immutable. Must not
/// outlive its bank.
class SegmentEntry {
 public:
  SegmentEntry(std::string_view partition, std::span<const std::int64_t> tokens, SegmentOrigin origin,
               const std::vector<KeySpec>& specs, BankFormat format, std::pmr::memory_resource* memory);
  SegmentEntry(const SegmentEntry&) = delete;
  SegmentEntry& operator=(const SegmentEntry&) = delete;

  [[nodiscard]] std::string_view partition() const noexcept { return partition_; }
  /// Token after token.
  [[nodiscard]] std::span<const std::int64_t> tokens() const noexcept { return tokens_; }
  [[nodiscard]] const SegmentOrigin& origin() const noexcept { return origin_; }
  [[nodiscard]] bool is_mean() const noexcept { return origin_.averaged > 1; }
  /// Tokens [begin, begin + count) of tensor number i. Not to be written to.
  [[nodiscard]] at::Tensor state(std::size_t i, std::int64_t begin, std::int64_t count) const;
  /// Calls step(tensor) for each tensor that it holds.
  template <class Step>
  void each_tensor(const Step& step) const {
    for (const StoredStates& one : stored_) {
      step(one.values());
      if (one.scales().defined()) step(one.scales());
    }
  }
  /// Sets tensor number i, of all tokens.
  void set(std::size_t i, const at::Tensor& state);
  /// How a tensor of so many tokens is held.
  struct Form {
    std::vector<std::int64_t> sizes;
    std::int64_t token_dim = 0;
  };
  [[nodiscard]] static Form form_of(const KeySpec& spec, std::int64_t tokens);
  /// Milliseconds that a hit on it saves, as its policy was told; 0 while it is pending.
  [[nodiscard]] double saved_ms() const noexcept { return saved_ms_; }

 private:
  friend class SegmentBank;
  [[nodiscard]] bool complete() const noexcept;

  Reservation reserved_;  ///< for the states
  const std::vector<KeySpec>& specs_;
  const BankFormat format_;
  std::pmr::string partition_;
  std::pmr::vector<std::int64_t> tokens_;
  const SegmentOrigin origin_;
  double saved_ms_ = 0;
  std::vector<StoredStates> stored_;
};

/// A run of a request's tokens that the bank has.
struct SegmentHit {
  std::int64_t begin = 0;                     ///< first token of the request
  std::shared_ptr<const SegmentEntry> donor;  ///< stays readable while this lives
  std::int64_t donor_begin = 0;               ///< first token of the donor
  std::int64_t tokens = 0;
  bool exact = false;  ///< a prefix of both: the donor's states are the request's, but for the rounding of the format

  /// How far the donor's keys have to be turned.
  [[nodiscard]] std::int64_t move() const noexcept { return begin - donor_begin - donor->origin().position; }
};

/// Bank of whole sequences with a byte capacity. Thread-safe. Tensors, ids and index of what it holds are counted
/// before it is taken over: the capacity holds at every moment. What a pass computes is its own until insert(), called
/// when its call has succeeded: only that evicts, makes known and counts. Pending entries are limited by the same
/// capacity, of all running passes together, and not part of it. Sequences live in partitions that never see each other
/// (tenant, types of the inputs). A sequence that is all of a prefix of another one is not kept beside it. When room is
/// needed the policy names an entry; those in use (held by a SegmentHit) are passed over.
///
/// Beside sequences it holds means: a passage that was met in several sequences, with the mean of its states over them.
/// They serve where no sequence has the passage with more of what stands around it.
class SegmentBank final : public CapacityBank {
 public:
  struct Settings {
    std::size_t capacity_bytes = 0;
    EvictionOptions eviction;
    std::size_t ids_per_token = 1;
    std::size_t block_tokens = 16;  ///< of the index: runs below it are never found, from twice as many on always
    std::vector<KeySpec> specs;
    BankFormat format = BankFormat::kAsComputed;
    MemoryAccount* total = nullptr;  ///< which the bank's account is part of; null: of none
  };
  struct Contents {
    std::uint64_t means = 0;     ///< of the entries, means of passages
    std::uint64_t tokens = 0;    ///< that the entries hold
    std::uint64_t replaced = 0;  ///< entries that a longer one made superfluous
  };
  struct Counters : BankCounters, Contents {};  ///< insertions: means left out

  explicit SegmentBank(Settings settings);

  struct Wanted {
    std::int64_t least = 1;  ///< shortest run behind the prefix, tokens
    bool moved = true;       ///< runs that stand at another place in the donor
    bool use = true;         ///< what is found counts as used for the policy
  };
  /// The longest known prefix of a request, and behind it runs in ascending order without overlap.
  [[nodiscard]] std::vector<SegmentHit> find(std::string_view partition, std::span<const std::int64_t> tokens,
                                             const Wanted& wanted, double now_s);

  /// An entry to be filled. `refused`: none, because there is no memory for it or it could not be kept beside the other
  /// pending ones; otherwise, without one, the bank knows these tokens as a prefix already. Changes nothing that is
  /// held or counted.
  struct Room {
    std::unique_ptr<SegmentEntry> pending;
    bool refused = false;
  };
  [[nodiscard]] Room reserve(std::string_view partition, std::span<const std::int64_t> tokens);
  /// Makes a filled entry known, and evicts for it. `saved_ms`: for the policy, time that a hit on it saves.
  /// Never fails: what finds no room is counted as rejected, and so is what was refused.
  void insert(Room room, double saved_ms, double now_s);

  /// Likewise for the mean of a passage.
  [[nodiscard]] Room reserve_mean(std::string_view partition, std::span<const std::int64_t> tokens,
                                  SegmentOrigin origin);
  /// Makes a filled mean known, in place of `replaced` where that is a mean. Does nothing if that is no longer there,
  /// or if without one the bank got a mean of this passage meanwhile. Never fails, as insert().
  void insert_mean(Room mean, const SegmentEntry& replaced, double saved_ms, double now_s);

  /// All entries, the one that would be evicted last in front. None is held by this.
  [[nodiscard]] std::vector<std::weak_ptr<const SegmentEntry>> listed();
  /// True if it has these tokens as the beginning of a sequence, or a mean of just this passage.
  [[nodiscard]] bool knows(std::string_view partition, std::span<const std::int64_t> tokens,
                           const SegmentOrigin& origin);
  /// Keeps an entry of another process as it was there, if there is room without evicting; null: there is none. One
  /// of the states for each spec, as form_of() says.
  [[nodiscard]] std::weak_ptr<const SegmentEntry> restore(std::string_view partition,
                                                          std::span<const std::int64_t> tokens,
                                                          const SegmentOrigin& origin, std::vector<StoredStates> states,
                                                          double saved_ms, double now_s);
  /// The entry counts as used, if it is there still.
  void use(const SegmentEntry& entry, double now_s);
  /// What an entry takes of the capacity, index left out; unset: more than there is.
  [[nodiscard]] std::optional<std::size_t> bytes_for(std::string_view partition,
                                                     std::span<const std::int64_t> tokens) const;
  [[nodiscard]] const Settings& settings() const noexcept { return settings_; }
  /// True if states come back as they were computed: nothing of them is lost in its format.
  [[nodiscard]] bool lossless() const noexcept;

  /// Tokens behind the first `known` ones that were known once as the beginning of a sequence, and had to go for room,
  /// as far as that is remembered.
  [[nodiscard]] EvictedRun evicted_tokens(std::string_view partition, std::span<const std::int64_t> tokens,
                                          std::int64_t known) const;
  [[nodiscard]] Counters counters() const;

 private:
  [[nodiscard]] std::size_t tokens_of(const SegmentEntry& entry) const noexcept {
    return entry.tokens().size() / settings_.ids_per_token;
  }
  [[nodiscard]] BlockHashIndex::Tokens tokens_of_slot();
  [[nodiscard]] std::vector<BlockMatch> runs(const BlockHashIndex::Sequence& request,
                                             const BlockHashIndex::Wanted& wanted) const;
  [[nodiscard]] std::optional<std::size_t> entry_bytes(std::size_t tokens) const;
  void insert_pending(SegmentEntry& pending, double saved_ms, double now_s);
  void insert_pending_mean(SegmentEntry& pending, const SegmentEntry& replaced, double saved_ms, double now_s);
  [[nodiscard]] bool is_whole(const BlockMatch& known) const;
  void replace_by(const BlockMatch& known, const SegmentEntry& entry) noexcept;
  void replace(std::uint32_t slot) noexcept;
  const SegmentEntry* take_over(SegmentEntry& pending, double saved_ms, double now_s);
  [[nodiscard]] std::shared_ptr<SegmentEntry> make_entry(SegmentEntry& pending, Reservation& reserved);
  void insert_indexed(const std::shared_ptr<SegmentEntry>& entry, double saved_ms, double now_s);
  [[nodiscard]] std::optional<std::uint32_t> slot_of(const SegmentEntry& entry) const;
  [[nodiscard]] BlockHashIndex& index_of(const SegmentEntry& entry) noexcept {
    return entry.is_mean() ? means_ : index_;
  }
  void remember(std::uint32_t slot, EvictedKeys::Cause cause) noexcept override;
  [[nodiscard]] std::string_view key_of(std::uint32_t slot) const noexcept override {
    return entries_[slot]->partition();
  }
  void remove(std::uint32_t slot) noexcept override;
  void remove_all() noexcept override;
  [[nodiscard]] bool is_idle(std::uint32_t slot) const noexcept override { return entries_[slot].use_count() == 1; }
  [[nodiscard]] std::size_t busy_bytes() const noexcept override;

  const Settings settings_;
  MemoryAccount pending_;  ///< of running passes
  SlotVector<std::shared_ptr<SegmentEntry>> entries_;
  BlockHashIndex index_;  ///< sequences
  BlockHashIndex means_;
  Contents contents_;
};

}  // namespace llmcache
