// Keys and values of the sequences of a causal model: a prefix tree over their tokens, whose nodes hold ranges of
// blocks of tensors. What several sequences have in common is held once.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bank/capacity_bank.h"
#include "match/prefix_tree.h"

namespace llmcache {

/// What is kept for each token in one place of the model: the shape of one token's tensor.
struct KeySpec {
  std::vector<std::int64_t> sizes;  ///< with any number at token_dim
  std::int64_t token_dim = 0;
  at::TensorOptions options;
};

/// Tensors with room for a number of tokens, one for each KeySpec. Ranges of them belong to nodes of the tree and to
/// running passes; a range is written once, by the pass that claimed it, before anybody else can see it.
///
/// A new block is the working memory of the pass that asked for it, and counts as such. It becomes the bank's, and
/// counts in its capacity, with the first node that lies in it.
class KeyBlock {
 public:
  /// `reserved`: for itself and its tensors.
  KeyBlock(const std::vector<KeySpec>& specs, std::int64_t room, Reservation reserved);
  KeyBlock(const KeyBlock&) = delete;
  KeyBlock& operator=(const KeyBlock&) = delete;

  [[nodiscard]] std::int64_t room() const noexcept { return room_; }
  /// Tensor number i (the order of the specs), all of its room.
  [[nodiscard]] const at::Tensor& tensor(std::size_t i) const { return tensors_[i]; }

 private:
  friend class PrefixBank;
  Reservation reserved_;
  std::vector<at::Tensor> tensors_;
  std::int64_t room_;
  // Guarded by the bank's lock:
  std::int64_t claimed_ = 0;  ///< tokens from the start that belong to somebody
  std::int64_t held_ = 0;     ///< tokens from the start that nodes hold, with what has gone in their midst
  std::int64_t pins_ = 0;     ///< leases that use it
  std::int64_t kept_ = 0;     ///< of these, what PrefixBank::keep() gave
  bool wasteful_ = false;     ///< was to give back its spare room and could not
};

/// Neighbouring tokens in a block.
struct KeyRange {
  std::shared_ptr<KeyBlock> block;
  std::int64_t offset = 0;
  std::int64_t tokens = 0;
  /// Of the sequences in whose passes they were computed the least and the greatest size_class() of the number of real
  /// tokens. Without any: the least is above the greatest.
  std::uint8_t shortest = std::numeric_limits<std::uint8_t>::max();
  std::uint8_t longest = 0;
  float saved_ms = 0;  ///< of what a node holds: time that one token's entry saves

  /// Takes in the classes of tokens that join these.
  void widen(const KeyRange& other) noexcept {
    shortest = std::min(shortest, other.shortest);
    longest = std::max(longest, other.longest);
  }
};

class PrefixBank;

/// What one sequence of a running pass uses of a bank: while it lives, nothing of that is evicted. Movable. Room that
/// was reserved and not committed is given back at its end.
class PrefixLease {
 public:
  PrefixLease() = default;
  PrefixLease(PrefixLease&& other) noexcept;
  PrefixLease& operator=(PrefixLease&& other) noexcept;
  ~PrefixLease();

  /// The known prefix, in order; together known_tokens().
  [[nodiscard]] const std::vector<KeyRange>& known() const noexcept { return known_; }
  [[nodiscard]] std::int64_t known_tokens() const noexcept { return known_tokens_; }
  /// The least and the greatest class of a known prefix, see KeyRange.
  [[nodiscard]] std::uint8_t shortest() const noexcept { return shortest_; }
  [[nodiscard]] std::uint8_t longest() const noexcept { return longest_; }
  /// True if the known prefix is all of an earlier sequence, so that this one is its continuation.
  [[nodiscard]] bool continues() const noexcept { return continues_; }
  /// Tokens behind the known ones that were known once, as far as that is remembered, and why they went.
  [[nodiscard]] const EvictedRun& evicted() const noexcept { return evicted_; }
  /// What reserve() gave, in order.
  [[nodiscard]] const std::vector<KeyRange>& reserved() const noexcept { return reserved_; }

