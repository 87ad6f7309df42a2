// Each seed of the fuzz target for token files by itself, and all that one changed byte makes of it.
#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <string>

#include "failure.h"
#include "fuzz/check.h"
#include "reader_support.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

TEST(TokenFileSeeds, AreReadOrRefused) {
  const std::set<std::string> refused = {"nan_score", "offsets_fall", "offsets_far", "names_deep", "overflow",
                                         "overlap",   "cut",          "short",       "texts_fall", "gold_far"};
  std::size_t count = 0;
  for (const auto& seed :
       std::filesystem::directory_iterator(std::filesystem::path(LLMCACHE_FUZZ_SEEDS) / "token_file")) {
    SCOPED_TRACE(seed.path().string());
    const std::string bytes = bytes_of(seed.path());
    EXPECT_NO_THROW(fuzz::check_token_file(bytes));
    const std::string name = seed.path().filename().string();
    EXPECT_EQ(refusal<Failure>([&] { return parse_token_file(bytes, "seed"); }).empty(), !refused.contains(name));
    ++count;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      EXPECT_NO_THROW(fuzz::check_token_file(flipped(bytes, i, i))) << i;
    }
  }
  EXPECT_GT(count, refused.size() + 5);
}

}  // namespace
}  // namespace llmcache::bench
