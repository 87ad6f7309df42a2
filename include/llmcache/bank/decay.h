// Eviction by how often and how lately an entry was used.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/entry_cost.h"
#include "llmcache/bank/monotone_time.h"
#include "llmcache/bank/slot_table.h"
#include "llmcache/error.h"

namespace llmcache {

/// Staleness-aware decay, as the LLMCache paper (arXiv 2512.16843) asks of its refresh controller: an entry's score at
/// time t is the sum, over its insertion and its hits at times t_i, of 2^-((t - t_i) / half_life). The lowest score is
/// evicted. It is the "combined recency and frequency" of LRFU (Lee et al., IEEE Transactions on Computers 50(12),
/// 2001): a half-life much shorter than the time that entries stay makes it LRU, a much longer one makes it LFU.
///
/// How it is O(1). All scores shrink alike, so their order changes only by hits. log2(score) + t / half_life does not
/// change with t; it is what entries are sorted by, rounded down to 1/32 in one of 1,024 buckets. A new or hit entry
/// has a score of at least 1, so it lands at or above t / half_life. Buckets that time has left below that point hold
/// what has decayed below 1; they are joined, in order, to one list, from whose front victims are taken.
///
/// Precision. Two entries may be taken in the wrong order only if their scores are within a factor 2^(1/32), or 2.2 %,
/// of each other; the one used longer ago then goes first. Scores stop growing at 2^31. A score is kept with the time
/// it was computed at, never against a fixed origin, so nothing has to be rescaled and nothing is lost over the years;
/// the bucket numbers suffice for 1e12 s at any half-life allowed.
///
/// The members are the same in all policies, see EvictionPolicy (eviction.h). A hit or an insertion costs at most one
/// visit to each bucket that time has passed since the one before (never more than 1,024), a victim at most 17 words.
/// Memory: 32 bytes an entry, in pages of 128 entries, and 8 KiB for the buckets while anything is held.
class DecayPolicy {
 public:
  struct Config {
    /// Seconds after which a use counts half, from 1e-3 to 1e12. Default: ten minutes, about the pause between the
    /// turns of a conversation. Also known as the time after which an unused entry gives way to a new one.
    double half_life_s = 600;

    /// Throws Error(kInvalidOptions).
    void validate() const {
      if (!(half_life_s >= 1e-3 && half_life_s <= MonotoneTime::kLongest)) {
        throw Error(ErrorCode::kInvalidOptions, "DecayPolicy::Config.half_life_s is " + std::to_string(half_life_s) +
                                                    "; seconds from 0.001 to 1e12 are expected");
      }
    }
  };

  static constexpr const char* kName = "decay";

  /// Throws Error(kInvalidOptions).
  DecayPolicy(Config config, std::pmr::memory_resource* memory) : config_(config), table_(memory), buckets_(memory) {
    config_.validate();
  }

  void insert(std::uint32_t slot, const EntryCost& /*cost*/, double now_s) {
    ++steps_;
    Node* node = table_.find(slot);
    if (node != nullptr) {
      take_out(slot, *node);
    } else {
      if (buckets_.empty()) buckets_.resize(kBuckets);
      try {
        node = &table_.add(slot);
      } catch (...) {
        release_if_empty();
        throw;
      }
    }
    const double time = clock_.advance(now_s);
    advance(time);
    node->score = 1;
    put_in(slot, *node, time);
  }

  void hit(std::uint32_t slot, double now_s) noexcept {
    ++steps_;
    Node* node = table_.find(slot);
    if (node == nullptr) return;
    take_out(slot, *node);
    const double time = clock_.advance(now_s);
    advance(time);
    node->score = std::min(1 + score_at(*node, time), kLargestScore);
    put_in(slot, *node, time);
  }

  void erase(std::uint32_t slot) noexcept {
    ++steps_;
    const Node* node = table_.find(slot);
    if (node == nullptr) return;
    take_out(slot, *node);
    table_.remove(slot);
    release_if_empty();
  }

  [[nodiscard]] std::optional<std::uint32_t> victim(double /*now_s*/) noexcept {
    ++steps_;
    if (!decayed_.empty()) return decayed_.first;
    if (table_.size() == 0) return std::nullopt;
    // The buckets in order, from the one of `base_`: a ring, so its word is looked at twice.
    const std::size_t start = position(base_);
    for (std::size_t i = 0; i <= kWords; ++i) {
      ++steps_;
      const std::size_t word = (start / 64 + i) % kWords;
      std::uint64_t bits = filled_[word];
      const std::uint64_t from_start = ~std::uint64_t{0} << (start % 64);
      if (i == 0) bits &= from_start;
      if (i == kWords) bits &= ~from_start;
      if (bits != 0) return buckets_[word * 64 + static_cast<std::size_t>(std::countr_zero(bits))].first;
    }
    return std::nullopt;
  }

