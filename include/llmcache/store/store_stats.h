// What a cache did with the store below its memory.
#pragma once

#include <cstdint>
#include <vector>

#include "llmcache/store/state_store.h"

namespace llmcache {

/// Totals since construction; of a cache without a store all zero. Entries are values: blocks of prefixes and outputs.
struct StoreStats {
  std::uint64_t lookups = 0;         ///< rows of requests for which the store was asked
  std::uint64_t tokens_wanted = 0;   ///< tokens that memory lacked of them, and a value could hold
  std::uint64_t hits = 0;            ///< entries fetched and taken into memory
  std::uint64_t tokens = 0;          ///< tokens that these spared
  std::uint64_t misses = 0;          ///< entries that the store has not
  std::uint64_t timeouts = 0;        ///< look-ups that ended at the deadline
  std::uint64_t failures = 0;        ///< look-ups that failed, or were refused by an open breaker
  std::uint64_t not_worth = 0;       ///< rows not asked for, or not further, because computing is faster
  std::uint64_t damaged = 0;         ///< entries that were not what their key names; they are erased
  std::uint64_t no_room = 0;         ///< entries fetched for which memory had no room
  std::uint64_t prefetches = 0;      ///< requests that were announced by prefetch()
  std::uint64_t writes = 0;          ///< entries written
  std::uint64_t writes_known = 0;    ///< entries not written, because the store has them
  std::uint64_t writes_dropped = 0;  ///< entries not written: too many were waiting, they had gone, or the store failed
  std::uint64_t bytes_read = 0;      ///< of entries taken into memory
  std::uint64_t bytes_written = 0;
  std::uint64_t waiting = 0;        ///< entries that are to be written, and prefetches, now
  double bytes_per_s = 0;           ///< measured rate of fetching; 0: not known yet
  double compute_ms_per_token = 0;  ///< measured; 0: not known yet
  double wait_ms = 0;               ///< that requests spent in look-ups
  std::vector<TierStats> tiers;     ///< of the store, StateStore::stats()
};

}  // namespace llmcache
