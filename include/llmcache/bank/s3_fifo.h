// Eviction by three first-in-first-out queues.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <list>
#include <memory_resource>
#include <new>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "llmcache/bank/entry_cost.h"
#include "llmcache/bank/slot_table.h"
#include "llmcache/error.h"

namespace llmcache {

/// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023). New entries enter a small
/// queue; those that are hit there move on to the main queue, the others are evicted soon, so a run of entries that
/// nobody asks for again does not flush the cache. The keys of entries that the small queue evicted are remembered for
/// a while in a ghost queue; an entry that comes back in that time enters the main queue at once. In the main queue an
/// entry that was hit is spared and sent round again, up to `most_hits` times.
///
/// Where this differs from the paper, and why:
/// - Entries differ in size here, so the share of the small queue is in bytes (of EntryCost::bytes), and a victim comes
///   from the small queue if that holds more than its share of *all bytes held now*. The policy is not told a capacity;
///   in a full cache the two are the same. The ghost queue is counted in keys, as the paper counts it: `ghost_share` of
///   the entries held now.
/// - Slots are used again for other content, so entries are recognised by EntryCost::key. Without keys there is no
///   ghost queue and S3-FIFO does less well.
/// - Only an eviction fills the ghost queue: an `erase` of the slot that `victim` returned last. What is erased for
///   another reason is not remembered.
/// - Memory that the ghost queue cannot get is done without.
///
/// The members are the same in all policies, see EvictionPolicy (eviction.h). Time and saved milliseconds are not
/// looked at. Every operation is O(1), `victim` amortised: each entry that it passes over has lost a hit or its place
/// in the small queue. Moving entries between queues changes nothing that a caller sees: `victim` gives the same slot
/// until something is inserted, hit or erased.
/// Memory: 32 bytes an entry, in pages of 128 entries, and about 64 bytes a key in the ghost queue.
class S3FifoPolicy {
 public:
  struct Config {
    /// Share of the bytes held that the small queue may have, from 0 to 1. Default: the paper's.
    double small_share = 0.1;
    /// Keys in the ghost queue for each entry held, from 0 to 100. Default: one for each entry that the main queue has
    /// room for, as in the paper.
    double ghost_share = 0.9;
    /// Hits in the small queue that move an entry to the main queue, 1 or more. Default: the paper's.
    std::uint32_t hits_to_stay = 2;
    /// Hits that are counted, and so rounds through the main queue that an entry is spared, at least hits_to_stay.
    /// Default: the paper's (two bits).
    std::uint32_t most_hits = 3;

    /// Throws Error(kInvalidOptions).
    void validate() const {
      check(small_share >= 0 && small_share <= 1, "small_share", std::to_string(small_share), "0 to 1");
      check(ghost_share >= 0 && ghost_share <= 100, "ghost_share", std::to_string(ghost_share), "0 to 100");
      check(hits_to_stay >= 1, "hits_to_stay", std::to_string(hits_to_stay), "1 or more");
      check(most_hits >= hits_to_stay, "most_hits", std::to_string(most_hits), "hits_to_stay or more");
    }

   private:
    static void check(bool good, const char* field, const std::string& found, const char* expected) {
      if (good) return;
      throw Error(ErrorCode::kInvalidOptions,
                  std::string("S3FifoPolicy::Config.") + field + " is " + found + "; expected is " + expected);
    }
  };

  static constexpr const char* kName = "s3fifo";

  /// Throws Error(kInvalidOptions).
  S3FifoPolicy(Config config, std::pmr::memory_resource* memory)
      : config_(config), table_(memory), ghosts_(memory), ghost_index_(memory) {
    config_.validate();
  }

  void insert(std::uint32_t slot, const EntryCost& cost, double /*now_s*/) {
    ++steps_;
    Node* node = table_.find(slot);
    if (node != nullptr) {
      take_out(slot, *node);
    } else {
      node = &table_.add(slot);
    }
    node->hits = 0;
    node->key = cost.key;
    node->bytes = cost.checked_bytes();
    node->in_main = forget_ghost(cost.key);
    put_in(slot, *node);
    if (slot == victim_) victim_ = kNoSlot;
  }

  void hit(std::uint32_t slot, double /*now_s*/) noexcept {
    ++steps_;
    Node* node = table_.find(slot);
    if (node == nullptr) return;
    if (node->hits < config_.most_hits) ++node->hits;
    if (slot == victim_) victim_ = kNoSlot;
  }

