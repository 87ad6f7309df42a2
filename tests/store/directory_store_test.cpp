// A store in a directory: what it keeps, over restarts too, what it drops, and what becomes of it where the disk fails.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <llmcache/error.h>
#include <llmcache/store/directory_store.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <thread>

#include "temporary_folder.h"

namespace llmcache::test {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Optional;

StoreDeadline soon() { return store_deadline(10'000); }

StoreOutcome put(StateStore& store, const std::string& key, const std::string& value) {
  const StoreItem item{key, value};
  return store.put({&item, 1}, soon());
}

std::optional<std::string> get(StateStore& store, const std::string& key) {
  return store.get({&key, 1}, soon()).values.at(0);
}

std::unique_ptr<DirectoryStore> open(const fs::path& path, std::uint64_t capacity = 1 << 20) {
  return std::make_unique<DirectoryStore>(DirectoryStoreOptions{.path = path, .capacity_bytes = capacity});
}

/// Bytes of all files of values, in blocks.
std::uint64_t bytes_in(const fs::path& folder) {
  std::uint64_t bytes = 0;
  for (const auto& file : fs::directory_iterator(folder)) bytes += (file.file_size() + 4095) / 4096 * 4096;
  return bytes;
}

std::string contents_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_to(const fs::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << contents;
}

TEST(DirectoryStore, GivesWhatWasPut) {
  const TemporaryFolder folder;
  const auto store = open(folder.path());
  const std::string value("two\0parts", 9);
  EXPECT_EQ(put(*store, "a", value), StoreOutcome::kDone);
  EXPECT_EQ(put(*store, "b", ""), StoreOutcome::kDone);
  const std::vector<std::string> keys = {"a", "c", "b"};
  const StoreValues found = store->get(keys, soon());
  EXPECT_EQ(found.outcome, StoreOutcome::kDone);
  EXPECT_THAT(found.values, ElementsAre(Optional(value), std::nullopt, Optional(std::string())));
  EXPECT_THAT(store->exists(keys, soon()), ElementsAre(true, false, true));
  const TierStats stats = store->stats().at(0);
  EXPECT_EQ(stats.lookups, 3U);
  EXPECT_EQ(stats.hits, 2U);
  EXPECT_EQ(stats.misses, 1U);
  EXPECT_EQ(stats.bytes_read, value.size());
  EXPECT_EQ(stats.entries, 2U);
}

TEST(DirectoryStore, ReplacesAndErases) {
  const TemporaryFolder folder;
  const auto store = open(folder.path());
  for (const char* key : {"x:a", "x:b", "y:a"}) put(*store, key, key);
  put(*store, "x:a", "other");
  EXPECT_THAT(get(*store, "x:a"), Optional(std::string("other")));
  EXPECT_EQ(store->erase_prefix("x:", soon()), StoreOutcome::kDone);
  EXPECT_EQ(get(*store, "x:a"), std::nullopt);
  EXPECT_EQ(get(*store, "x:b"), std::nullopt);
  const std::string last = "y:a";
  EXPECT_THAT(get(*store, last), Optional(last));
  EXPECT_EQ(store->erase({&last, 1}, soon()), StoreOutcome::kDone);
  EXPECT_EQ(get(*store, last), std::nullopt);
  EXPECT_EQ(store->stats().at(0).bytes, 0U);
}

TEST(DirectoryStore, RefusesOtherKeys) {
  const TemporaryFolder folder;
  const auto store = open(folder.path());
  for (const std::string& key : {std::string(), std::string("../a"), std::string("a b"), std::string(201, 'a')}) {
    EXPECT_THROW(put(*store, key, "value"), std::invalid_argument) << key;
    EXPECT_THROW(get(*store, key), std::invalid_argument) << key;
  }
}

TEST(DirectoryStore, KeepsOverRestartsInTheOrderOfUse) {
  const TemporaryFolder folder;
  constexpr std::uint64_t kFour = 4 * 4096;
  {
    const auto store = open(folder.path(), kFour);
    for (const char* key : {"a", "b", "c", "d"}) {
      put(*store, key, key);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // times of files are what counts
    }
    EXPECT_TRUE(get(*store, "a"));
  }
  const auto store = open(folder.path(), kFour);
  put(*store, "e", "e");
  EXPECT_TRUE(get(*store, "a")) << "it was used last";
  EXPECT_FALSE(get(*store, "b")) << "it was used longest ago";
  EXPECT_TRUE(get(*store, "e"));
}

TEST(DirectoryStore, NeverTakesMoreThanItMay) {
  const TemporaryFolder folder;
  constexpr std::uint64_t kCapacity = 10 * 4096;
  const auto store = open(folder.path(), kCapacity);
  for (int i = 0; i < 50; ++i) {
    put(*store, "k" + std::to_string(i), std::string(static_cast<std::size_t>(i) * 300, 'v'));
    EXPECT_LE(bytes_in(folder.path()), kCapacity);
    EXPECT_LE(store->stats().at(0).bytes, kCapacity);
  }
  EXPECT_GT(store->stats().at(0).evictions, 0U);
  EXPECT_TRUE(get(*store, "k49"));
  EXPECT_EQ(put(*store, "large", std::string(kCapacity, 'v')), StoreOutcome::kNoRoom);
  EXPECT_TRUE(get(*store, "k49")) << "what cannot be kept evicts nothing";
}

TEST(DirectoryStore, EvictsAtOnceWhatIsMoreThanANewCapacity) {
  const TemporaryFolder folder;
  {
    const auto store = open(folder.path());
    for (int i = 0; i < 8; ++i) put(*store, "k" + std::to_string(i), "value");
  }
  const auto store = open(folder.path(), 3 * 4096);
  EXPECT_EQ(store->stats().at(0).entries, 3U);
  EXPECT_LE(bytes_in(folder.path()), 4U * 4096U);  // the lock's file, which is empty, counts as none
}

TEST(DirectoryStore, BelongsToOneAtATime) {
  const TemporaryFolder folder;
  auto store = open(folder.path());
  try {
    open(folder.path());
    FAIL() << "a second store took the folder";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidFile);
    EXPECT_THAT(error.what(), HasSubstr("another store"));
  }
  store.reset();
  EXPECT_NO_THROW(open(folder.path()));
}

TEST(DirectoryStore, RefusesWhatCannotBeAFolder) {
  const TemporaryFolder folder;
  write_to(folder / "file", "text");
  for (const fs::path& path : {folder / "file", fs::path("/proc/llmcache")}) {
    EXPECT_THROW(open(path), Error) << path;
  }
  EXPECT_THROW(DirectoryStore({.path = {}}), Error);
  EXPECT_THROW(DirectoryStore({.path = folder.path(), .capacity_bytes = 0}), Error);
}

TEST(DirectoryStore, FindsDamageAtEveryByte) {
  const TemporaryFolder folder;
  const std::string value = "a small value";
  std::string file;
  {
    const auto store = open(folder.path());
    put(*store, "key", value);
    file = contents_of(folder / "key.state");
  }
  ASSERT_GT(file.size(), value.size());
  for (std::size_t at = 0; at < file.size(); ++at) {
    std::string damaged = file;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x40);
    write_to(folder / "key.state", damaged);
    const auto store = open(folder.path());
    EXPECT_FALSE(get(*store, "key")) << "byte " << at;
    EXPECT_EQ(store->stats().at(0).damaged, 1U);
    EXPECT_FALSE(fs::exists(folder / "key.state"));
  }
  for (std::size_t size = 0; size < file.size(); ++size) {
    write_to(folder / "key.state", file.substr(0, size));
    EXPECT_FALSE(get(*open(folder.path()), "key")) << "cut at " << size;
  }
  write_to(folder / "key.state", file + "x");
  EXPECT_FALSE(get(*open(folder.path()), "key"));
  write_to(folder / "other.state", file);
  EXPECT_FALSE(get(*open(folder.path()), "other")) << "it is the file of another key";
  write_to(folder / "key.state", file);
  EXPECT_THAT(get(*open(folder.path()), "key"), Optional(value));
}

TEST(DirectoryStore, RemovesWhatACrashLeft) {
  const TemporaryFolder folder;
  write_to(folder / "key.tmp", "half a val");
  const auto store = open(folder.path());
  EXPECT_FALSE(fs::exists(folder / "key.tmp"));
  EXPECT_FALSE(get(*store, "key"));
}

TEST(DirectoryStore, DropsWhatTheDiskHasNoRoomFor) {
  const TemporaryFolder folder;
  const auto store = open(folder.path(), 1 << 24);
  ASSERT_EQ(put(*store, "small", "value"), StoreOutcome::kDone);
  // No file may grow beyond 1 MiB: it fails in the midst of a value, as on a disk that is full.
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1 << 20, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const StoreOutcome outcome = put(*store, "large", std::string(3 << 20, 'v'));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(outcome, StoreOutcome::kNoRoom);
  EXPECT_FALSE(get(*store, "large"));
  EXPECT_FALSE(fs::exists(folder / "large.tmp"));
  EXPECT_TRUE(get(*store, "small"));
  EXPECT_EQ(store->stats().at(0).writes_failed, 1U);
  EXPECT_THAT(store->stats().at(0).last_failure, Not(HasSubstr("deadline")));
}

TEST(DirectoryStore, GoesOnWhereItMayNotWriteAnyMore) {
  const TemporaryFolder folder;
  fs::create_directory(folder / "store");
  const auto store = open(folder / "store");
  ASSERT_EQ(put(*store, "key", "value"), StoreOutcome::kDone);
  fs::permissions(folder / "store",
                  fs::perms::owner_read | fs::perms::owner_exec | fs::perms::others_exec | fs::perms::others_read);
  const bool root = ::geteuid() == 0;
  constexpr uid_t kNobody = 65'534;  // root may write everywhere
  ASSERT_TRUE(!root || ::seteuid(kNobody) == 0);
  const StoreOutcome outcome = put(*store, "more", "value");
  ASSERT_TRUE(!root || ::seteuid(0) == 0);
  EXPECT_EQ(outcome, StoreOutcome::kFailed);
  EXPECT_TRUE(get(*store, "key"));
  fs::permissions(folder / "store", fs::perms::owner_all);
  EXPECT_EQ(put(*store, "more", "value"), StoreOutcome::kDone);
}

TEST(DirectoryStore, BeginsAnewWhereItsFolderWasRemoved) {
  const TemporaryFolder folder;
  const auto store = open(folder / "store");
  ASSERT_EQ(put(*store, "key", "value"), StoreOutcome::kDone);
  fs::remove_all(folder / "store");
  EXPECT_FALSE(get(*store, "key"));
  EXPECT_EQ(put(*store, "more", "value"), StoreOutcome::kDone);
  EXPECT_TRUE(get(*store, "more"));
  EXPECT_EQ(store->stats().at(0).entries, 1U);
  EXPECT_THROW(open(folder / "store"), Error) << "the lock was taken again";
}

TEST(DirectoryStore, CannotBeginAnewInAFolderThatAnotherHasTaken) {
  const TemporaryFolder folder;
  const auto store = open(folder / "store");
  fs::remove_all(folder / "store");
  auto other = open(folder / "store");
  EXPECT_EQ(put(*store, "key", "value"), StoreOutcome::kFailed);
  EXPECT_EQ(put(*other, "key", "value"), StoreOutcome::kDone);
  other.reset();
  fs::remove_all(folder / "store");
  EXPECT_EQ(put(*store, "key", "value"), StoreOutcome::kDone);
  EXPECT_TRUE(get(*store, "key"));
}

TEST(DirectoryStore, EndsAtTheDeadline) {
  const TemporaryFolder folder;
  const auto store = open(folder.path());
  put(*store, "key", "value");
  const std::string key = "key";
  const StoreValues late = store->get({&key, 1}, store_deadline(-1));
  EXPECT_EQ(late.outcome, StoreOutcome::kTimeout);
  EXPECT_FALSE(late.values.at(0));
  // It is left alone for a while, and asked again when it can be read.
  EXPECT_EQ(store->stats().at(0).openings, 1U);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (store->stats().at(0).open && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  EXPECT_TRUE(get(*store, "key"));
}

TEST(DirectoryStore, ServesManyThreads) {
  const TemporaryFolder folder;
  const auto store = open(folder.path(), 20 * 4096);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) {
        const std::string key = "k" + std::to_string((i * 7 + t) % 30);
        put(*store, key, std::string(500, key.back()));
        const auto value = get(*store, "k" + std::to_string(i % 30));
        EXPECT_TRUE(!value || *value == std::string(500, std::to_string(i % 30).back()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(bytes_in(folder.path()), 20U * 4096U);
  EXPECT_EQ(store->stats().at(0).damaged, 0U);
}

}  // namespace
}  // namespace llmcache::test
