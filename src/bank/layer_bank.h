// Layer-wise Cache Bank (LLMCache, arXiv 2512.16843): the outputs of one layer for many sequences,
// found by the similarity of their fingerprints.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bank/capacity_bank.h"
#include "bank/slot_vector.h"
#include "llmcache/fingerprint/fingerprint.h"
#include "llmcache/match/fingerprint_index.h"
#include "llmcache/refresh/ttl.h"

namespace llmcache {

/// The state of one sequence behind one layer. Immutable.
class LayerEntry {
 public:
  /// Takes what is reserved for the tensors, unless it throws.
  LayerEntry(std::uint64_t sequence, at::Tensor state, const std::vector<at::Tensor>& model_inputs,
             Reservation& reserved, std::pmr::memory_resource* memory)
      : number_(sequence), hidden_(std::move(state)), inputs_(model_inputs.begin(), model_inputs.end(), memory) {
    reserved_ = std::move(reserved);
  }
  LayerEntry(const LayerEntry&) = delete;
  LayerEntry& operator=(const LayerEntry&) = delete;

  /// Number of what another process computed.
  static constexpr std::uint64_t kElsewhere = ~std::uint64_t{0};
  /// Of the sequence that it was computed for.
  [[nodiscard]] std::uint64_t number() const noexcept { return number_; }
  /// `[1, tokens, hidden]`, on the model's device.
  [[nodiscard]] const at::Tensor& hidden() const noexcept { return hidden_; }
  [[nodiscard]] std::int64_t tokens() const { return hidden_.size(1); }
  /// The sequence's real tokens in each input of the model, `[tokens]`; undefined where it was None.
  [[nodiscard]] const std::pmr::vector<at::Tensor>& inputs() const noexcept { return inputs_; }

 private:
  Reservation reserved_;  ///< for the tensors
  std::uint64_t number_;
  at::Tensor hidden_;
  std::pmr::vector<at::Tensor> inputs_;
};

/// Thread-safe. Find, insertion and eviction are O(1) on average but for the search for the most
/// similar fingerprint (match/fingerprint_index.h).
///
/// Entries live in partitions that never see each other (a tenant, say). An entry can be found by any of
/// its fingerprints, one for each Fingerprinter that the bank was given. Where the centre of a
/// Fingerprinter has changed, the bank makes its fingerprints again at the next call: linear, but it
/// happens nine times at most. An entry that is evicted while somebody still reads it counts until
/// he is done. Entries must not outlive the bank.
class LayerBank final : public CapacityBank {
 public:
  struct Settings {
    std::size_t capacity_bytes = 0;
    EvictionOptions eviction;
    double ttl_seconds = 0;
    double flush_below = 0;          ///< see RefreshOptions
    MemoryAccount* total = nullptr;  ///< which the bank's account is part of; null: of none
  };

  struct Hit {
    std::shared_ptr<const LayerEntry> entry;
    double similarity = 0;
    std::uint32_t slot = 0;
    std::uint32_t audits = 0;  ///< by the divergence monitor, so far
    double error = 0;          ///< mean relative error of these
  };

  /// What insert() keeps.
  struct Candidate {
    std::uint64_t number = 0;
    at::Tensor hidden;                       ///< `[1, tokens, hidden]`, contiguous; nobody else may write to it
    std::vector<at::Tensor> inputs;          ///< `[tokens]` each, or undefined; nobody else may write to them
    std::vector<std::vector<float>> states;  ///< one a Fingerprinter
    std::vector<std::optional<Fingerprint>> fingerprints;  ///< of the states
    std::vector<std::int64_t> ids;                         ///< of the sequence
    double saved_ms = 0;                                   ///< by a hit
    std::uint64_t key = 0;                                 ///< hash of the partition and the inputs
    std::uint32_t audits = 0;                              ///< of hits on it, elsewhere
    double error_sum = 0;                                  ///< that these found
  };

  struct Refreshes {
    std::uint64_t audited_entries = 0;  ///< held now
    std::uint64_t expired = 0, decayed = 0, dropped = 0;
  };
  struct Counters : BankCounters, Refreshes {};

  /// The Fingerprinters must outlive the bank.
  LayerBank(Settings settings, std::vector<const Fingerprinter*> fingerprinters);

  /// The most similar entry of the partition with a similarity of at least tau, if any, by fingerprint
  /// number `which`. It counts as used. `now_s`: seconds.
  std::optional<Hit> find(std::string_view partition, std::size_t which, const Fingerprint& fingerprint, double tau,
                          double now_s);

  /// Keeps a sequence's state, and evicts for it. Never fails: what finds no room is counted as rejected. An entry with
  /// the same inputs is used instead, not kept twice; the key finds it, the inputs are compared.
  void insert(std::string_view partition, const Candidate& candidate, double now_s);