  void erase(std::uint32_t slot) noexcept {
    ++steps_;
    Node* node = table_.find(slot);
    if (node == nullptr) return;
    take_out(slot, *node);
    const bool evicted = slot == victim_ && !node->in_main;
    const std::uint64_t key = node->key;
    table_.remove(slot);
    if (slot == victim_) victim_ = kNoSlot;
    if (evicted && key != 0) remember_ghost(key);
    trim_ghosts();
  }

  [[nodiscard]] std::optional<std::uint32_t> victim(double /*now_s*/) noexcept {
    for (victim_ = kNoSlot; table_.size() != 0;) {
      ++steps_;
      const bool from_small =
          main_.empty() ||
          (!small_.empty() &&
           static_cast<double>(small_bytes_) > config_.small_share * static_cast<double>(small_bytes_ + main_bytes_));
      const std::uint32_t slot = from_small ? small_.first : main_.first;
      Node& node = table_.at(slot);
      if (node.hits < (from_small ? config_.hits_to_stay : 1)) {
        victim_ = slot;
        return slot;
      }
      take_out(slot, node);
      node.hits = from_small ? 0 : node.hits - 1;
      node.in_main = true;
      put_in(slot, node);
    }
    return std::nullopt;
  }

  /// First the small queue, but for those that would move on, then the main one by the hits that spare them.
  [[nodiscard]] std::vector<std::uint32_t> order() const {
    std::vector<std::uint32_t> slots;
    small_.append_to(table_, slots);
    main_.append_to(table_, slots);
    const auto rounds = [this](std::uint32_t slot) -> std::uint32_t {
      const Node& node = *table_.find(slot);
      return node.in_main ? node.hits + 1U : node.hits < config_.hits_to_stay ? 0U : 2U;
    };
    std::stable_sort(slots.begin(), slots.end(),
                     [&](std::uint32_t a, std::uint32_t b) { return rounds(a) < rounds(b); });
    return slots;
  }

  void clear() noexcept {
    table_.clear();
    small_ = main_ = SlotList{};
    small_bytes_ = main_bytes_ = 0;
    victim_ = kNoSlot;
    trim_ghosts();
  }

  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }
  [[nodiscard]] bool contains(std::uint32_t slot) const noexcept { return table_.find(slot) != nullptr; }
  [[nodiscard]] std::uint64_t steps() const noexcept { return steps_; }
  /// Keys in the ghost queue.
  [[nodiscard]] std::size_t ghosts() const noexcept { return ghosts_.size(); }

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
    std::uint64_t key;
    std::uint64_t bytes;
    std::uint32_t hits;
    bool in_main;
  };

  void put_in(std::uint32_t slot, const Node& node) noexcept {
    (node.in_main ? main_ : small_).push_back(table_, slot);
    (node.in_main ? main_bytes_ : small_bytes_) += node.bytes;
  }
  void take_out(std::uint32_t slot, const Node& node) noexcept {
    (node.in_main ? main_ : small_).unlink(table_, slot);
    (node.in_main ? main_bytes_ : small_bytes_) -= node.bytes;
  }

  void remember_ghost(std::uint64_t key) noexcept {
    if (forget_ghost(key)) ++steps_;
    try {
      ghosts_.push_back(key);
      try {
        ghost_index_.emplace(key, std::prev(ghosts_.end()));
      } catch (...) {
        ghosts_.pop_back();
        throw;
      }
    } catch (const std::bad_alloc&) {
      return;  // an entry more or less in the ghost queue
    }
  }

  /// True if the key was there.
  bool forget_ghost(std::uint64_t key) noexcept {
    const auto found = ghost_index_.find(key);
    if (found == ghost_index_.end()) return false;
    ghosts_.erase(found->second);
    ghost_index_.erase(found);
    return true;
  }

  void trim_ghosts() noexcept {
    const double most = config_.ghost_share * static_cast<double>(table_.size());
    while (static_cast<double>(ghosts_.size()) > most) {
      ++steps_;
      ghost_index_.erase(ghosts_.front());
      ghosts_.pop_front();
    }
    if (table_.size() == 0) GhostIndex(ghost_index_.get_allocator()).swap(ghost_index_);
  }

  using GhostQueue = std::pmr::list<std::uint64_t>;
  using GhostIndex = std::pmr::unordered_map<std::uint64_t, GhostQueue::iterator>;

  Config config_;
  SlotTable<Node> table_;
  SlotList small_;  ///< oldest first
  SlotList main_;   ///< oldest, or longest since spared, first
  std::uint64_t small_bytes_ = 0;
  std::uint64_t main_bytes_ = 0;
  GhostQueue ghosts_;  ///< oldest first
  GhostIndex ghost_index_;
  std::uint32_t victim_ = kNoSlot;  ///< returned last, and not used since
  std::uint64_t steps_ = 0;
};

}  // namespace llmcache
