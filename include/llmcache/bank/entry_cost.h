// What an eviction policy is told about an entry.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace llmcache {

/// Size and worth of an entry. Any values are taken: policies use the checked ones below.
struct EntryCost {
  std::size_t bytes = 0;  ///< memory that evicting the entry gives back
  double saved_ms = 0;    ///< milliseconds that one hit on it saves
  /// Hash of what the entry holds, the same when the same content comes back after an eviction, whatever its slot then.
  /// 0 (default): not known. Only S3-FIFO reads it, to see that an entry was evicted too early.
  std::uint64_t key = 0;

  /// At least 1 and at most 2^40 (1 TiB), so that sums over all entries do not overflow.
  [[nodiscard]] std::size_t checked_bytes() const noexcept {
    return std::clamp(bytes, std::size_t{1}, std::size_t{1} << 40);
  }
  /// 0 for NaN and for what is negative, at most 1e12.
  [[nodiscard]] double checked_saved_ms() const noexcept { return saved_ms > 0 ? std::min(saved_ms, 1e12) : 0; }
};

}  // namespace llmcache
