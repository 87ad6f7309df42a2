// Choosing an eviction policy when the program runs. Each policy has a header of its own: lru.h, decay.h, s3_fifo.h,
// gdsf.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "llmcache/bank/decay.h"
#include "llmcache/bank/entry_cost.h"
#include "llmcache/bank/gdsf.h"
#include "llmcache/bank/lru.h"
#include "llmcache/bank/s3_fifo.h"

namespace llmcache {

enum class Eviction {
  kLru,     ///< least recently used
  kDecay,   ///< least used, where a use counts half after each half-life
  kS3Fifo,  ///< first in, first out, in two queues; resists scans
  kGdsf,    ///< least saved milliseconds per byte, with frequency and ageing
};

/// "lru", "decay", "s3fifo", "gdsf".
const char* to_string(Eviction eviction) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
Eviction eviction_from_string(const std::string& text);

/// A policy and the settings of all of them; those of the others are not used.
struct EvictionOptions {
  /// Default: the one that everybody knows, and that needs to know nothing about the entries.
  Eviction policy = Eviction::kLru;
  LruPolicy::Config lru = {};
  DecayPolicy::Config decay = {};
  S3FifoPolicy::Config s3_fifo = {};
  GdsfPolicy::Config gdsf = {};

  /// Throws Error(kInvalidOptions) that names the field at fault, of the chosen policy or not.
  void validate() const;
};

/// Decides which entry goes when room is needed. The bank that owns it tells it what happens to its slots, asks for a
/// victim when it needs room, evicts that and tells it so by `erase`. This class holds any of the four policies; each
/// of them is a class with the same members and can be used alone.
///
/// Slots are small dense numbers below kNoSlot; the number of an erased slot may be used again.
///
/// Memory: every container takes it from the resource given, which must outlive the policy and may throw
/// std::bad_alloc. Only `insert` lets that out, and then nothing has changed; no other member throws. All memory is
/// given back when nothing is held any more.
///
/// Time: now_s is seconds of any clock. Readings that go back, or are not finite, count as the latest one before.
///
/// Cost: O(1), amortised where the policy says so, however many entries are held.
///
/// Thread safety: none; the bank locks.
class EvictionPolicy {
 public:
  /// Throws Error(kInvalidOptions).
  EvictionPolicy(const EvictionOptions& options, std::pmr::memory_resource* memory);

  /// A new entry. If the slot is held already, that entry is forgotten and this one takes its place.
  void insert(std::uint32_t slot, const EntryCost& cost, double now_s) {
    std::visit([&](auto& policy) { policy.insert(slot, cost, now_s); }, policy_);
  }
  /// The entry was used. A slot that is not held is ignored.
  void hit(std::uint32_t slot, double now_s) {
    std::visit([&](auto& policy) { policy.hit(slot, now_s); }, policy_);
  }
  /// The entry is gone. A slot that is not held is ignored. If it is the slot that `victim` returned last, and it was
  /// neither hit nor inserted since, the policy takes it for an eviction.
  void erase(std::uint32_t slot) {
    std::visit([&](auto& policy) { policy.erase(slot); }, policy_);
  }
  /// The slot to evict first; it stays held until it is erased. Empty if nothing is held. Asked again, with nothing
  /// done in between, it gives the same slot.
  [[nodiscard]] std::optional<std::uint32_t> victim(double now_s) {
    return std::visit([&](auto& policy) { return policy.victim(now_s); }, policy_);
  }
  /// All slots held, in the order in which they would go if nothing was used any more, as near as can be told without
  /// changing anything. O(n log n). Throws std::bad_alloc.
  [[nodiscard]] std::vector<std::uint32_t> order() const {
    return std::visit([](const auto& policy) { return policy.order(); }, policy_);
  }
  /// Forgets all entries, and what is remembered of evicted ones.
  void clear() {
    std::visit([](auto& policy) { policy.clear(); }, policy_);
  }
  /// Slots held.
  [[nodiscard]] std::size_t size() const {
    return std::visit([](const auto& policy) { return policy.size(); }, policy_);
  }
  [[nodiscard]] bool contains(std::uint32_t slot) const {
    return std::visit([&](const auto& policy) { return policy.contains(slot); }, policy_);
  }
  /// The decayed score of a slot that is held (see decay.h), 0 for any other. Empty if the policy keeps none.
  [[nodiscard]] std::optional<double> score(std::uint32_t slot, double now_s) const noexcept {
    const auto* decay = std::get_if<DecayPolicy>(&policy_);
    return decay == nullptr ? std::nullopt : std::optional(decay->score(slot, now_s));
  }
  /// Work done since construction: calls, and entries, buckets and tree nodes visited. Divided by the number of calls
  /// it shows that the cost does not grow with the number of entries.
  [[nodiscard]] std::uint64_t steps() const {
    return std::visit([](const auto& policy) { return policy.steps(); }, policy_);
  }
  /// "lru", "decay", "s3fifo", "gdsf".
  [[nodiscard]] const char* name() const {
    return std::visit([](const auto& policy) { return policy.kName; }, policy_);
  }

 private:
  using Policy = std::variant<LruPolicy, DecayPolicy, S3FifoPolicy, GdsfPolicy>;
  static Policy make(const EvictionOptions& options, std::pmr::memory_resource* memory);

  Policy policy_;
};

}  // namespace llmcache
