// Whole outputs of single sequences, found by everything that went into them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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
#include "match/size_class.h"

namespace llmcache {

/// What a row was computed in: a batch of `rows` rows, `padded_length` tokens wide. 0: not told.
struct BatchSize {
  std::int32_t rows = 0;
  std::int32_t padded_length = 0;
};

/// The output tensors of one sequence: batch dimension 1, token dimension cut to its real tokens.
class OutputEntry {
 public:
  /// Takes what is reserved for the tensors, unless it throws.
  OutputEntry(std::string_view key, const std::vector<at::Tensor>& tensors, bool exact, const BatchSize& computed_in,
              Reservation& reserved, std::pmr::memory_resource* memory)
      : key_(key, memory), tensors_(tensors.begin(), tensors.end(), memory), exact_(exact), computed_in_(computed_in) {
    reserved_ = std::move(reserved);
  }
  OutputEntry(const OutputEntry&) = delete;
  OutputEntry& operator=(const OutputEntry&) = delete;

  [[nodiscard]] std::string_view key() const noexcept { return key_; }
  [[nodiscard]] const std::pmr::vector<at::Tensor>& tensors() const noexcept { return tensors_; }
  /// True if the model ran as it is when this was computed, false if it was packed.
  [[nodiscard]] bool exact() const noexcept { return exact_; }
  /// Of the batch in which it was computed; 0: not told.
  [[nodiscard]] std::int32_t rows() const noexcept { return computed_in_.rows; }
  [[nodiscard]] std::int32_t padded_length() const noexcept { return computed_in_.padded_length; }
  [[nodiscard]] std::uint8_t rows_class() const noexcept { return size_class(rows()); }
  [[nodiscard]] std::uint8_t length_class() const noexcept { return size_class(padded_length()); }

 private:
  Reservation reserved_;  ///< for the tensors
  std::pmr::string key_;
  std::pmr::vector<at::Tensor> tensors_;
  bool exact_;
  BatchSize computed_in_;
};

/// Bank of OutputEntry with a byte capacity and least-recently-used eviction. Thread-safe; look-up,
/// insertion and eviction are O(1) on average. Keys are compared byte by byte; the hash only finds.
///
/// An entry that is evicted while somebody still copies from it counts until he is done. Entries
/// must not outlive the bank.
class OutputBank final : public CapacityBank {
 public:
  /// `total`: the account that the bank's is part of; null: of none.
  explicit OutputBank(std::size_t capacity_bytes, MemoryAccount* total = nullptr);

  /// The entry, made the most recently used one; null if there is none, or if `exact` is asked for
  /// and the entry is not.
  std::shared_ptr<const OutputEntry> find(std::string_view key, bool exact);

  /// Keeps copies of `tensors`; of those that `own` marks, nothing but the tensor itself: they were owns_memory(), and
  /// nobody writes to them. An entry of the same key stays, unless it is not exact and this one is. Evicts for it.
  /// Never fails: what finds no room is counted as rejected.
  void insert(std::string_view key, const std::vector<at::Tensor>& tensors, bool exact,
              const BatchSize& computed_in = {}, const std::vector<char>& own = {});

  /// Why the key has no entry any more, or none was kept, as far as that is remembered; empty: it has one, or had none.
  [[nodiscard]] std::optional<EvictedKeys::Cause> why_gone(std::string_view key) const;
  /// True if there is an entry that find() would give.
  [[nodiscard]] bool holds(std::string_view key, bool exact);
  /// All entries, the one that would be evicted last in front. None is held by this.
  [[nodiscard]] std::vector<std::weak_ptr<const OutputEntry>> listed();

  [[nodiscard]] BankCounters counters() const;

 private:
  struct Hash {
    std::size_t operator()(std::string_view key) const noexcept;
  };
  using Slots = std::pmr::unordered_map<std::string_view, std::uint32_t, Hash>;

  [[nodiscard]] const std::uint32_t* slot_of(std::string_view key) const;
  [[nodiscard]] bool holds_as_good(std::string_view key, bool exact) const;
  void insert_indexed(const std::shared_ptr<const OutputEntry>& entry);
  void count_rejected(std::string_view key) noexcept;
  void remember(std::uint32_t slot, EvictedKeys::Cause cause) noexcept override;
  [[nodiscard]] std::string_view key_of(std::uint32_t slot) const noexcept override { return entries_[slot]->key(); }
  void remove(std::uint32_t slot) noexcept override;
  void remove_all() noexcept override;

  SlotVector<std::shared_ptr<const OutputEntry>> entries_;
  Slots slots_;  ///< by key
};

}  // namespace llmcache
