// A store in a directory of this machine.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llmcache/store/state_store.h"

namespace llmcache {

struct DirectoryStoreOptions {
  /// The folder; made if it is not there. Of one process and store at a time, and of nothing else.
  std::filesystem::path path = {};
  /// Bytes that its files may take, in blocks of the file system (4 KiB); never exceeded. What was used longest ago
  /// goes first, over restarts too. Default 16 GiB.
  std::uint64_t capacity_bytes = std::uint64_t{16} << 30;
  /// A larger value is not taken. Default 256 MiB.
  std::uint64_t max_value_bytes = std::uint64_t{256} << 20;
};

/// A file a value, with a checksum over all of it: what is damaged is no value, and goes. Files are written beside
/// their place and put there whole; a crash of the machine may lose or damage the latest, which the checksum tells.
///
/// Where the disk is full, the folder cannot be written or was removed, a put is dropped and counted; it is made again
/// when that is possible. The deadline is looked at between pieces of 1 MiB: a file system that hangs (a network's)
/// keeps the call waiting.
class DirectoryStore final : public StateStore {
 public:
  /// Throws Error: kInvalidOptions for a value out of range; kInvalidFile if the folder cannot be made, read or
  /// written, or another store, of whatever process, is at work in it.
  explicit DirectoryStore(DirectoryStoreOptions options);
  ~DirectoryStore() override;

  [[nodiscard]] std::string name() const override { return "directory"; }
  StoreValues get(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome put(std::span<const StoreItem> items, StoreDeadline deadline) override;
  std::vector<bool> exists(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome erase(std::span<const std::string> keys, StoreDeadline deadline) override;
  StoreOutcome erase_prefix(std::string_view prefix, StoreDeadline deadline) override;
  [[nodiscard]] std::vector<TierStats> stats() const override;

 private:
  class Folder;
  std::unique_ptr<Folder> folder_;
};

}  // namespace llmcache
