// What became of an entry that a store gave and a part of snapshots took.
#pragma once

#include "reuse/snapshot/snapshot_part.h"
#include "reuse/tiers/stored_part.h"

namespace llmcache {

inline StoredPart::Outcome stored_outcome(SnapshotPart::Outcome outcome) noexcept {
  switch (outcome) {
    case SnapshotPart::Outcome::kTaken:
      return StoredPart::Outcome::kTaken;
    case SnapshotPart::Outcome::kKnown:
      return StoredPart::Outcome::kKnown;
    default:
      return StoredPart::Outcome::kNoRoom;
  }
}

}  // namespace llmcache
