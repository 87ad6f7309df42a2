// The store below a cache's memory: fetching before a request is served, writing behind its answer.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "llmcache/report.h"
#include "llmcache/store/store_options.h"
#include "reuse/answers.h"
#include "reuse/call.h"
#include "reuse/tiers/fetch_speed.h"
#include "reuse/tiers/stored_part.h"
#include "store/write_queue.h"

namespace llmcache {

/// Brings what the store has of a request into the banks, from which the strategies serve, and writes what requests
/// added to the banks. Thread-safe. What goes wrong is counted: a request is then served as without a store.
class Tiers {
 public:
  /// What it needs of the cache. All of it may be called from any thread.
  struct Cache {
    /// Digest of the model's identity.
    std::function<std::string()> identity;
    std::function<std::uint64_t()> epoch;
    /// Takes a step unless weights changed or everything was dropped since `epoch`, and keeps that from happening
    /// meanwhile. False: it had happened.
    std::function<bool(std::uint64_t epoch, const std::function<void()>& step)> publish;
  };

  /// The parts and what they are of must outlive it. Throws what `cache.identity` throws.
  Tiers(StoreOptions options, std::vector<std::unique_ptr<StoredPart>> parts, Cache cache);
  ~Tiers();
  Tiers(const Tiers&) = delete;
  Tiers& operator=(const Tiers&) = delete;

  /// False: there is no store, or nothing that one could keep. Nothing else need be called then.
  [[nodiscard]] bool on() const noexcept { return options_.store != nullptr && !parts_.empty(); }
  /// Fetches what the banks lack of the rows of a call, as far as that is faster than computing it.
  void look_up(const Call& call, Answers& answers);
  /// The same behind the caller, whatever it takes: the request waits for something else.
  void prefetch(const Call& call);
  /// What the call left in the banks is to be written. It has been committed.
  void keep(const Call& call, const ForwardReport& report);
  /// Takes what the store has of a tenant out of it, once nothing waits to be written that was made before `epoch`,
  /// which is now. Returns why something may be left; empty: nothing is.
  std::string erase_tenant(const std::string& tenant, std::uint64_t epoch);
  /// Waits until what was given to keep() and prefetch() is done.
  void flush();
  [[nodiscard]] StoreStats stats() const;

 private:
  /// How far the rows of one call have come.
  struct LookUp {
    std::uint64_t epoch = 0;
    bool waits = true;                   ///< a request waits for it, so that it must be faster than computing
    bool over = false;                   ///< the store failed, or the cache was cleared: nothing more is asked for
    StoreStats counts;                   ///< what it adds
    MissReason last = MissReason::kNew;  ///< why the latest of what was asked for did not come; kNew: it did
    std::map<std::int64_t, MissReason> missed = {};  ///< the same by row, of those that something answers whole
  };

  void look_up(LookUp& look, const StoredPart& part, const StoredRow& row, bool& answered);
  bool fetch(LookUp& look, const StoredPart& part, const StoredRow& row, const std::vector<StoredPiece>& pieces);
  bool take(LookUp& look, const StoredPart& part, const StoredRow& row, const StoredPiece& piece,
            const std::string& value);
  void look_up_all(LookUp& look, const std::vector<std::vector<StoredRow>>& rows);
  [[nodiscard]] std::vector<std::vector<StoredRow>> rows_of(const Call& call) const;
  [[nodiscard]] TierKeys keys_of(const StoredPart& part, const std::string& tenant, std::uint64_t epoch);
  void keep(const StoredPart& part, const StoredRow& row, std::int64_t before, std::uint64_t epoch);
  void write(const StoredPart& part, const StoredRow& row, const StoredPiece& piece, std::uint64_t epoch);
  void drop_writes();
  void add(const StoreStats& counts);

  const StoreOptions options_;
  const std::vector<std::unique_ptr<StoredPart>> parts_;
  std::vector<std::string> layouts_;  ///< of the parts
  const Cache cache_;
  FetchSpeed speed_;
  mutable std::mutex mutex_;
  StoreStats stats_;      ///< guarded by mutex_, and so are the others here
  std::string identity_;  ///< of identity_epoch_
  std::uint64_t identity_epoch_ = 0;
  std::set<std::string> under_way_;  ///< keys that are to be written
  WriteQueue queue_;                 ///< last: their threads use the above
  WriteQueue fetching_;              ///< prefetches
};

}  // namespace llmcache
