// Why what a bank had is not there, as reports tell it.
#pragma once

#include "bank/evicted_keys.h"
#include "llmcache/report.h"

namespace llmcache {

inline MissReason miss_reason_of(EvictedKeys::Cause cause) noexcept {
  switch (cause) {
    case EvictedKeys::Cause::kAge:
      return MissReason::kExpired;
    case EvictedKeys::Cause::kOwnQuota:
      return MissReason::kOwnQuota;
    case EvictedKeys::Cause::kOtherTenant:
      return MissReason::kOtherTenant;
    case EvictedKeys::Cause::kRoom:
      break;
  }
  return MissReason::kEvicted;
}

/// Of tokens behind those that are known or shared, that went.
inline void tell_evicted(SequenceReport& sequence, const EvictedRun& run) noexcept {
  const std::int64_t left = run.tokens - sequence.shared_tokens;
  sequence.evicted_tokens = left > 0 ? left : 0;
  if (left > 0) sequence.evicted_because = miss_reason_of(run.cause);
}

}  // namespace llmcache
