// Exported programs as text: guards, ranges, calls of modules, weights.
#include <fmt/core.h>
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
using Verdict = ShapeGuard::Verdict;

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
    return guard && guard->verdict(3, 7) == Verdict::kHolds;
  };
  for (const char* text : {"1 == 1",
                           "2 + 3*4 == 14",
                           "(2 + 3)*4 == 20",
                           "-7 // 2 == -4",
                           "-7 % 4 == 1",
                           "7 % -4 == -1",
                           "-2**2 == -4",
                           "2**3**2 == 512",
                           "10 - 3 - 2 == 5",
                           "min(2, 5) + max(2, 5) == 7",
                           "not 1 == 2",
                           "1 == 2 or 3 == 3 and 1 < 2",
                           "L['a'].size()[0] == 3",
                           "L['b_c'].size()[1]==7",
                           "not (1 == 1 and 1 == 2)",
                           "(-1)*L['a'].size()[1] > -8",
                           "((L['a'].size()[0]*L['a'].size()[1]) % L['b'].size()[0]) == 0",
                           "7 // -1 == -7",
                           "-7 % -1 == 0",
                           "9223372036854775807 % -2 == -1",
                           "-9223372036854775807 % 2 == 1",
                           "(-9223372036854775807 - 1) % -1 == 0",
                           "(-2)**63 < 0",
                           "(-1)**1001 == -1",
                           "1**9999 == 1",
                           "0**9999 == 0",
                           "0**0 == 1"}) {
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
}

TEST(ShapeGuard, TellsWhatIsTooLargeFromWhatPythonDoesNotCompute) {
  const auto verdict = [](const std::string& text) { return ShapeGuard::parse(text).value().verdict(2, 7); };
  for (const char* text :
       {"3**9999 == 1", "2**63 == 1", "-(-9223372036854775807 - 1) == 1", "(-9223372036854775807 - 1) // -1 == 1",
        "9223372036854775807 + 1 == 1", "-9223372036854775807 - 2 == 1", "9223372036854775807 * 2 == 1"}) {
    EXPECT_EQ(verdict(text), Verdict::kTooLarge) << text;
  }
  for (const char* text : {"1 // (L['a'].size()[0] - 2) == 1", "1 % (L['a'].size()[0] - 2) == 1", "2**-1 == 0"}) {
    EXPECT_EQ(verdict(text), Verdict::kUndefined) << text;
  }
}

TEST(ShapeGuard, SaysWhichInputsItIsAbout) {
  const auto guard =
      ShapeGuard::parse("L['a'].size()[1] + L['b'].size()[0] + L['a'].size()[1] == L['c'].size()[1]").value();
  EXPECT_THAT(guard.token_inputs(), ElementsAre("a", "c"));
  EXPECT_THAT(guard.batch_inputs(), ElementsAre("b"));
}

TEST(ExportedRange, FollowsFromRangesAndGuards) {
  const auto most = [](const std::string& guard) { return parse_program(with_guard(guard)).tokens.at(0).most; };
  EXPECT_EQ(most("L['ids'].size()[1] <= 256"), 256);
  EXPECT_EQ(most("L['ids'].size()[1] <= 1024"), 512) << "its range ends there";
  EXPECT_EQ(most("L['ids'].size()[1] != 100"), 99);
  EXPECT_EQ(most("(-1)*L['ids'].size()[1] > -300"), 299);
  EXPECT_EQ(most("L['ids'].size()[1] < 2*150"), 299) << "no constant is near";
  EXPECT_EQ(most("L['ids'].size()[0] > 0"), 512);
  EXPECT_EQ(most("L['ids'].size()[1] // -1 >= -7"), 7);
  EXPECT_EQ(most("L['ids'].size()[1]**5 > 0"), 512) << "what gets too large is far beyond";
  const std::string unbounded = program_with("\"max_val\": 512", "\"max_val\": null");
  EXPECT_EQ(parse_program(unbounded).tokens.at(0).most, 256);
}

TEST(ExportedRange, IsThatOfEachGroupOfInputs) {
  const std::string equal = "L['mask'].size()[1] == L['ids'].size()[1]";
  using Ranges = std::vector<TokenRange>;
  EXPECT_EQ(parse_program(program_with()).tokens, (Ranges{{0, 256}, {0, 256}})) << "of equal length by a guard";
  EXPECT_EQ(parse_program(program_with("'s2'", "'s1'")).tokens, (Ranges{{0, 256}, {0, 256}})) << "by their symbol";
  EXPECT_EQ(parse_program(program_with(equal, "1 == 1")).tokens, (Ranges{{0, 256}, {1, 0}}));
  EXPECT_EQ(parse_program(program_with(equal, "L['mask'].size()[1] <= 99")).tokens, (Ranges{{0, 256}, {1, 99}}));
  EXPECT_EQ(parse_program(program_with(equal, "L['mask'].size()[1] <= L['ids'].size()[1]")).tokens,
            (Ranges{{0, 256}, {0, 256}}))
      << "looked at for equal lengths only";
  EXPECT_THAT(refused(program_with(equal, "L['mask'].size()[1] < L['ids'].size()[1]")), HasSubstr("does not hold for"));
  EXPECT_EQ(parse_program(program_with(equal, "L['mask'].size()[0] <= L['ids'].size()[0]")).tokens.at(1).most, 0);
  EXPECT_THAT(refused(program_with(equal, "L['other'].size()[1] <= 9")), HasSubstr("something else than its inputs"));
  EXPECT_THAT(refused(program_with(equal, "L['other'].size()[0] >= 1")), HasSubstr("something else than its inputs"));
}

