// What a bank remembers of entries that it no longer has: enough to tell what is new from what was dropped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

namespace llmcache {

/// Hashes of what went, the latest ones: a table of fixed size, in sets of eight of which the oldest is forgotten. For
/// statistics only: 30 bits of a hash are kept, so that one look-up in 134 million finds what was never there. What it
/// forgets is told as new.
///
/// Memory: 4 bytes a hash, taken with the first one, beside the capacity of the bank; without memory nothing is
/// remembered. Thread safety: none; the bank locks.
class EvictedKeys {
 public:
  enum class Cause : std::uint32_t {
    kRoom = 0,
    kAge = 1,
    kOwnQuota = 2,     ///< its tenant had used up what it may hold
    kOtherTenant = 3,  ///< to make room for another tenant's entry
  };

  /// `remembered`: hashes, a power of two, 8 or more.
  explicit EvictedKeys(std::size_t remembered) noexcept : sets_(remembered / kWays) {}

  /// The latest cause counts.
  void add(std::uint64_t hash, Cause cause) noexcept;
  [[nodiscard]] std::optional<Cause> find(std::uint64_t hash) const noexcept;
  /// True until something is added: then there is nothing to look for.
  [[nodiscard]] bool empty() const noexcept { return table_ == nullptr; }
  void clear() noexcept { table_.reset(); }

 private:
  static constexpr std::size_t kWays = 8;
  [[nodiscard]] std::uint32_t* set_of(std::uint64_t hash) const noexcept {
    return table_.get() + (hash % sets_) * kWays;
  }

  const std::size_t sets_;
  /// Sets, the latest hash in front. The lowest two bits are the cause; 0: nothing.
  std::unique_ptr<std::uint32_t[]> table_;
};

/// Puts tokens of a sequence, from number `begin` on, into `keys`: the hashes of its prefixes that end with 16 tokens,
/// 32 and so on, and of the whole. `ids_per_token` numbers each.
void add_evicted_prefixes(EvictedKeys& keys, std::string_view partition, std::span<const std::int64_t> tokens,
                          std::size_t ids_per_token, std::size_t begin, EvictedKeys::Cause cause) noexcept;

/// Of a sequence whose first `known` tokens are known, how many behind these went: whole blocks of 16, and all of them
/// if just this sequence was there. O(tokens), and nothing while `keys` is empty.
struct EvictedRun {
  std::int64_t tokens = 0;
  EvictedKeys::Cause cause = EvictedKeys::Cause::kRoom;  ///< of the first of them: without it the others are of no use
};
[[nodiscard]] EvictedRun count_evicted(const EvictedKeys& keys, std::string_view partition,
                                       std::span<const std::int64_t> tokens, std::size_t ids_per_token,
                                       std::size_t known) noexcept;

}  // namespace llmcache