 private:
  friend class PrefixBank;
  PrefixBank* bank_ = nullptr;
  std::vector<KeyRange> known_;
  std::vector<KeyRange> reserved_;
  std::int64_t known_tokens_ = 0;
  EvictedRun evicted_;
  std::uint8_t shortest_ = std::numeric_limits<std::uint8_t>::max();
  std::uint8_t longest_ = 0;
  bool continues_ = false;
  bool refused_ = false;  ///< reserve() found no room, which the bank has not counted yet
  bool kept_ = false;     ///< by keep(), for the tenant of
  std::string kept_for_;
};

/// Bank of keys and values with a byte capacity. Thread-safe. Tensors (spare room included), tree and index of what it
/// holds are counted, before it is taken over: the capacity holds at every moment.
///
/// A pass reserves room, writes, and commits when the call it belongs to has succeeded. Until then the bank is as it
/// was: what is reserved is spare room of blocks that it holds, or working memory of the pass. That is limited by the
/// same capacity, of all running passes together, so that no more is computed than could be kept; only committing
/// evicts, makes known and counts. A call that fails drops its leases, and nothing has happened, but that what it found
/// counts as used.
///
/// A token is a tuple of `ids_per_token` numbers (its value in each of the model's inputs). Sequences live in
/// partitions that never see each other (tenant, position of the first token). Tokens are compared, hashes only find.
/// Entries are the nodes of the tree, their slots its own; leases stay valid when they go.
///
/// When room is needed the eviction policy names a node; if that has children, a leaf below it goes instead. Nodes
/// whose blocks a running pass uses are skipped. Blocks must not outlive the bank.
class PrefixBank final : public CapacityBank {
 public:
  struct Settings {
    std::size_t capacity_bytes = 0;
    EvictionOptions eviction;
    std::size_t ids_per_token = 1;
    std::vector<KeySpec> specs;
    MemoryAccount* total = nullptr;  ///< which the bank's account is part of; null: of none
  };
  struct Contents {
    std::uint64_t tokens = 0;    ///< that the nodes hold
    std::size_t kept_bytes = 0;  ///< of blocks that keep() holds on to
  };
  /// Entries are nodes, insertions and rejected are commits.
  struct Counters : BankCounters, Contents {};

  explicit PrefixBank(Settings settings);

  /// The longest known prefix of `tokens` (token after token, ids_per_token numbers each), at the granularity of
  /// tokens. All nodes on its path count as used. Throws nothing but std::bad_alloc of the lease itself.
  [[nodiscard]] PrefixLease find(std::string_view partition, std::span<const std::int64_t> tokens, double now_s);

  /// Room for `count` tokens, added to lease.reserved(). The spare room behind `after`, one of the lease's ranges or
  /// null, is used first, if that ends where the claimed part of its block does; the rest is one new block of at least
  /// `room` tokens (of just what is needed if there is no memory for more), working memory of the pass. False, and
  /// nothing taken, if it could not become the bank's beside what running passes use: commit() counts that.
  /// `length_class`: size_class() of the real tokens of the sequence in this pass.
  bool reserve(PrefixLease& lease, const KeyRange* after, std::int64_t count, std::int64_t room,
               std::uint8_t length_class);

  /// Makes `tokens` known, or as many of them as `ranges`, in order, hold entries for. What is known already stays as
  /// it is, so that only the ranges behind it become nodes; a node is split where the sequences part. Their blocks
  /// become the bank's, which evicts for them; they stay readable while the lease lives. The ranges are the lease's,
  /// known or reserved, and those of other leases that live. `saved_ms`: for the eviction policy, time that one token's
  /// entry saves. Never fails: what finds no room is counted as rejected, and so is a lease for which reserve() found
  /// none.
  void commit(PrefixLease& lease, std::string_view partition, std::span<const std::int64_t> tokens,
              std::span<const KeyRange> ranges, double saved_ms, double now_s);

  /// What a node holds: the last tokens of a sequence that begins in a partition.
  struct Listed {
    std::string partition;
    std::vector<std::int64_t> tokens;  ///< up to the end of the node
    std::size_t begin = 0;             ///< the first one that the node holds, counted in tokens
    std::uint8_t shortest = 0;         ///< of its range
    std::uint8_t longest = 0;
    float saved_ms = 0;
  };
  /// All nodes, the one that would be evicted last in front, but each behind its parent. None is held by this.
  [[nodiscard]] std::vector<Listed> listed();
  /// As find(), and nothing counts as used.
  [[nodiscard]] PrefixLease peek(std::string_view partition, std::span<const std::int64_t> tokens);
  /// Holds on to a whole sequence, if all of it is known and `share` of the capacity, and of what its tenant may hold,
  /// is enough for all that is held so: while the lease lives, nothing of it is evicted or becomes too old. Nothing
  /// counts as used.
  struct Kept {
    PrefixLease lease;         ///< of nothing if it was refused
    std::string refused = {};  ///< why; empty: it was not
  };
  [[nodiscard]] Kept keep(std::string_view partition, std::span<const std::int64_t> tokens, double share);
  /// What `tokens` more in a block of their own take, index included. Empty if it is more than the capacity.
  [[nodiscard]] std::optional<std::size_t> bytes_for(std::size_t tokens) const noexcept;

