// Eviction by what an entry saves for the memory that it takes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <optional>
#include <vector>

#include "llmcache/bank/entry_cost.h"
#include "llmcache/bank/slot_table.h"
#include "llmcache/error.h"

namespace llmcache {

/// Greedy-Dual-Size-Frequency (Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
/// policy", HP Laboratories HPL-98-69R1, 1998). The lowest priority is evicted;
///   priority = clock + uses * saved_ms / bytes
/// is set when the entry is inserted (uses = 1) and at each hit (uses + 1), and the clock is the priority of the entry
/// evicted last, so that what has not been used for long falls behind. Entries of one size and worth: least frequently
/// used, with ageing.
///
/// How it is O(1) in the number of entries: as in CAMP (Ghandeharizadeh et al., Middleware 2014) uses * saved_ms /
/// bytes is rounded, here down to 16 steps an octave (at most 6.25 %), from 2^-40 to 2^24 ms per byte, which gives
/// 1,024 groups; what lies outside goes to the nearest one. The clock never goes back, so within a group entries are in
/// order of priority if they are in order of their last use: a list. A tournament tree over the heads of the groups
/// finds the lowest priority; keeping it costs ten comparisons an operation.
///
/// Precision: priorities are differences to a clock that is set back to 0, and with it all priorities, when it has
/// grown 2^32 times as large as what it grows by. That visits every entry, but at most once in as many evictions as
/// there are entries, so it is O(1) amortised.
///
/// Only an eviction moves the clock: an `erase` of the slot that `victim` returned last. A cost of 0, less, or NaN
/// counts as 2^-40 ms per byte, the lowest group.
///
/// The members are the same in all policies, see EvictionPolicy (eviction.h). Time is not looked at.
/// Memory: 32 bytes an entry, in pages of 128 entries, and 12 KiB for the groups while anything is held.
class GdsfPolicy {
 public:
  struct Config {
    /// Uses that are counted, 1 or more. Default: no bound. 1 makes it Greedy-Dual-Size, which looks at cost and
    /// recency only.
    std::uint32_t most_uses = std::numeric_limits<std::uint32_t>::max();

    /// Throws Error(kInvalidOptions).
    void validate() const {
      if (most_uses < 1) {
        throw Error(ErrorCode::kInvalidOptions, "GdsfPolicy::Config.most_uses is 0; 1 or more is expected");
      }
    }
  };

  static constexpr const char* kName = "gdsf";

  /// Throws Error(kInvalidOptions).
  GdsfPolicy(Config config, std::pmr::memory_resource* memory) : config_(config), table_(memory), groups_(memory) {
    config_.validate();
  }

  void insert(std::uint32_t slot, const EntryCost& cost, double /*now_s*/) {
    ++steps_;
    Node* node = table_.find(slot);
    if (node != nullptr) {
      take_out(slot, *node);
    } else {
      if (groups_.empty()) make_groups();
      try {
        node = &table_.add(slot);
      } catch (...) {
        release_if_empty();
        throw;
      }
    }
    node->uses = 1;
    node->worth = cost.checked_saved_ms() / static_cast<double>(cost.checked_bytes());
    put_in(slot, *node);
  }

  void hit(std::uint32_t slot, double /*now_s*/) noexcept {
    ++steps_;
    Node* node = table_.find(slot);
    if (node == nullptr) return;
    take_out(slot, *node);
    if (node->uses < config_.most_uses) ++node->uses;
    put_in(slot, *node);
  }

  void erase(std::uint32_t slot) noexcept {
    ++steps_;
    const Node* node = table_.find(slot);
    if (node == nullptr) return;
    const bool evicted = slot == victim_;
    const double priority = node->priority;
    const double worth = group_worth(node->group);
    take_out(slot, *node);
    table_.remove(slot);
    if (evicted) {
      ++evictions_;
      clock_ = std::max(clock_, priority);
      if (clock_ > kLargestClock * worth && evictions_ >= table_.size()) set_back_clock();
    }
    release_if_empty();
  }

  [[nodiscard]] std::optional<std::uint32_t> victim(double /*now_s*/) noexcept {
    ++steps_;
    if (table_.size() == 0) return std::nullopt;
    victim_ = groups_[groups_[1].winner].list.first;
    return victim_;
  }

  [[nodiscard]] std::vector<std::uint32_t> order() const {
    std::vector<std::uint32_t> slots;
    for (const Group& group : groups_) group.list.append_to(table_, slots);
    std::stable_sort(slots.begin(), slots.end(), [this](std::uint32_t a, std::uint32_t b) {
      return table_.find(a)->priority < table_.find(b)->priority;
    });
    return slots;
  }