  /// Why the entry of just these inputs went, as far as that is remembered; empty: it is there, never was, or was
  /// dropped over tolerance. `key`: Candidate::key.
  [[nodiscard]] std::optional<EvictedKeys::Cause> why_gone(std::uint64_t key) const;

  /// Keeps, with what find() returned, that an audit found this relative error; or drops it, if it is
  /// over tolerance. Nothing happens if the entry has gone.
  void record(const Hit& hit, double error, bool within_tolerance);

  /// Where an entry is. Does not hold it.
  struct Place {
    std::uint32_t slot = kNoSlot;
    std::weak_ptr<const LayerEntry> entry;
  };
  /// All entries, the one that would be evicted last in front.
  [[nodiscard]] std::vector<Place> listed();
  /// An entry, and what it was kept with.
  struct Kept {
    std::shared_ptr<const LayerEntry> entry;
    std::string partition;
    std::vector<float> states;  ///< what its fingerprints are made of, one after the other; empty: of token ids
    std::uint32_t audits = 0;
    double error_sum = 0;
    double saved_ms = 0;
  };
  /// Empty if it has gone.
  [[nodiscard]] std::optional<Kept> look(const Place& place) const;

  enum class Restored {
    kTaken,
    kKnown,   ///< the same inputs are there
    kNoRoom,  ///< without evicting
    kNoFingerprint
  };
  /// Keeps an entry of another process, if there is room without evicting. Its fingerprints are made here: `candidate`
  /// has none.
  [[nodiscard]] Restored restore(std::string_view partition, Candidate candidate, double now_s);
  /// The entry with that key counts as used, if there is one.
  void use(std::uint64_t key, double now_s);

  [[nodiscard]] Counters counters() const;

 private:
  /// Entries that may be found together. Their numbers in the indices are local, so that these stay dense.
  struct Partition {
    Partition(const std::vector<const Fingerprinter*>& fingerprinters, MemoryAccount& account,
              std::pmr::memory_resource* memory);

    Reservation reserved;                        ///< for the index objects themselves
    std::pmr::vector<FingerprintIndex> indices;  ///< one a Fingerprinter
    SlotVector<std::uint32_t> slots;             ///< by local number
  };
  using Partitions = std::pmr::map<std::pmr::string, Partition, std::less<>>;

  struct Node {
    std::shared_ptr<const LayerEntry> entry;
    Partitions::iterator partition;
    std::uint64_t key;
    // What the fingerprints are made of, to make them again.
    std::pmr::vector<float> states;  ///< one after another
    std::pmr::vector<std::int64_t> ids;
    std::uint32_t local = kNoSlot;
    std::uint32_t audits = 0;
    double error_sum = 0;
    double saved_ms = 0;
  };

  void insert_unless_held(std::string_view partition, const Candidate& candidate, double now_s);
  void insert_indexed(std::string_view partition, const Candidate& candidate,
                      const std::shared_ptr<const LayerEntry>& entry, const std::vector<Fingerprint>& fingerprints,
                      double now_s);
  [[nodiscard]] std::shared_ptr<const LayerEntry> make_entry(const Candidate& candidate, Reservation& reserved);
  [[nodiscard]] Node make_node(const Candidate& candidate, const std::shared_ptr<const LayerEntry>& entry,
                               Partitions::iterator partition);
  [[nodiscard]] bool holds_same(std::string_view partition, const Candidate& candidate, double now_s);
  [[nodiscard]] std::optional<std::vector<Fingerprint>> current_fingerprints(const Candidate& candidate);
  [[nodiscard]] std::optional<Fingerprint> fingerprint_of(const Node& node, std::size_t which) const;
  void flush_old(double now_s);
  void follow_centres();
  void follow_centre(std::size_t which, std::uint64_t generation);
  [[nodiscard]] bool index_again(const Node& node, std::size_t which, std::uint64_t generation);
  void remember(std::uint32_t slot, EvictedKeys::Cause cause) noexcept override {
    evicted_.add(nodes_[slot].key, cause);
  }
  [[nodiscard]] std::string_view key_of(std::uint32_t slot) const noexcept override {
    return nodes_[slot].partition->first;
  }
  void remove(std::uint32_t slot) noexcept override;
  void remove_all() noexcept override;
  void drop_if_empty(Partitions::iterator partition) noexcept;

  const Settings settings_;
  const std::vector<const Fingerprinter*> fingerprinters_;
  Partitions partitions_;
  SlotVector<Node> nodes_;
  std::pmr::unordered_map<std::uint64_t, std::uint32_t> by_key_;  ///< slots
  TtlQueue ttl_;
  std::vector<std::uint64_t> generations_;  ///< of the fingerprints held, one a Fingerprinter
  Refreshes refreshes_;
};

}  // namespace llmcache