  [[nodiscard]] const std::vector<KeySpec>& specs() const noexcept { return settings_.specs; }
  [[nodiscard]] std::size_t ids_per_token() const noexcept { return settings_.ids_per_token; }
  [[nodiscard]] Counters counters() const;

 private:
  friend class PrefixLease;
  [[nodiscard]] PrefixLease look(std::string_view partition, std::span<const std::int64_t> tokens,
                                 std::optional<double> used_at);
  [[nodiscard]] Listed listed(std::uint32_t node) const;
  void release(PrefixLease& lease) noexcept;

  [[nodiscard]] std::optional<std::size_t> block_bytes(std::int64_t room) const noexcept;
  [[nodiscard]] std::shared_ptr<KeyBlock> make_block(std::unique_lock<std::mutex>& lock, std::int64_t room);
  [[nodiscard]] bool is_held(const KeyBlock& block) const noexcept { return block.reserved_.is_in(account_); }
  [[nodiscard]] KeyRange& held(std::uint32_t node) noexcept { return (*ranges_)[node]; }
  [[nodiscard]] const KeyRange& held(std::uint32_t node) const noexcept { return (*ranges_)[node]; }
  void remember(std::uint32_t leaf, EvictedKeys::Cause cause) noexcept override;
  [[nodiscard]] std::string_view key_of(std::uint32_t node) const noexcept override;
  [[nodiscard]] std::uint32_t last_below(std::uint32_t node) const noexcept override;
  [[nodiscard]] bool is_kept(std::uint32_t node) const noexcept override { return held(node).block->kept_ > 0; }
  void remove(std::uint32_t leaf) noexcept override;
  void remove_all() noexcept override;
  [[nodiscard]] bool is_idle(std::uint32_t node) const noexcept override;
  [[nodiscard]] std::uint32_t idle_in_place_of(std::uint32_t node) const noexcept override;
  [[nodiscard]] std::size_t busy_bytes() const noexcept override { return pinned_bytes_; }
  void trim_if_wasteful(KeyBlock& block) noexcept;
  bool trim(KeyBlock& block) noexcept;
  void pin(KeyBlock& block) noexcept;
  void unpin(KeyBlock& block) noexcept;

  /// A sequence on its way into the tree.
  struct Sequence {
    std::string_view partition;
    std::span<const std::int64_t> tokens;
    std::span<const KeyRange> ranges;
    double saved_ms;
    double now_s;
  };
  [[nodiscard]] std::size_t bytes_beside(std::size_t tokens) const noexcept;
  [[nodiscard]] std::string hold(PrefixLease& lease, double share);
  void let_go(PrefixLease& lease, const std::vector<KeyRange>& known) noexcept;
  bool take_over(const Sequence& sequence) noexcept;
  bool grow(const Sequence& sequence);
  void append_behind(const PrefixTree::Match& match, const Sequence& sequence);
  std::uint32_t split(std::uint32_t node, std::size_t count, const Sequence& sequence, std::size_t end);
  std::uint32_t append(std::uint32_t node, const KeyRange& range, const Sequence& sequence, std::size_t begin);
  std::uint32_t prepare(std::int64_t tokens, const Sequence& sequence, std::size_t end);

  const Settings settings_;
  std::vector<std::size_t> token_bytes_;  ///< of each of the specs
  std::size_t all_token_bytes_ = 0;
  MemoryAccount passes_;  ///< new blocks of running passes
  PrefixTree tree_;
  std::optional<std::pmr::deque<KeyRange>> ranges_;  ///< of the nodes, by slot; none while there are none
  std::size_t pinned_bytes_ = 0;                     ///< of blocks that are held and cannot be evicted now
  Contents contents_;
};

}  // namespace llmcache