  [[nodiscard]] std::vector<std::uint32_t> order() const {
    std::vector<std::uint32_t> slots;
    decayed_.append_to(table_, slots);
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
      buckets_[position(base_ + static_cast<std::int64_t>(i))].append_to(table_, slots);
    }
    return slots;
  }

  void clear() noexcept {
    table_.clear();
    release_if_empty();
  }

  [[nodiscard]] std::size_t size() const noexcept { return table_.size(); }
  [[nodiscard]] bool contains(std::uint32_t slot) const noexcept { return table_.find(slot) != nullptr; }
  [[nodiscard]] std::uint64_t steps() const noexcept { return steps_; }

  /// The score of a slot that is held, at time now_s; 0 for any other.
  [[nodiscard]] double score(std::uint32_t slot, double now_s) const noexcept {
    const Node* node = table_.find(slot);
    return node == nullptr ? 0 : score_at(*node, MonotoneTime(clock_).advance(now_s));
  }

 private:
  struct Node {
    std::uint32_t previous;
    std::uint32_t next;
    double score;         ///< when it was used last
    double time;          ///< of that use, seconds of clock_
    std::int64_t bucket;  ///< number of its bucket since time 0; below base_: it is in decayed_
  };

  static constexpr std::size_t kBuckets = 1024;
  static constexpr std::size_t kWords = kBuckets / 64;
  static constexpr std::int64_t kBucketsPerHalfLife = 32;
  static constexpr double kLargestScore = 0x1p31;  // the top of the buckets: 1,024 / 32 = 32 half-lives, less one

  static std::size_t position(std::int64_t bucket) noexcept { return static_cast<std::size_t>(bucket) % kBuckets; }

  [[nodiscard]] double half_lives(double seconds) const noexcept { return seconds / config_.half_life_s; }
  [[nodiscard]] double score_at(const Node& node, double time) const noexcept {
    return node.score * std::exp2(-half_lives(time - node.time));
  }

  /// Joins the buckets below `time` to decayed_.
  void advance(double time) noexcept {
    const auto base = static_cast<std::int64_t>(half_lives(time) * kBucketsPerHalfLife);
    const std::int64_t passed = std::min<std::int64_t>(base - base_, kBuckets);
    for (std::int64_t i = 0; i < passed; ++i) {
      ++steps_;
      const std::size_t at = position(base_ + i);
      decayed_.splice_back(table_, buckets_[at]);
      filled_[at / 64] &= ~(std::uint64_t{1} << (at % 64));
    }
    base_ = base;
  }

  void put_in(std::uint32_t slot, Node& node, double time) noexcept {
    node.time = time;
    const double place = (half_lives(time) + std::log2(node.score)) * kBucketsPerHalfLife;
    node.bucket = std::clamp(static_cast<std::int64_t>(place), base_, base_ + static_cast<std::int64_t>(kBuckets) - 1);
    const std::size_t at = position(node.bucket);
    buckets_[at].push_back(table_, slot);
    filled_[at / 64] |= std::uint64_t{1} << (at % 64);
  }

  void take_out(std::uint32_t slot, const Node& node) noexcept {
    if (node.bucket < base_) {
      decayed_.unlink(table_, slot);
      return;
    }
    const std::size_t at = position(node.bucket);
    buckets_[at].unlink(table_, slot);
    if (buckets_[at].empty()) filled_[at / 64] &= ~(std::uint64_t{1} << (at % 64));
  }

  void release_if_empty() noexcept {
    if (table_.size() != 0) return;
    decayed_ = SlotList{};
    filled_ = {};
    std::pmr::vector<SlotList>(buckets_.get_allocator()).swap(buckets_);
  }

  Config config_;
  MonotoneTime clock_;
  SlotTable<Node> table_;
  SlotList decayed_;                            ///< lowest score first
  std::pmr::vector<SlotList> buckets_;          ///< a ring of kBuckets, none while nothing is held
  std::array<std::uint64_t, kWords> filled_{};  ///< a bit a bucket that is not empty
  std::int64_t base_ = 0;                       ///< the lowest bucket of the ring
  std::uint64_t steps_ = 0;
};

}  // namespace llmcache