TEST(ExportedRange, WhatHoldsForFewSizesIsRefused) {
  EXPECT_THAT(refused(with_guard("L['ids'].size()[0] <= 64")), HasSubstr("does not hold for 65 rows of 1 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] >= 5")), HasSubstr("does not hold for 1 rows of 1 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] != 1")), HasSubstr("does not hold for 1 rows of 1 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[0] != 1")), HasSubstr("does not hold for 1 rows of 1 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] == 1")), HasSubstr("does not hold for 1 rows of 2 tokens"));
  EXPECT_THAT(refused(with_guard("L['ids'].size()[1] // -1 == -7")), HasSubstr("does not hold for 1 rows of 1 tokens"));
  EXPECT_THAT(refused(with_guard("1 // (L['ids'].size()[1] - 2) <= 0")), HasSubstr("does not hold for 1 rows of 2"))
      << "Python divides by zero";
  EXPECT_THAT(refused(with_guard("2**(1 - L['ids'].size()[1]) <= 1")), HasSubstr("does not hold for 1 rows of 2"));
  EXPECT_THAT(refused(with_guard("9223372036854775807 * 2 == 1")), HasSubstr("does not hold for")) << "at any size";
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

TEST(ExportedRange, InputsMustBeOfInt64) {
  EXPECT_THAT(refused(program_with("\"dtype\": 5", "\"dtype\": 12")),
              HasSubstr("its input 'ids' has numbers of the type 12"));
}

TEST(ExportedRange, IsFoundInLittleTimeOrNotAtAll) {
  const std::string size = "L['ids'].size()[1]";
  std::string guard = "\"" + size;
  for (int i = 0; i < 30; ++i) guard += " - " + size + " + " + size;
  for (int i = 0; i < 20; ++i) guard += " < " + std::to_string(i * 1000) + " or " + size;
  guard += "\"";
  const std::string many = program_with("\"L['ids'].size()[1] <= 256\"", guard + repeated(", " + guard, 200));
  EXPECT_THAT(refused(many), HasSubstr("would take too long to look at"));
  const std::string few =
      program_with("\"L['ids'].size()[1] <= 256\"",
                   "\"L['ids'].size()[1] <= 256\"" + repeated(", \"L['ids'].size()[1] <= 300\"", 200));
  EXPECT_EQ(parse_program(few).tokens.at(0).most, 256);
}

TEST(ExportedResult, KeepsWhatIsNoneInItsPlace) {
  const std::string leaf = R"({\"type\": null, \"context\": null})";
  const auto tuple = [](const std::string& children) {
    return R"({\"type\": \"builtins.tuple\", \"context\": null, \"children_spec\": [)" + children + "]}";
  };
  const std::string z = R"({"user_output": {"arg": {"as_tensor": {"name": "z"}}}})";
  const std::string none = R"({"user_output": {"arg": {"as_none": true}}})";
  const auto with = [&](const std::string& outputs, const std::string& spec) {
    std::string text = program_with(z, outputs);
    const auto at = text.find(leaf);
    return parse_program(text.replace(at, leaf.size(), spec)).result;
  };
  const ValueId value = with(z, leaf).value.value();
  const Result tensor{false, value, {}};
  const Result nothing{false, std::nullopt, {}};
  EXPECT_EQ(with(z + ", " + none + ", " + z, tuple(leaf + ", " + leaf + ", " + leaf)),
            (Result{true, std::nullopt, {tensor, nothing, tensor}}));
  EXPECT_EQ(with(none + ", " + z, tuple(leaf + ", " + tuple(leaf))),
            (Result{true, std::nullopt, {nothing, {true, std::nullopt, {tensor}}}}));
  EXPECT_EQ(with(z + ", " + none, R"({\"type\": \"Output\", \"context\": null})"),
            (Result{true, std::nullopt, {tensor, nothing}}))
      << "of an object of Python";
  EXPECT_THAT(refusal<Refused>([&] { return with(none, leaf); }), HasSubstr("it returns no tensor"));
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

TEST(ExportedScopes, AreFoundInLittleTimeOrNotAtAll) {
  // Each call that is dissolved brings to light one around the next: a round of its own for each.
  const auto chain = [](std::size_t calls) {
    Program program;
    program.frames = {{"root", ""}, {"first", "first"}};
    for (std::size_t i = 0; i < calls; ++i) {
      program.frames.push_back({fmt::format("c{}", i), fmt::format("c{}", i)});
      program.frames.push_back({fmt::format("g{}", i), fmt::format("g{}", i)});
    }
    program.nodes.push_back(node_in({0, 1}));
    for (std::size_t i = 0; i < calls; ++i) {
      program.nodes.push_back(node_in({0, 2 * i + 2, 2 * i + 3}));
      program.nodes.push_back(node_in({0, i == 0 ? 1 : 2 * i + 1}));  // of the one before
    }
    return program;
  };
  EXPECT_THAT(scopes_of(chain(20)).calls, SizeIs(1)) << "what the last one brings to light";
  EXPECT_THAT(refusal<Refused>([&] { return scopes_of(chain(1000)); }),
              HasSubstr("overlap each other in too many ways"));
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
