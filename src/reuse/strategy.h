// A way to answer the rows of a request with less than the whole model, and the last ones, which run it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bank/capacity_bank.h"
#include "llmcache/options.h"
#include "llmcache/report.h"
#include "reuse/answers.h"
#include "reuse/call.h"
#include "reuse/snapshot/snapshot_part.h"
#include "reuse/tiers/stored_part.h"

namespace llmcache {

/// Thread-safe. A cache has one instance of each that its options and its model allow, and asks them in the order of
/// its chain (reuse/chain.h).
class ReuseStrategy {
 public:
  virtual ~ReuseStrategy() = default;

  /// "prefix", "packed": what fallbacks, documents and messages call it.
  [[nodiscard]] virtual std::string name() const = 0;
  /// True if it may have answers for this request. Cheap.
  [[nodiscard]] virtual bool accepts(const Call& call) const = 0;
  /// Answers rows of answers.open(), all or some or none. What it learns it adds to answers.writes(): its banks change
  /// only when these are taken. If it throws nothing of it counts, and the next one is asked.
  virtual void serve(const Call& call, Answers& answers) = 0;
  /// Called behind the chain where it was asked: keeps what others have computed. Likewise through answers.writes().
  virtual void store(const Call& /*call*/, Answers& /*answers*/) {}
  /// Forgets what was kept.
  virtual void clear() {}
  /// Shows its banks in memory, those that calibrations make for themselves left out.
  virtual void each_bank(const BankVisitor& /*visit*/) {}
  /// Forgets what was kept for a tenant, wherever it is kept. Called while no call commits. Throws std::bad_alloc; what
  /// it has dropped by then is gone.
  virtual TenantErasure erase_tenant(const std::string& tenant) {
    TenantErasure erased;
    each_bank([&](CapacityBank& bank) {
      const TenantErasure part = bank.erase_tenant(tenant);
      erased.entries += part.entries;
      erased.bytes += part.bytes;
    });
    return erased;
  }
  /// The weights are others now: forgets what holds for the old ones.
  virtual void weights_changed() { clear(); }
  virtual void add_to(Stats& /*stats*/) const {}
  /// Adds what a snapshot holds of it, in the order in which it is written and taken.
  virtual void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& /*parts*/) {}

  /// Adds what stores below the memory keep of it, in the order in which it is looked for. It outlives them.
  virtual void add_stored(std::vector<std::unique_ptr<StoredPart>>& /*parts*/) {}

  /// True if it computes only the tokens that the request's Output names.
  [[nodiscard]] virtual bool cuts_output(const Call& /*call*/) const { return false; }
  /// True if it may find what was kept before.
  [[nodiscard]] virtual bool looks_up() const { return true; }
  /// True if it might have had answers for this request, had another output been asked for.
  [[nodiscard]] virtual bool refuses_output(const Call& /*call*/) const { return false; }
  /// True if its answers are exact. Where such a one fails the plain model answers: it has no code in common with it.
  [[nodiscard]] virtual bool exact() const { return true; }
};

/// What one bank more has counted, of the kind `name`; Stats::bytes are counted by the account that all banks are part
/// of. `expired`: entries that were too old, or used too little.
inline void add(Stats& stats, const char* name, const BankCounters& counters, std::uint64_t expired = 0) {
  if (stats.banks.empty() || stats.banks.back().name != name) stats.banks.push_back({.name = name});
  BankStats& bank = stats.banks.back();
  bank.entries += counters.entries;
  bank.bytes += counters.bytes;
  bank.insertions += counters.insertions;
  bank.evictions += counters.evictions;
  bank.rejected += counters.rejected;
  bank.expired += expired + counters.aged;
  bank.quota_evictions += counters.quota_evictions;
  stats.entries += counters.entries;
  stats.insertions += counters.insertions;
  stats.evictions += counters.evictions;
  stats.rejected += counters.rejected;
}

}  // namespace llmcache
