// Entries that are too old to be used.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <string>

#include "llmcache/bank/monotone_time.h"
#include "llmcache/bank/slot_table.h"
#include "llmcache/error.h"

namespace llmcache {

/// Says which entries have passed their time to live, counted from their insertion (the LLMCache paper, arXiv
/// 2512.16843, section on refresh and replacement). All entries have the same time to live, so they expire in the order
/// in which they were inserted: a list. Every operation is O(1).
///
/// Slots are small dense numbers below kNoSlot; the number of an erased slot may be used again.
/// Time: now_s is seconds of any clock. Inside, time never goes back: while the clock reads less than it did before, no
/// entry grows older, so none expires early. Readings that are not finite count as the latest one before.
/// Memory: from the resource given, which may throw std::bad_alloc from `insert`; then nothing has changed. All of it
/// is given back when nothing is held. Thread safety: none; the bank locks.
class TtlQueue {
 public:
  /// `ttl_seconds` is a positive number, or 0 or infinity: then nothing ever expires, and nothing is kept here.
  /// Throws Error(kInvalidOptions) for NaN and for less than 0. `memory` must outlive the queue.
  TtlQueue(double ttl_seconds, std::pmr::memory_resource* memory) : ttl_seconds_(ttl_seconds), table_(memory) {
    if (!(ttl_seconds >= 0)) {
      throw Error(ErrorCode::kInvalidOptions,
                  "ttl_seconds is " + std::to_string(ttl_seconds) + "; 0 (no limit) or more is expected");
    }
  }

  /// A new entry; if the slot is held already, its time starts anew.
  void insert(std::uint32_t slot, double now_s) {
    if (!limited()) return;
    Node* node = table_.find(slot);
    if (node != nullptr) {
      list_.unlink(table_, slot);
    } else {
      node = &table_.add(slot);
    }
    node->inserted = clock_.advance(now_s);
    list_.push_back(table_, slot);
  }

  /// A slot that is not held is ignored.
  void erase(std::uint32_t slot) noexcept {
    if (table_.find(slot) == nullptr) return;
    list_.unlink(table_, slot);
    table_.remove(slot);
  }

  /// Two slots: the first one is as old as the other from now on. Ignored unless both are held.
  void make_as_old(std::uint32_t slot, std::uint32_t as) noexcept {
    Node* const node = table_.find(slot);
    Node* const other = table_.find(as);
    if (node == nullptr || other == nullptr || node == other) return;
    list_.unlink(table_, slot);
    node->inserted = other->inserted;
    node->previous = other->previous;
    node->next = as;
    (node->previous == kNoSlot ? list_.first : table_.at(node->previous).next) = slot;
    other->previous = slot;
  }

  /// The slot that was inserted first of those whose age is ttl_seconds or more; empty if there is none. It stays held
  /// until it is erased. `after`: only those that follow this one, where it is held.
  [[nodiscard]] std::optional<std::uint32_t> expired(double now_s, std::uint32_t after = kNoSlot) noexcept {
    const double now = clock_.advance(now_s);
    const Node* const passed = after == kNoSlot ? nullptr : table_.find(after);
    const std::uint32_t first = passed == nullptr ? list_.first : passed->next;
    if (first == kNoSlot || now - table_.at(first).inserted < ttl_seconds_) return std::nullopt;
    return first;
  }

  void clear() noexcept {
    list_ = SlotList{};
    table_.clear();
  }

  /// Slots held.
  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }
  /// False if nothing ever expires.
  [[nodiscard]] bool limited() const noexcept { return ttl_seconds_ > 0 && std::isfinite(ttl_seconds_); }

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
    double inserted;  ///< seconds of clock_
  };

  double ttl_seconds_;
  MonotoneTime clock_;
  SlotTable<Node> table_;
  SlotList list_;  ///< oldest first
};

}  // namespace llmcache
