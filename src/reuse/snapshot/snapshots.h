// Saving a cache into a file, loading it again, and doing both by itself.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "llmcache/snapshot.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/model_identity.h"

namespace llmcache {

using SnapshotParts = std::vector<std::unique_ptr<SnapshotPart>>;

/// The snapshots of one cache. Thread-safe; saves and loads come one after the other.
class Snapshots {
 public:
  /// What it needs of the cache. All of it may be called from any thread.
  struct Cache {
    std::function<ModelIdentity()> identity;
    std::function<SnapshotParts()> parts;
    /// Another number once weights changed or everything was dropped.
    std::function<std::uint64_t()> epoch;
    /// Takes a step unless that has happened since `epoch`, and keeps it from happening meanwhile. False: it had.
    std::function<bool(std::uint64_t epoch, const std::function<void()>& step)> publish;
  };

  Snapshots(SnapshotOptions options, Cache cache);
  /// Saves, if the options say so and start() was called.
  ~Snapshots();
  Snapshots(const Snapshots&) = delete;
  Snapshots& operator=(const Snapshots&) = delete;

  /// Loads the file that the options name, if they do, and saves into it from then on.
  void start();
  /// Throws Error: kInvalidFile if it cannot be written, kNotAvailable if the epoch passed, what the cache throws. The
  /// file is then as it was.
  SnapshotReport save(const std::filesystem::path& path);
  /// Never throws for what is wrong with the file.
  SnapshotReport load(const std::filesystem::path& path);
  [[nodiscard]] SnapshotStats stats() const;

 private:
  void save_now_and_then();
  void save_quietly() noexcept;
  SnapshotReport write(const std::filesystem::path& path);
  SnapshotReport read(const std::filesystem::path& path);

  const SnapshotOptions options_;
  const Cache cache_;
  std::mutex one_at_a_time_;
  mutable std::mutex mutex_;
  SnapshotStats stats_;  ///< guarded by mutex_
  bool started_ = false;
  bool stopped_ = false;  ///< guarded by mutex_
  std::condition_variable stop_;
  std::thread thread_;
};

}  // namespace llmcache
