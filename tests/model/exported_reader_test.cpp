// Exported programs as text: guards, ranges, calls of modules, weights.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "model/exported_guard.h"
#include "model/exported_json.h"
#include "model/exported_program.h"
#include "model/exported_scopes.h"
#include "model/exported_weights.h"
#include "reader_support.h"

namespace llmcache::exported {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

/// The sound seed of the fuzz target, with the first `from` replaced.
std::string program_with(const std::string& from = "", const std::string& to = "") {
  std::string text = bytes_of(std::filesystem::path(LLMCACHE_FUZZ_SEEDS) / "exported" / "program");
  const auto at = text.find(from);
  if (at == std::string::npos) ADD_FAILURE() << "the program has no " << from;
  return text.replace(at, from.size(), to);
}

std::string refused(const std::string& text) {
  return refusal<Refused>([&] { return parse_program(text); });
}
std::string damaged(const std::string& text) {
  return refusal([&] { return parse_program(text); });
}

std::string with_guard(const std::string& guard) { return program_with("L['ids'].size()[1] <= 256", guard); }

TEST(ShapeGuard, FollowsPythonsArithmetic) {
  const auto holds = [](const std::string& text) {
    const auto guard = ShapeGuard::parse(text);
    if (!guard) ADD_FAILURE() << text;
    return guard && guard->holds(3, 7).value_or(false);
  };
  for (const char* text :
       {"1 == 1", "2 + 3*4 == 14", "(2 + 3)*4 == 20", "-7 // 2 == -4", "-7 % 4 == 1", "7 % -4 == -1", "-2**2 == -4",
        "2**3**2 == 512", "10 - 3 - 2 == 5", "min(2, 5) + max(2, 5) == 7", "not 1 == 2", "1 == 2 or 3 == 3 and 1 < 2",
        "L['a'].size()[0] == 3", "L['b_c'].size()[1]==7", "not (1 == 1 and 1 == 2)", "(-1)*L['a'].size()[1] > -8",
        "((L['a'].size()[0]*L['a'].size()[1]) % L['b'].size()[0]) == 0"}) {
    EXPECT_TRUE(holds(text)) << text;
  }
  for (const char* text : {"1 == 2", "L['a'].size()[0] >= 4", "1 == 1 and 2 == 1", "not 1", "7 // 2 == 4"}) {
    EXPECT_FALSE(holds(text)) << text;
  }
}

TEST(ShapeGuard, SaysWhatItDoesNotUnderstand) {
  for (const char* text :
       {"", " ", "1 ==", "== 1", "1 == 1)", "(1 == 1", "L['a'].size()[2] == 1", "L['a'].stride()[0] == 1",
        "L['a']['b'].size()[0] == 1", "x == 1", "1 / 2 == 0", "1.5 == 1", "Mod(2, 1) == 0", "1 == 1 1", "L['a", "1 = 1",
        "99999999999999999999 == 1", "min(1) == 1", "2***3 == 1"}) {
    EXPECT_FALSE(ShapeGuard::parse(text)) << text;
  }
  EXPECT_FALSE(ShapeGuard::parse(repeated("(", 1000) + "1" + repeated(")", 1000)));
  EXPECT_FALSE(ShapeGuard::parse(repeated("-", 1000) + "1"));
  EXPECT_FALSE(ShapeGuard::parse("3**9999 == 1")->holds(2, 2)) << "too large";
  EXPECT_FALSE(ShapeGuard::parse("1 // (L['a'].size()[0] - 2) == 1")->holds(2, 2)) << "by zero";
}

TEST(ExportedRange, FollowsFromRangesAndGuards) {
  const auto most = [](const std::string& guard) { return parse_program(with_guard(guard)).most_tokens; };
  EXPECT_EQ(most("L['ids'].size()[1] <= 256"), 256);
  EXPECT_EQ(most("L['ids'].size()[1] <= 1024"), 512) << "its range ends there";
  EXPECT_EQ(most("L['ids'].size()[1] != 100"), 99);
  EXPECT_EQ(most("(-1)*L['ids'].size()[1] > -300"), 299);
  EXPECT_EQ(most("L['ids'].size()[1] < 2*150"), 299) << "no constant is near";
  EXPECT_EQ(most("L['ids'].size()[0] != 1"), 512);
  const std::string unbounded = program_with("\"max_val\": 512", "\"max_val\": null");
  EXPECT_EQ(parse_program(unbounded).most_tokens, 256);
}

TEST(ExportedRange, WhatHoldsForFewSizesIsRefused) {
  EXPECT_THAT(refused(with_guard("L['ids'].size()[0] <= 64")), HasSubstr("does not hold for 65 rows of 2 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] >= 5")), HasSubstr("does not hold for 2 rows of 2 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] % 8 == 0")), HasSubstr("does not hold for"));
  EXPECT_THAT(refused(with_guard("L['ids'].is_contiguous()")),
              HasSubstr("a guard that the library does not understand"));
  EXPECT_THAT(refused(program_with("\"min_val\": 2", "\"min_val\": 4")), HasSubstr("exported for 4 rows or more"));
  EXPECT_THAT(refused(program_with("\"max_val\": null", "\"max_val\": 8")), HasSubstr("batches of at most 8 rows"));
  EXPECT_THAT(refused(program_with("'s1'", "'s0'")), HasSubstr("as many rows as tokens only"));
  EXPECT_THAT(refused(program_with("Symbol('s1', positive=True, integer=True)", "2*Symbol('s1')")),
              HasSubstr("which not every number is"));
  for (const std::string& why : {refused(with_guard("1 == 2")), refused(program_with("'s1'", "'s0'"))}) {
    EXPECT_THAT(why, HasSubstr("export with dynamic_shapes")) << "what to do about it";
  }
}

