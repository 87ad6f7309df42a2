// A cache that is killed while it saves: whenever that happens, the file is the one before or the new one, and loads.
#include <ATen/Parallel.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>
#include <random>

#include "support.h"
#include "temporary_folder.h"

namespace llmcache::test {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSaved = "tiny-gpt2-sdpa";
constexpr std::uint64_t kAlways = 6;  ///< texts that are in every file

/// As many as LLMCACHE_KILLS says.
int kills() {
  const char* const chosen = std::getenv("LLMCACHE_KILLS");
  return chosen == nullptr ? 50 : std::max(1, std::atoi(chosen));
}

/// Texts by number.
Request text(std::uint64_t number) { return right_padded(model_info(kSaved), {40}, 1'000 + number); }

void compute(LayerCache<Module>& cache, std::uint64_t number) {
  cache.forward(text(number).inputs, {.output = Output::kLastToken});
}

/// True if the cache knew all of it.
bool knows(LayerCache<Module>& cache, std::uint64_t number) {
  compute(cache, number);
  return cache.last_report().sequences.at(0).reused_tokens == 40;
}

/// What a file holds beside the texts that are in every one: from `first` up to, and without, `end`.
struct Contents {
  std::uint64_t first = kAlways;
  std::uint64_t end = kAlways;
};

class KilledSave : public ::testing::Test {
 protected:
  KilledSave() : saved_(load_model(kSaved)), reader_(saved_.with_options({})), plain_(load_model(kSaved)) {
    at::set_num_threads(1);  // whom it forks has no other threads
    for (std::uint64_t number = 0; number < kAlways; ++number) compute(saved_, number);
    const auto begin = std::chrono::steady_clock::now();
    saved_.save(path());
    save_time_ = std::chrono::steady_clock::now() - begin;
  }
  [[nodiscard]] fs::path path() const { return folder_ / "cache.snapshot"; }

  /// Computes one text more before each save, so that no two files are the same, until it is killed. Ends the process
  /// if that fails.
  [[noreturn]] void save_until_killed(std::uint64_t next) {
    try {
      for (;; ++next) {
        compute(saved_, next);
        saved_.save(path());
      }
    } catch (const std::exception& error) {
      std::cerr << error.what() << '\n';
    }
    ::_exit(1);
  }
  /// Kills a process that saves texts from `first` on, at some moment.
  void kill_one(std::uint64_t first) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) save_until_killed(first);
    const double most_us = 5 * std::chrono::duration<double, std::micro>(save_time_).count();
    ::usleep(static_cast<useconds_t>(std::uniform_real_distribution<>(0, most_us)(random_)));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
  }
  /// Loads the file, which must be whole: the one before, or one of a process that began at `first`.
  Contents contents(const Contents& before, std::uint64_t first) {
    reader_.clear();
    const SnapshotReport loaded = reader_.load(path());
    EXPECT_EQ(loaded.refused, "");
    for (const SnapshotPartReport& part : loaded.parts) EXPECT_EQ(part.left, 0U) << part.why;
    for (std::uint64_t number = 0; number < kAlways; ++number) EXPECT_TRUE(knows(reader_, number));
    Contents found{first, first};
    while (knows(reader_, found.end)) ++found.end;
    if (found.end > first) return found;
    for (std::uint64_t number = before.first; number < before.end; ++number) EXPECT_TRUE(knows(reader_, number));
    return before;
  }
  /// From what was loaded.
  void expect_right_answer() {
    const Request asked = text(0);
    const auto want = run_plain(plain_, asked.inputs);
    EXPECT_TRUE(close_on_real(reader_.forward(asked.inputs), want, asked, tolerance_of(model_info(kSaved))));
  }

  const TemporaryFolder folder_;
  LayerCache<Module> saved_;
  LayerCache<Module> reader_;
  Module plain_;
  std::chrono::steady_clock::duration save_time_{};
  std::mt19937_64 random_{3};
};

TEST_F(KilledSave, LeavesTheFileBeforeOrTheNewOne) {
  Contents in_file;
  int replaced = 0;
  int interrupted = 0;
  for (int round = 0; round < kills() && !HasFailure(); ++round) {
    SCOPED_TRACE(round);
    const std::uint64_t first = in_file.end + 1;
    kill_one(first);
    interrupted += fs::exists(path().string() + ".part") ? 1 : 0;
    const Contents now = contents(in_file, first);
    replaced += now.first == first ? 1 : 0;
    in_file = now;
    if (round % 25 == 0) expect_right_answer();
  }
  std::cout << kills() << " killed: " << interrupted << " while they wrote, " << replaced << " behind a new file\n";
  EXPECT_GT(interrupted, 0) << "none was killed in the midst of saving";
  EXPECT_GT(replaced, 0) << "none had saved before";
  // What was left beside it does no harm.
  saved_.save(path());
  EXPECT_FALSE(fs::exists(path().string() + ".part"));
}

}  // namespace
}  // namespace llmcache::test