  void clear() noexcept {
    table_.clear();
    release_if_empty();
  }

  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }
  [[nodiscard]] bool contains(std::uint32_t slot) const noexcept { return table_.find(slot) != nullptr; }
  [[nodiscard]] std::uint64_t steps() const noexcept { return steps_; }

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
    double priority;
    double worth;  ///< ms per byte of one use, not rounded
    std::uint32_t uses;
    std::uint32_t group;
  };
  /// Group g, and beside it node g of the tournament tree (1 is the root, 2i and 2i + 1 are below i).
  struct Group {
    SlotList list;             ///< lowest priority first
    std::uint32_t winner = 0;  ///< the group with the lowest priority below this node
  };

  static constexpr std::uint32_t kGroups = 1024;
  static constexpr int kStepsPerOctave = 16;
  static constexpr int kLowestExponent = -40;
  static constexpr double kLargestClock = 0x1p32;

  static std::uint32_t group_of(double worth) noexcept {
    int exponent = 0;
    const double mantissa = std::frexp(worth, &exponent);  // worth = mantissa * 2^exponent, mantissa in [0.5, 1)
    if (exponent - 1 < kLowestExponent || mantissa <= 0) return 0;
    const int group =
        (exponent - 1 - kLowestExponent) * kStepsPerOctave + static_cast<int>((mantissa - 0.5) * 2 * kStepsPerOctave);
    return std::min(static_cast<std::uint32_t>(group), kGroups - 1);
  }
  /// The lowest worth of a group, which stands for all of it.
  static double group_worth(std::uint32_t group) noexcept {
    const auto octave = static_cast<int>(group) / kStepsPerOctave;
    const auto step = static_cast<int>(group) % kStepsPerOctave;
    return std::ldexp(1 + static_cast<double>(step) / kStepsPerOctave, kLowestExponent + octave);
  }

  [[nodiscard]] double head_priority(std::uint32_t group) noexcept {
    const SlotList& list = groups_[group].list;
    return list.empty() ? std::numeric_limits<double>::infinity() : table_.at(list.first).priority;
  }

  void put_in(std::uint32_t slot, Node& node) noexcept {
    node.group = group_of(node.worth * node.uses);
    node.priority = clock_ + group_worth(node.group);
    groups_[node.group].list.push_back(table_, slot);
    if (slot == victim_) victim_ = kNoSlot;
    if (groups_[node.group].list.first == slot) replay(node.group);
  }

  void take_out(std::uint32_t slot, const Node& node) noexcept {
    SlotList& list = groups_[node.group].list;
    const bool head = list.first == slot;
    list.unlink(table_, slot);
    if (slot == victim_) victim_ = kNoSlot;
    if (head) replay(node.group);
  }

  /// Plays the matches on the way from a group whose head has changed to the root. Of equals the lower group wins.
  void replay(std::uint32_t group) noexcept {
    for (std::size_t i = (std::size_t{kGroups} + group) / 2; i >= 1; i /= 2) {
      ++steps_;
      const std::uint32_t left = winner(2 * i);
      const std::uint32_t right = winner(2 * i + 1);
      groups_[i].winner = head_priority(right) < head_priority(left) ? right : left;
    }
  }
  /// Of a node of the tree; nodes from kGroups on are the groups themselves.
  [[nodiscard]] std::uint32_t winner(std::size_t node) const noexcept {
    return node < kGroups ? groups_[node].winner : static_cast<std::uint32_t>(node - kGroups);
  }

  void make_groups() {
    groups_.resize(kGroups);
    for (std::size_t i = kGroups - 1; i >= 1; --i) groups_[i].winner = winner(2 * i);  // any: all are empty
  }

  void set_back_clock() noexcept {
    table_.for_each([this](Node& node) {
      ++steps_;
      node.priority -= clock_;
    });
    clock_ = 0;
    evictions_ = 0;
  }

  void release_if_empty() noexcept {
    if (table_.size() != 0) return;
    std::pmr::vector<Group>(groups_.get_allocator()).swap(groups_);
    clock_ = 0;
    evictions_ = 0;
    victim_ = kNoSlot;
  }

  Config config_;
  SlotTable<Node> table_;
  std::pmr::vector<Group> groups_;  ///< kGroups, none while nothing is held
  double clock_ = 0;
  std::uint64_t evictions_ = 0;     ///< since the clock was set back
  std::uint32_t victim_ = kNoSlot;  ///< returned last, and not used since
  std::uint64_t steps_ = 0;
};

}  // namespace llmcache