Node node_in(std::vector<std::size_t> frames) {
  Node node;
  node.frames = std::move(frames);
  return node;
}

TEST(ExportedScopes, AreCallsInEachOther) {
  Program program;
  program.frames = {{"0", ""}, {"1", "layers.0"}, {"2", "layers.0.mlp"}, {"3", "layers.1"}};
  for (const auto& frames :
       std::vector<std::vector<std::size_t>>{{0}, {0, 1}, {0, 1, 2}, {}, {0, 1, 2}, {0, 1}, {0}, {0, 3}, {0}}) {
    program.nodes.push_back(node_in(frames));
  }
  const Scope root = scopes_of(program);
  ASSERT_THAT(root.calls, SizeIs(2));
  const Scope& first = root.calls[0];
  EXPECT_EQ(first.path, "layers.0");
  EXPECT_THAT((std::vector{first.begin, first.end, root.calls[1].begin, root.calls[1].end}), ElementsAre(1, 6, 7, 8));
  ASSERT_THAT(first.calls, SizeIs(1));
  EXPECT_EQ(first.calls[0].path, "layers.0.mlp");
  EXPECT_THAT((std::vector{first.calls[0].begin, first.calls[0].end}), ElementsAre(2, 5)) << "with the stranger in it";
}

TEST(ExportedScopes, CallsThatOverlapAreDissolved) {
  Program program;
  program.frames = {{"0", ""}, {"1", "a"}, {"2", "b"}, {"3", "b.c"}, {"4", "other"}, {"5", "a.d"}};
  for (const auto& frames : std::vector<std::vector<std::size_t>>{{0, 1}, {0, 2}, {0, 1}, {0, 2, 3}, {0, 4, 5}}) {
    program.nodes.push_back(node_in(frames));
  }
  const Scope root = scopes_of(program);
  ASSERT_THAT(root.calls, SizeIs(2));
  EXPECT_EQ(root.calls[0].path, "b.c") << "what was in a dissolved call goes to the one around it";
  EXPECT_EQ(root.calls[1].path, "other");
  EXPECT_THAT(root.calls[1].calls, SizeIs(0)) << "a module that is not below its caller";
}

TEST(ExportedProgramText, EachCutIsRefused) {
  const std::string whole = program_with();
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_NE(damaged(whole.substr(0, size)), "") << size;
}

TEST(ExportedProgramText, ValuesMustBeMadeBeforeTheyAreUsed) {
  EXPECT_THAT(damaged(program_with(R"("indices", "arg": {"as_tensor": {"name": "ids"}})",
                                   R"("indices", "arg": {"as_tensor": {"name": "z"}})")),
              HasSubstr("uses 'z', which nothing before it makes"));
  EXPECT_THAT(damaged(program_with(R"("indices", "arg": {"as_tensor": {"name": "ids"}})",
                                   R"("indices", "arg": {"as_tensor": {"name": "n"}})")),
              HasSubstr("uses 'n' as a tensor"));
  EXPECT_THAT(damaged(program_with(R"([{"name": "a"}, {"name": "b"}])", R"([{"name": "a"}, {"name": "a"}])")),
              HasSubstr("'a' is made twice"));
}

TEST(ExportedWeights, MustLieInMemory) {
  EXPECT_EQ(numbers_needed({"f", 7, {3, 4}, {4, 1}, 2}), 14);
  EXPECT_EQ(numbers_needed({"f", 7, {3, 0}, {4, 1}, 2}), 0);
  EXPECT_EQ(numbers_needed({"f", 7, {}, {}, 0}), 1);
  EXPECT_EQ(numbers_needed({"f", 7, {5, 4}, {0, 1}, 0}), 4) << "expanded";
  EXPECT_THAT(refusal([] {
                return numbers_needed({"f", 7, {std::int64_t{1} << 40, std::int64_t{1} << 40}, {0, 0}, 0});
              }),
              HasSubstr("larger than any memory"));
}

}  // namespace
}  // namespace llmcache::exported
