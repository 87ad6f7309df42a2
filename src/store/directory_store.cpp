#include "llmcache/store/directory_store.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <list>
#include <mutex>
#include <system_error>
#include <unordered_map>

#include "llmcache/store/circuit_breaker.h"
#include "llmcache/store/tier_counter.h"
#include "refusal.h"
#include "store/byte_io.h"
#include "store/open_file.h"

namespace llmcache {
namespace {

constexpr std::string_view kValueMark = "LLMCDIR1";
constexpr std::string_view kValueEnding = ".state";
constexpr std::string_view kUnfinishedEnding = ".tmp";
constexpr std::size_t kValueHeadBytes = 32;  // mark, bytes of the key, bytes of the value, check of both
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
constexpr std::uint64_t kDiskBlock = 4096;

std::string disk_failure() { return std::generic_category().message(errno); }

std::uint64_t blocks_of(std::uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }

std::uint64_t value_check(std::string_view key, std::string_view value) {
  return XXH3_64bits_withSeed(value.data(), value.size(), XXH3_64bits(key.data(), key.size()));
}

enum class Reading { kWhole, kMissing, kDamaged, kTimeout, kFailed };

/// Fills `to` from the file, a piece at a time.
Reading read_pieces(int file, std::string& to, StoreDeadline deadline) {
  for (std::size_t at = 0; at < to.size();) {
    if (std::chrono::steady_clock::now() >= deadline) return Reading::kTimeout;
    const auto got = ::read(file, to.data() + at, std::min(kPieceBytes, to.size() - at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Reading::kFailed;
    if (got == 0) return Reading::kDamaged;
    at += static_cast<std::size_t>(got);
  }
  return Reading::kWhole;
}

/// Reads the file of a value of at most `most` bytes, and checks all of it.
Reading read_value(const std::string& path, std::string_view key, std::uint64_t most, StoreDeadline deadline,
                   std::string& value) {
  const OpenFile file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return errno == ENOENT ? Reading::kMissing : Reading::kFailed;
  struct stat status {};
  if (::fstat(file.number(), &status) != 0) return Reading::kFailed;
  const std::uint64_t before = kValueHeadBytes + key.size();
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < before || size - before > most) return Reading::kDamaged;
  std::string head(before, '\0');
  if (const Reading read = read_pieces(file.number(), head, deadline); read != Reading::kWhole) return read;
  ByteReader reader(head);
  const bool ours = reader.take(kValueMark.size()) == kValueMark && reader.number<std::uint64_t>() == key.size() &&
                    reader.number<std::uint64_t>() == size - before;
  const auto check = reader.number<std::uint64_t>();
  if (!ours || reader.left() != key) return Reading::kDamaged;
  value.resize(size - before);
  if (const Reading read = read_pieces(file.number(), value, deadline); read != Reading::kWhole) return read;
  if (value_check(key, value) != check) return Reading::kDamaged;
  ::futimens(file.number(), nullptr);  // used now: over restarts this is the order in which values go
  return Reading::kWhole;
}

/// False, and errno, if not all could be written.
bool write_pieces(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const auto put = ::write(file, bytes.data(), std::min(kPieceBytes, bytes.size()));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(put));
  }
  return true;
}

bool is_store_key(std::string_view key) {
  try {
    check_store_key(key);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

}  // namespace

/// The files, and which there are, by age of use.
class DirectoryStore::Folder {
 public:
  explicit Folder(DirectoryStoreOptions options)
      : options_(std::move(options)), root_(options_.path.string()), breaker_([this] { return readable(); }) {
    if (const std::string failed = open(); !failed.empty()) {
      refuse_file(fmt::format("the folder '{}' cannot be a store: {}", root_, failed));
    }
  }
  ~Folder() { breaker_.stop(); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  StoreValues get(std::span<const std::string> keys, StoreDeadline deadline);
  StoreOutcome put(const StoreItem& item);
  [[nodiscard]] bool holds(const std::string& key) const {
    const std::lock_guard lock(mutex_);
    return files_.contains(key);
  }
  [[nodiscard]] std::vector<std::string> with_prefix(std::string_view prefix) const;
  void forget(const std::string& key, bool counted);
  [[nodiscard]] TierStats stats() const;

  TierCounter counter;

 private:
  using Ages = std::list<std::string>;  ///< keys, used longest ago in front
  struct File {
    std::uint64_t bytes = 0;  ///< in blocks
    Ages::iterator age;
  };

  [[nodiscard]] std::string path_of(std::string_view key, std::string_view ending = kValueEnding) const {
    return fmt::format("{}/{}{}", root_, key, ending);
  }
  [[nodiscard]] bool readable() const {
    return OpenFile(::open(root_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)).number() >= 0;
  }
  [[nodiscard]] bool holds_lock() const;
  std::string open();
  std::string scan();
  void make_room(std::uint64_t bytes);
  StoreOutcome write(const StoreItem& item, std::string& why);
  void known(const std::string& key, std::uint64_t bytes);
  void used(const std::string& key);

  const DirectoryStoreOptions options_;
  const std::string root_;
  std::mutex writing_;  ///< one put at a time
  OpenFile held_;       ///< the lock, guarded by writing_
  mutable std::mutex mutex_;
  std::unordered_map<std::string, File> files_;  ///< guarded by mutex_, and so are the next two
  Ages ages_;
  std::uint64_t bytes_ = 0;
  CircuitBreaker breaker_;  ///< last: its thread uses the above
};

/// Makes the folder, takes its lock, and finds what is in it. Why not; empty: it is done.
std::string DirectoryStore::Folder::open() {
  std::error_code error;
  std::filesystem::create_directories(root_, error);
  if (error) return error.message();
  OpenFile lock(::open((root_ + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
  if (!lock) return disk_failure();
  if (::flock(lock.number(), LOCK_EX | LOCK_NB) != 0) {
    return errno == EWOULDBLOCK ? "another store is at work in it" : disk_failure();
  }
  held_ = std::move(lock);
  return scan();
}

/// True if the lock that is held is that of the folder as it is now.
bool DirectoryStore::Folder::holds_lock() const {
  struct stat own {};
  struct stat there {};
  return ::fstat(held_.number(), &own) == 0 && ::stat((root_ + "/lock").c_str(), &there) == 0 &&
         own.st_ino == there.st_ino && own.st_dev == there.st_dev;
}

std::string DirectoryStore::Folder::scan() {
  struct Found {
    std::filesystem::file_time_type used;
    std::string key;
    std::uint64_t bytes = 0;
  };
  std::vector<Found> all;
  std::error_code error;
  for (std::filesystem::directory_iterator at(root_, error), end; !error && at != end; at.increment(error)) {
    const std::string name = at->path().filename().string();
    std::error_code skip;
    if (name.ends_with(kUnfinishedEnding)) std::filesystem::remove(at->path(), skip);
    if (!name.ends_with(kValueEnding)) continue;
    const std::string key = name.substr(0, name.size() - kValueEnding.size());
    const auto used = at->last_write_time(skip);
    const auto bytes = at->file_size(skip);
    if (!skip && is_store_key(key)) all.push_back({used, key, bytes});
  }
  if (error) return error.message();
  std::ranges::sort(all, {}, &Found::used);
  const std::lock_guard lock(mutex_);
  files_.clear();
  ages_.clear();
  bytes_ = 0;
  for (const Found& found : all) known(found.key, blocks_of(found.bytes));
  make_room(0);
  return {};
}

/// The lock is held.
void DirectoryStore::Folder::known(const std::string& key, std::uint64_t bytes) {
  const auto [place, added] = files_.try_emplace(key);
  File& file = place->second;
  if (added) {
    file.age = ages_.insert(ages_.end(), key);
  } else {
    ages_.splice(ages_.end(), ages_, file.age);
    bytes_ -= file.bytes;
  }
  file.bytes = bytes;
  bytes_ += bytes;
}

void DirectoryStore::Folder::used(const std::string& key) {
  const std::lock_guard lock(mutex_);
  const auto place = files_.find(key);
  if (place != files_.end()) ages_.splice(ages_.end(), ages_, place->second.age);
}

/// Removes what was used longest ago until so many bytes more are allowed. The lock is held.
void DirectoryStore::Folder::make_room(std::uint64_t bytes) {
  while (bytes_ + bytes > options_.capacity_bytes && !ages_.empty()) {
    const auto place = files_.find(ages_.front());
    ::unlink(path_of(place->first).c_str());
    bytes_ -= place->second.bytes;
    files_.erase(place);
    ages_.pop_front();
    counter.evicted();
  }
}

void DirectoryStore::Folder::forget(const std::string& key, bool counted) {
  const std::lock_guard lock(mutex_);
  const auto place = files_.find(key);
  if (place == files_.end()) return;
  ::unlink(path_of(key).c_str());
  bytes_ -= place->second.bytes;
  ages_.erase(place->second.age);
  files_.erase(place);
  if (counted) counter.damaged();
}

StoreValues DirectoryStore::Folder::get(std::span<const std::string> keys, StoreDeadline deadline) {
  StoreValues found;
  found.values.resize(keys.size());
  std::string why;
  if (breaker_.open()) found.outcome = StoreOutcome::kRefused;
  for (std::size_t i = 0; i < keys.size() && found.outcome == StoreOutcome::kDone; ++i) {
    if (!holds(keys[i])) continue;
    std::string value;
    switch (read_value(path_of(keys[i]), keys[i], options_.max_value_bytes, deadline, value)) {
      case Reading::kWhole:
        found.values[i] = std::move(value);
        used(keys[i]);
        break;
      case Reading::kMissing:
        forget(keys[i], false);
        break;
      case Reading::kDamaged:
        forget(keys[i], true);
        break;
      case Reading::kTimeout:
        why = "reading a file took longer than the deadline";
        found.outcome = StoreOutcome::kTimeout;
        break;
      case Reading::kFailed:
        why = disk_failure();
        found.outcome = StoreOutcome::kFailed;
        break;
    }
  }
  if (found.outcome == StoreOutcome::kDone) {
    breaker_.succeeded();
  } else if (found.outcome != StoreOutcome::kRefused) {
    breaker_.trip();
  }
  counter.looked_up(found);
  counter.ended(found.outcome, why);
  return found;
}

StoreOutcome DirectoryStore::Folder::put(const StoreItem& item) {
  const std::lock_guard one_at_a_time(writing_);
  std::string why;
  // The folder may have been removed, and the lock with it; another store may have begun there.
  if (!holds_lock()) why = open();
  const StoreOutcome outcome = why.empty() ? write(item, why) : StoreOutcome::kFailed;
  if (outcome == StoreOutcome::kDone) {
    counter.written(item.value.size());
  } else {
    counter.not_written(1);
  }
  counter.ended(outcome, why);
  return outcome;
}

StoreOutcome DirectoryStore::Folder::write(const StoreItem& item, std::string& why) {
  const std::uint64_t bytes = blocks_of(kValueHeadBytes + item.key.size() + item.value.size());
  if (item.value.size() > options_.max_value_bytes || bytes > options_.capacity_bytes) {
    why = fmt::format("a value of {} bytes is larger than the store takes", item.value.size());
    return StoreOutcome::kNoRoom;
  }
  {
    const std::lock_guard lock(mutex_);
    make_room(bytes);
  }
  const std::string beside = path_of(item.key, kUnfinishedEnding);
  const OpenFile file(::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  ByteWriter head;
  for (const char c : kValueMark) head.number(c);
  head.number<std::uint64_t>(item.key.size());
  head.number<std::uint64_t>(item.value.size());
  head.number(value_check(item.key, item.value));
  const bool written = file && write_pieces(file.number(), head.bytes()) && write_pieces(file.number(), item.key) &&
                       write_pieces(file.number(), item.value) &&
                       ::rename(beside.c_str(), path_of(item.key).c_str()) == 0;
  if (!written) {
    const bool full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
    why = disk_failure();
    ::unlink(beside.c_str());
    return full ? StoreOutcome::kNoRoom : StoreOutcome::kFailed;
  }
  const std::lock_guard lock(mutex_);
  known(std::string(item.key), bytes);
  return StoreOutcome::kDone;
}

std::vector<std::string> DirectoryStore::Folder::with_prefix(std::string_view prefix) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> keys;
  for (const auto& [key, file] : files_) {
    if (key.starts_with(prefix)) keys.push_back(key);
  }
  return keys;
}

TierStats DirectoryStore::Folder::stats() const {
  TierStats stats = counter.stats();
  stats.open = breaker_.open();
  stats.openings = breaker_.openings();
  const std::lock_guard lock(mutex_);
  stats.entries = files_.size();
  stats.bytes = bytes_;
  return stats;
}

DirectoryStore::DirectoryStore(DirectoryStoreOptions options) {
  if (options.path.empty()) refuse_options("DirectoryStoreOptions.path is empty");
  if (options.capacity_bytes == 0) refuse_options("DirectoryStoreOptions.capacity_bytes is 0; more is expected");
  if (options.max_value_bytes == 0) refuse_options("DirectoryStoreOptions.max_value_bytes is 0; more is expected");
  folder_ = std::make_unique<Folder>(std::move(options));
}

DirectoryStore::~DirectoryStore() = default;

StoreValues DirectoryStore::get(std::span<const std::string> keys, StoreDeadline deadline) {
  for (const std::string& key : keys) check_store_key(key);
  return folder_->get(keys, deadline);
}

StoreOutcome DirectoryStore::put(std::span<const StoreItem> items, StoreDeadline deadline) {
  StoreOutcome last = StoreOutcome::kDone;
  for (const StoreItem& item : items) check_store_key(item.key);
  for (const StoreItem& item : items) {
    if (std::chrono::steady_clock::now() >= deadline) {
      folder_->counter.not_written(1);
      last = StoreOutcome::kTimeout;
      continue;
    }
    const StoreOutcome outcome = folder_->put(item);
    if (outcome != StoreOutcome::kDone) last = outcome;
  }
  return last;
}

std::vector<bool> DirectoryStore::exists(std::span<const std::string> keys, StoreDeadline /*deadline*/) {
  std::vector<bool> known;
  for (const std::string& key : keys) {
    check_store_key(key);
    known.push_back(folder_->holds(key));
  }
  return known;
}

StoreOutcome DirectoryStore::erase(std::span<const std::string> keys, StoreDeadline /*deadline*/) {
  for (const std::string& key : keys) {
    check_store_key(key);
    folder_->forget(key, false);
  }
  return StoreOutcome::kDone;
}

StoreOutcome DirectoryStore::erase_prefix(std::string_view prefix, StoreDeadline /*deadline*/) {
  for (const std::string& key : folder_->with_prefix(prefix)) folder_->forget(key, false);
  return StoreOutcome::kDone;
}

std::vector<TierStats> DirectoryStore::stats() const {
  TierStats stats = folder_->stats();
  stats.name = name();
  return {stats};
}

}  // namespace llmcache
