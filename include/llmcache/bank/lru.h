// Eviction of the least recently used entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <vector>

#include "llmcache/bank/entry_cost.h"
#include "llmcache/bank/slot_table.h"

namespace llmcache {

/// Least recently used. One list; a hit moves its entry to the end. Size, worth and time are not looked at.
/// Right where what was asked for last is asked for next; one long run of entries that are never asked for again
/// flushes it (see S3FifoPolicy).
///
/// The members are the same in all policies, see EvictionPolicy (eviction.h) for the contract. Every operation is O(1).
/// Memory: 8 bytes an entry, in pages of 128 entries.
class LruPolicy {
 public:
  /// Nothing to choose.
  struct Config {
    void validate() const noexcept {}
  };

  static constexpr const char* kName = "lru";

  LruPolicy(Config config, std::pmr::memory_resource* memory) : table_(memory) { config.validate(); }

  void insert(std::uint32_t slot, const EntryCost& /*cost*/, double /*now_s*/) {
    ++steps_;
    if (table_.find(slot) != nullptr) {
      list_.unlink(table_, slot);
    } else {
      table_.add(slot);
    }
    list_.push_back(table_, slot);
  }

  void hit(std::uint32_t slot, double /*now_s*/) noexcept {
    ++steps_;
    if (table_.find(slot) == nullptr) return;
    list_.unlink(table_, slot);
    list_.push_back(table_, slot);
  }

  void erase(std::uint32_t slot) noexcept {
    ++steps_;
    if (table_.find(slot) == nullptr) return;
    list_.unlink(table_, slot);
    table_.remove(slot);
  }

  [[nodiscard]] std::optional<std::uint32_t> victim(double /*now_s*/) noexcept {
    ++steps_;
    return list_.empty() ? std::nullopt : std::optional(list_.first);
  }

  [[nodiscard]] std::vector<std::uint32_t> order() const {
    std::vector<std::uint32_t> slots;
    list_.append_to(table_, slots);
    return slots;
  }

  void clear() noexcept {
    list_ = SlotList{};
    table_.clear();
  }

  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }
  [[nodiscard]] bool contains(std::uint32_t slot) const noexcept { return table_.find(slot) != nullptr; }
  [[nodiscard]] std::uint64_t steps() const noexcept { return steps_; }

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
  };

  SlotTable<Node> table_;
  SlotList list_;  ///< least recently used first
  std::uint64_t steps_ = 0;
};

}  // namespace llmcache
