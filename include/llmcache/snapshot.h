// Keeping a cache over restarts: what saving and loading tell.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llmcache {

/// Keeping a cache over restarts, see Options::snapshot and docs/operations.md.
struct SnapshotOptions {
  /// The file. Loaded when the cache is made, saved when it goes. Empty (default): neither; LayerCacheBase::save() and
  /// load() work all the same. Its folder must exist. One cache a file: two that save to one replace each other's.
  std::string path = {};

  /// Saved every so many seconds too, by a thread of the cache, while calls go on. 0 (default): only when it goes.
  double save_every_s = 0;

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

/// What LayerCacheBase::save() or load() did with what one bank keeps.
struct SnapshotPartReport {
  std::string name;  ///< "whole outputs", "prefixes", "sources", "calibration", "token states", "segments", "centres of
                     ///< fingerprints", "layer states"
  std::uint64_t entries = 0;  ///< written, or taken over
  std::uint64_t tokens = 0;   ///< whose states these hold; 0 where an entry is no states of tokens
  std::uint64_t left = 0;     ///< entries that were not
  std::string why;            ///< the reason of the first of these; empty: there are none
};

/// What LayerCacheBase::save() or load() did.
struct SnapshotReport {
  std::string path;
  std::string refused;      ///< load(): why nothing was taken; empty: what could be taken was
  std::uint64_t bytes = 0;  ///< of the file
  double ms = 0;            ///< that it took
  std::vector<SnapshotPartReport> parts;

  [[nodiscard]] std::uint64_t entries() const noexcept;  ///< of all parts
  [[nodiscard]] std::uint64_t tokens() const noexcept;   ///< of all parts
  /// One line for a log, without a line end.
  [[nodiscard]] std::string summary() const;
};

/// What became of Options::snapshot, and of calls of save() and load().
struct SnapshotStats {
  SnapshotReport loaded;     ///< by the latest load; an empty path: there was none
  std::uint64_t saves = 0;   ///< that put a file in place
  std::uint64_t failed = 0;  ///< saves that did not
  std::string failure;       ///< reason of the latest of these
  double last_save_ms = 0;   ///< that the latest save took
};

}  // namespace llmcache
