// The files that the benchmark reads: token files with their tasks, probes, models' sidecars.
#include "files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "bench_support.h"
#include "linear_probe.h"
#include "selection.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Json = nlohmann::ordered_json;

/// A file of 3 requests with 4 sequences; tests damage it.
class TokenFileTest : public ::testing::Test {
 protected:
  std::vector<std::int32_t> tokens = {5, 6, 7, 8, 9, 10};
  std::vector<std::int64_t> sequence_offsets = {0, 2, 3, 5, 6};
  std::vector<std::int64_t> request_offsets = {0, 1, 3, 4};

  [[nodiscard]] Json header() const {
    const auto entry = [](const char* dtype, std::size_t count, std::size_t begin, std::size_t bytes) {
      return Json{{"dtype", dtype}, {"shape", {count}}, {"data_offsets", {begin, begin + bytes}}};
    };
    const std::size_t first = tokens.size() * 4;
    const std::size_t second = first + sequence_offsets.size() * 8;
    return {{"__metadata__",
             {{"workload", "w"},
              {"tokenizer", "t"},
              {"source", "s"},
              {"description", "d"},
              {"order", "source order"},
              {"max_tokens", "512"},
              {"version", "1"}}},
            {"tokens", entry("I32", tokens.size(), 0, first)},
            {"sequence_offsets", entry("I64", sequence_offsets.size(), first, sequence_offsets.size() * 8)},
            {"request_offsets", entry("I64", request_offsets.size(), second, request_offsets.size() * 8)}};
  }
  [[nodiscard]] std::string data() const { return raw(tokens) + raw(sequence_offsets) + raw(request_offsets); }
  [[nodiscard]] std::string file() const { return framed(header().dump(), data()); }

  static std::string framed(const std::string& head, const std::string& body) {
    return raw(std::vector<std::uint64_t>{head.size()}) + head + body;
  }
  /// The file with one header entry replaced.
  [[nodiscard]] std::string with(const std::string& pointer, const Json& value) const {
    Json head = header();
    head[Json::json_pointer(pointer)] = value;
    return framed(head.dump(), data());
  }
  static void expect_refused(const std::string& bytes, const std::string& part) {
    expect_failure([&] { parse_token_file(bytes, "x.safetensors"); }, part);
    expect_failure([&] { parse_token_file(bytes, "x.safetensors"); }, "x.safetensors");
  }
};

TEST_F(TokenFileTest, ReadsWhatIsThere) {
  const TokenFile parsed = parse_token_file(file(), "x");
  EXPECT_EQ(parsed.workload, "w");
  EXPECT_EQ(parsed.tokenizer, "t");
  EXPECT_EQ(parsed.source, "s");
  EXPECT_EQ(parsed.max_tokens, 512);
  EXPECT_EQ(parsed.sequences(), 4);
  EXPECT_EQ(parsed.requests(), 3);
  EXPECT_THAT(parsed.sequence(2), ElementsAre(8, 9));
  const auto request = parsed.request(1, 1);  // cut to one token
  ASSERT_EQ(request.size(), 2U);
  EXPECT_THAT(request[0], ElementsAre(7));
  EXPECT_THAT(request[1], ElementsAre(8));
  EXPECT_FALSE(parsed.grouped_by_label());
}

TEST_F(TokenFileTest, ReadsFromDisk) {
  const Folder folder;
  std::ofstream(folder / "f", std::ios::binary) << file();
  EXPECT_EQ(read_token_file(folder / "f").requests(), 3);
  expect_failure([&] { read_token_file(folder / "missing"); }, "cannot be read");
}

TEST_F(TokenFileTest, RefusesEveryTruncation) {
  const std::string whole = file();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse_token_file(whole.substr(0, size), "x"), Failure) << size << " bytes";
  }
  expect_refused(whole + "more", "truncated or appended");
}

TEST_F(TokenFileTest, SurvivesEveryDamagedByte) {
  const std::string whole = file();
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const char flip : {'\x01', '\x80', '\xff'}) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(damaged[i] ^ flip);
      try {
        parse_token_file(damaged, "x");  // a changed id or text is still a good file
      } catch (const Failure&) {
      }
    }
  }
}

TEST_F(TokenFileTest, RefusesBadHeaders) {
  const std::string whole = file();
  for (const std::uint64_t size : {std::uint64_t{0}, std::uint64_t{1} << 21, ~std::uint64_t{0}}) {
    std::string damaged = whole;
    std::memcpy(damaged.data(), &size, sizeof size);
    EXPECT_THROW(parse_token_file(damaged, "x"), Failure) << size;
  }
  expect_refused(raw(std::vector<std::uint64_t>{~std::uint64_t{0}}) + whole, "announces a header");
  expect_refused(framed("[1]", ""), "not a JSON object");
  expect_refused(framed("{\"a\":", ""), "not JSON");
  expect_refused(framed(std::string(100000, '['), ""), "nested too deeply");
  const std::string twice = R"({"dtype":"I32","shape":[0],"data_offsets":[0,0]})";
  expect_refused(framed("{\"a\":" + twice + ",\"a\":" + twice + "}", ""), "'a' twice");
}

TEST_F(TokenFileTest, RefusesWrongTypesAndShapes) {
  expect_refused(with("/tokens/dtype", "F32"), "expected I32");
  expect_refused(with("/tokens/dtype", "X9"), "unknown dtype");
  expect_refused(with("/tokens/dtype", 3), "no dtype");
  expect_refused(with("/tokens/shape", Json{2, 3}), "2 dimensions");
  expect_refused(with("/tokens/shape", Json{7}), "needs 28 bytes");
  expect_refused(with("/tokens/shape", Json{-6}), "not a whole number");
  expect_refused(with("/tokens/shape", Json{std::uint64_t{1} << 62, 4}), "overflows");
  expect_refused(with("/tokens", "text"), "not described by an object");
  Json head = header();
  head.erase("request_offsets");
  expect_refused(framed(head.dump(), raw(tokens) + raw(sequence_offsets)), "no tensor 'request_offsets'");
}

TEST_F(TokenFileTest, RefusesBadPlacesOfTensors) {
  expect_refused(with("/sequence_offsets/data_offsets", Json{16, 56}), "overlap");
  expect_refused(with("/tokens/data_offsets", Json{24, 0}), "lies at bytes");
  expect_refused(with("/request_offsets/data_offsets", Json{1000000, 1000032}), "lies at bytes");
  expect_refused(with("/request_offsets/data_offsets", Json{~std::uint64_t{0} - 31, ~std::uint64_t{0}}), "lies at");
  expect_refused(with("/tokens/data_offsets", Json{0}), "pair of data_offsets");
  expect_refused(with("/tokens/data_offsets", Json{0.5, 24}), "not a whole number");
  Json head = header();
  head["tokens"]["shape"] = {5};
  head["tokens"]["data_offsets"] = {4, 24};
  expect_refused(framed(head.dump(), data()), "belong to no tensor");
}

TEST_F(TokenFileTest, RefusesBadOffsets) {
  sequence_offsets = {0, 3, 2, 5, 6};
  expect_refused(file(), "must rise");
  sequence_offsets = {0, 2, 2, 5, 6};
  expect_refused(file(), "must rise");
  sequence_offsets = {1, 2, 3, 5, 6};
  expect_refused(file(), "starts at 1");
  sequence_offsets = {0, 2, 3, 5, 7};
  expect_refused(file(), "ends at 7, expected 6");
  sequence_offsets = {0, 2, 3, 5, 6};
  request_offsets = {0, 1, 3, 5};
  expect_refused(file(), "ends at 5, expected 4");
  request_offsets = {0};
  expect_refused(file(), "expected 2 or more");
}

TEST_F(TokenFileTest, RefusesBadIds) {
  const TokenFile good = parse_token_file(file(), "x");
  EXPECT_NO_THROW(check_vocabulary(good, 11, "x"));
  expect_failure([&] { check_vocabulary(good, 10, "x"); }, "token id 10, the model knows ids below 10");
  tokens[3] = -1;
  expect_refused(file(), "token 3 is -1");
}

TEST_F(TokenFileTest, RefusesBadMetadata) {
  expect_refused(with("/__metadata__/version", "3"), "version '3'");
  expect_refused(with("/__metadata__/max_tokens", "many"), "max_tokens");
  expect_refused(with("/__metadata__/max_tokens", "99999999999999999999"), "max_tokens");
  expect_refused(with("/__metadata__/workload", 1), "'workload'");
  expect_refused(with("/__metadata__", "text"), "__metadata__");
}

TEST_F(TokenFileTest, VersionOneHasNoTask) {
  const TokenFile parsed = parse_token_file(file(), "x");
  EXPECT_EQ(parsed.task, Task::kNone);
  EXPECT_EQ(parsed.fill_requests, 0);
  EXPECT_THAT(parsed.labels, IsEmpty());
}

/// A version "2" file of four requests of two sequences of three tokens; the first two only fill.
class TaskFileTest : public ::testing::Test {
 protected:
  TaskFileTest() {
    builder.metadata = {{"workload", "w"},      {"tokenizer", "t"},    {"source", "s"},  {"description", "d"},
                        {"order", "as it was"}, {"max_tokens", "512"}, {"version", "2"}, {"fill_requests", "2"}};
    std::vector<std::int32_t> ids;
    for (std::int32_t i = 0; i < 24; ++i) ids.push_back(i);
    builder.add("tokens", "I32", {24}, ids);
    builder.add<std::int64_t>("sequence_offsets", "I64", {9}, {0, 3, 6, 9, 12, 15, 18, 21, 24});
    builder.add<std::int64_t>("request_offsets", "I64", {5}, {0, 2, 4, 6, 8});
  }
  /// One sequence a request, as pairs of texts need.
  void single_sequences() {
    builder.add<std::int64_t>("sequence_offsets", "I64", {5}, {0, 6, 12, 18, 24});
    builder.add<std::int64_t>("request_offsets", "I64", {5}, {0, 1, 2, 3, 4});
  }
  void task(const std::string& name) { builder.metadata["task"] = name; }
  void numbers(const std::string& name, const std::vector<std::int64_t>& values) {
    builder.add(name, "I64", {values.size()}, values);
  }
  void ranges(const std::vector<std::int64_t>& values) { builder.add("scored", "I64", {values.size() / 2, 2}, values); }
  [[nodiscard]] TokenFile parsed() const { return parse_token_file(builder.bytes(), "x"); }
  void expect_refused(const std::string& part) const {
    expect_failure([&] { (void)parsed(); }, part);
  }

  const std::vector<std::int64_t> all_of_eight = {1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3};
  FileBuilder builder;
};

TEST_F(TaskFileTest, BatchesOfAnotherSizeKeepTheSequencesAndTheFillPart) {
  task("classification");
  builder.metadata["label_names"] = R"(["a","b"])";
  numbers("labels", {0, 1, 0, 1, 0, 1, 0, 1});
  const TokenFile file = parsed();
  const auto offsets = [&](std::int64_t rows) { return in_batches_of(file, rows).request_offsets; };
  EXPECT_THAT(offsets(2), ElementsAre(0, 2, 4, 6, 8));
  EXPECT_THAT(offsets(3), ElementsAre(0, 3, 4, 7, 8));
  EXPECT_THAT(offsets(100), ElementsAre(0, 4, 8));
  const TokenFile alone = in_batches_of(file, 1);
  EXPECT_EQ(alone.requests(), 8);
  EXPECT_EQ(alone.fill_requests, 4);
  EXPECT_EQ(in_batches_of(file, 3).fill_requests, 2);
  EXPECT_EQ(alone.tokens, file.tokens);
  EXPECT_EQ(alone.labels, file.labels);
  builder.metadata["fill_requests"] = "0";
  EXPECT_EQ(in_batches_of(parsed(), 5).fill_requests, 0);
  EXPECT_THAT(in_batches_of(parsed(), 5).request_offsets, ElementsAre(0, 5, 8));
}

TEST_F(TaskFileTest, BatchesOfPairsAndChoicesStayAsTheyAre) {
  ranges(all_of_eight);
  task("choice");
  numbers("labels", {0, 1, 0, 1, 0, 1, 0, 1});
  expect_failure([&] { in_batches_of(parsed(), 4); }, "--batch 4: the requests of w are more than");
  task("perplexity");
  expect_failure([&] { in_batches_of(parsed(), 4); }, "more than independent sequences");
}

TEST_F(TaskFileTest, ReadsTheFillPart) {
  EXPECT_EQ(parsed().fill_requests, 2);
  EXPECT_EQ(parsed().task, Task::kNone);
  EXPECT_EQ(parsed().first_sequence(3), 6);
  builder.metadata["fill_requests"] = "3";
  EXPECT_EQ(parsed().fill_requests, 3);
  builder.metadata["fill_requests"] = "4";
  expect_refused("none is left to ask");
  builder.metadata["fill_requests"] = "-1";
  expect_refused("fill_requests is '-1'");
  builder.metadata.erase("fill_requests");
  EXPECT_EQ(parsed().fill_requests, 0);
  task("guessing");
  expect_refused("task is 'guessing'");
}

TEST_F(TaskFileTest, OnlyRequestsThatAskAreSent) {
  EXPECT_THAT(make_stream(parsed(), {}).requests, ElementsAre(2, 3));
  EXPECT_THAT(make_stream(parsed(), {.limit = 1}).requests, ElementsAre(2));
  for (const std::int64_t request : make_stream(parsed(), {.shuffle = 1, .limit = 50}).requests) {
    EXPECT_TRUE(request == 2 || request == 3) << request;
  }
}

TEST_F(TaskFileTest, Generation) {
  builder.metadata.erase("fill_requests");
  task("generation");
  expect_refused("has no new_tokens");
  builder.metadata["new_tokens"] = "32";
  EXPECT_EQ(parsed().task, Task::kGeneration);
  EXPECT_EQ(parsed().new_tokens, 32);
  EXPECT_EQ(parsed().stop_token, -1);
  builder.metadata["stop_token"] = "2";
  EXPECT_EQ(parsed().stop_token, 2);
  builder.metadata["stop_token"] = "-2";
  expect_refused("stop_token is '-2'");
  builder.metadata["stop_token"] = "2";
  builder.metadata["new_tokens"] = "0";
  expect_refused("has no new_tokens");
  builder.metadata["new_tokens"] = "many";
  expect_refused("new_tokens is 'many'");
  builder.metadata["new_tokens"] = "32";
  builder.metadata["fill_requests"] = "1";
  expect_refused("requests that only fill");
}

TEST_F(TaskFileTest, Classification) {
  task("classification");
  expect_refused("has no labels");
  numbers("labels", {0, 1, 0, 1, 0, 1, 0, 1});
  expect_refused("has no label_names");
  builder.metadata["label_names"] = R"(["a", "b"])";
  EXPECT_EQ(parsed().task, Task::kClassification);
  EXPECT_THAT(parsed().label_names, ElementsAre("a", "b"));
  EXPECT_EQ(parsed().labels.size(), 8U);
  for (const char* names : {"[\"a\"]", "{}", "[1, 2]", "nonsense"}) {
    builder.metadata["label_names"] = names;
    EXPECT_THROW(std::ignore = parsed(), Failure) << names;
  }
  builder.metadata["label_names"] = R"(["a", "b"])";
  numbers("labels", {0, 1, 0, 1, 0, 1, 0, 2});
  expect_refused("labels[7] is 2, expected 0 to 1");
  numbers("labels", {0, 1, 0, 1, 0, 1, 0, -1});
  expect_refused("labels[7] is -1");
  numbers("labels", {0, 1});
  expect_refused("labels has 2 entries, expected 8, one a sequence");
  builder.add<std::int32_t>("labels", "I32", {8}, std::vector<std::int32_t>(8, 0));
  expect_refused("expected I64");
}

TEST_F(TaskFileTest, ScoredRanges) {
  task("perplexity");
  expect_refused("has no scored");
  ranges(all_of_eight);
  ASSERT_EQ(parsed().scored.size(), 8U);
  EXPECT_EQ(parsed().scored[7].begin, 1);
  EXPECT_EQ(parsed().scored[7].end, 3);
  const std::int64_t far = std::int64_t{1} << 62;
  for (const auto& [begin, end] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 3}, {-1, 2}, {2, 1}, {1, 4}, {far, far}, {1, far}, {-far, far}}) {
    auto bad = all_of_eight;
    bad[4] = begin;
    bad[5] = end;
    ranges(bad);
    expect_refused("scored[2] is tokens");
  }
  ranges({1, 3});
  expect_refused("scored has 1 entries, expected 8");
  builder.add<std::int64_t>("scored", "I64", {8, 3}, std::vector<std::int64_t>(24, 1));
  expect_refused("3 columns");
  builder.add<std::int64_t>("scored", "I64", {8}, std::vector<std::int64_t>(8, 1));
  expect_refused("1 dimensions, expected I64 with 2");
}

TEST_F(TaskFileTest, ChoicesHaveOneRightAnswer) {
  task("choice");
  numbers("labels", {1, 0, 1, 0, 1, 0, 0, 1});
  expect_refused("has no scored");
  ranges(all_of_eight);
  EXPECT_EQ(parsed().task, Task::kChoice);
  numbers("labels", {1, 0, 1, 0, 1, 0, 1, 1});
  expect_refused("request 3 has 2 right choices");
  numbers("labels", {1, 0, 1, 0, 0, 0, 0, 1});
  expect_refused("request 2 has 0 right choices");
  numbers("labels", {1, 0, 1, 0, 1, 0, 0, 1});
  auto empty = all_of_eight;
  empty[15] = 1;
  ranges(empty);
  expect_refused("scored[7] is empty");
}

TEST_F(TaskFileTest, GroupsOfAnswers) {
  task("answer");
  expect_refused("has no group");
  numbers("group", {0, 1, 0, -1});
  EXPECT_THAT(parsed().group, ElementsAre(0, 1, 0, -1));
  EXPECT_THAT(parsed().scored, IsEmpty());
  numbers("group", {0, 1, 0, -2});
  expect_refused("group[3] is -2");
  numbers("group", {0, 1});
  expect_refused("one a request");
}

TEST_F(TaskFileTest, AnswersInPassages) {
  task("answer");
  single_sequences();
  numbers("group", {0, 1, 0, -1});
  const std::vector<std::int64_t> passages = {2, 5, 2, 6, 6, 6, 1, 6};
  builder.add("passage", "I64", {4, 2}, passages);
  expect_refused("token_text");
  const std::string text = "one two";
  std::vector<std::int64_t> offsets(25, 7);
  std::fill_n(offsets.begin(), 3, 0);
  offsets[3] = 3;
  builder.add("token_text", "U8", {text.size()}, std::vector<char>(text.begin(), text.end()));
  numbers("token_text_offsets", offsets);
  expect_refused("gold");
  const std::string gold = "one two\ntwo\nthree\n";
  builder.add("gold", "U8", {gold.size()}, std::vector<char>(gold.begin(), gold.end()));
  numbers("gold_offsets", {0, 12, 18, 18, 18});
  const TokenFile file = parsed();
  EXPECT_EQ(file.text(0, {2, 3}), "one");
  EXPECT_EQ(file.text(0, {2, 5}), "one two");
  EXPECT_EQ(file.text(0, {0, 0}), "");
  EXPECT_EQ(file.gold_answers(0), "one two\ntwo\n");
  EXPECT_EQ(file.gold_answers(3), "");
  EXPECT_EQ(file.marks(1, 512).front().second_text, 2);
  EXPECT_TRUE(file.marks(1, 512).front().pool.empty());

  builder.add<std::int64_t>("passage", "I64", {4, 2}, {2, 5, 2, 7, 6, 6, 1, 6});
  expect_refused("passage[1] is tokens 2 to 7");
  builder.add("passage", "I64", {4, 2}, passages);
  numbers("gold_offsets", {0, 11, 18, 18, 18});
  expect_refused("does not end in a newline");
  numbers("gold_offsets", {0, 12, 8, 18, 18});
  expect_refused("do not rise");
  numbers("gold_offsets", {0, 12, 18, 18, 19});
  expect_refused("the 18 bytes of gold");
  numbers("gold_offsets", {0, 12, 18});
  expect_refused("gold_offsets has 3 entries");
  numbers("gold_offsets", {0, 12, 18, 18, 18});
  offsets.front() = 1;
  numbers("token_text_offsets", offsets);
  expect_refused("do not rise from 0");
}

TEST_F(TaskFileTest, PairsWithScores) {
  task("similarity");
  expect_refused("has no pair_score");
  builder.add<float>("pair_score", "F32", {4}, {0, 0, 2.5F, 5});
  EXPECT_THAT(parsed().pair_score, ElementsAre(0, 0, 2.5F, 5));
  builder.add<float>("pair_score", "F32", {4}, {0, 0, std::nanf(""), 5});
  expect_refused("pair_score[2] is not finite");
  builder.add<float>("pair_score", "F32", {3}, {0, 0, 1});
  expect_refused("pair_score has 3 entries");
  builder.add<float>("pair_score", "F32", {4}, {0, 0, 2.5F, 5});
  single_sequences();
  expect_refused("request 2 has 1 sequences, expected the two of a pair");
}

TEST_F(TaskFileTest, PairsOfDuplicates) {
  task("duplicates");
  single_sequences();
  numbers("partner", {-1, -1, 1, 0});
  expect_refused("has no pair_label");
  numbers("pair_label", {-1, -1, 1, 0});
  EXPECT_EQ(parsed().task, Task::kDuplicates);
  numbers("partner", {-1, -1, 2, 0});
  expect_refused("partner[2] is 2, expected -1 to 1");
  numbers("partner", {-1, -1, -1, 0});
  expect_refused("partner[2] is -1, expected 0 or more behind the fill part");
  numbers("partner", {0, -1, 1, 0});
  expect_refused("partner[0] is 0, expected -1 in the fill part");
  numbers("partner", {-1, -1, 1, 0});
  numbers("pair_label", {-1, -1, 2, 0});
  expect_refused("pair_label[2] is 2");
}

TEST_F(TaskFileTest, SurvivesEveryDamagedByte) {
  task("choice");
  numbers("labels", {1, 0, 1, 0, 1, 0, 0, 1});
  numbers("group", {0, 1, 0, -1});
  ranges(all_of_eight);
  const std::string whole = builder.bytes();
  int refused = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ '\x81');
    try {
      const TokenFile file = parse_token_file(damaged, "x");
      ASSERT_EQ(file.labels.size(), static_cast<std::size_t>(file.sequences()));
    } catch (const Failure&) {
      ++refused;
    }
    if (i % 7 == 0) {
      EXPECT_THROW(parse_token_file(whole.substr(0, i), "x"), Failure) << i << " bytes";
    }
  }
  EXPECT_GT(refused, static_cast<int>(whole.size() / 2));
}

/// A probe of two classes on three dimensions.
class ProbeTest : public ::testing::Test {
 protected:
  ProbeTest() {
    builder.metadata = {{"workload", "w"},           {"model", "m"},
                        {"model_sha256", "abc"},     {"classes", R"(["a","b"])"},
                        {"train_accuracy", "0.875"}, {"version", "2"}};
    builder.add<float>("weight", "F32", {2, 3}, {1, 0, 0, 0, 1, -1});
    builder.add<float>("bias", "F32", {2}, {0, 0.5F});
  }
  void expect_refused(const std::string& part) const {
    expect_failure([&] { parse_linear_probe(builder.bytes(), "p.probe.safetensors"); }, part);
    expect_failure([&] { parse_linear_probe(builder.bytes(), "p.probe.safetensors"); }, "not a usable probe file");
  }
  FileBuilder builder;
};

TEST_F(ProbeTest, Classifies) {
  const LinearProbe probe = parse_linear_probe(builder.bytes(), "p");
  EXPECT_EQ(probe.dims, 3);
  EXPECT_EQ(probe.train_accuracy, 0.875);
  const auto classify = [&](std::vector<float> row) { return probe.classify(row); };
  EXPECT_EQ(classify({1, 0, 0}), 0);
  EXPECT_EQ(classify({0, 0, 0}), 1);
  EXPECT_EQ(classify({0, 1, 2}), 0);
  EXPECT_EQ(classify({0.5F, 0, 0}), 0) << "equal scores: the first class";
  EXPECT_EQ(classify({NAN, 0, 0}), -1);
}

TEST_F(ProbeTest, RefusesDamage) {
  const std::string whole = builder.bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse_linear_probe(whole.substr(0, size), "p"), Failure) << size << " bytes";
  }
  builder.add<float>("bias", "F32", {3}, {0, 0, 0});
  expect_refused("weight is [2, 3], bias [3], for 2 classes");
  builder.add<float>("bias", "F32", {2}, {0, NAN});
  expect_refused("not finite");
  builder.add<float>("bias", "F32", {2}, {0, 0});
  builder.metadata["train_accuracy"] = "1.5";
  expect_refused("train_accuracy");
  builder.metadata["train_accuracy"] = "";
  expect_refused("train_accuracy");
  builder.metadata["train_accuracy"] = "0.9";
  builder.metadata["version"] = "1";
  expect_refused("version '1', expected '2'; fit the probe again");
  builder.metadata["version"] = "2";
  builder.remove("weight");
  expect_refused("no tensor 'weight'");
}

TEST_F(ProbeTest, TellsWhatItWasNotFittedOn) {
  EXPECT_EQ(parse_linear_probe(builder.bytes(), "p").fit_sequences, -1);
  builder.metadata["fit_sequences"] = "4";
  const LinearProbe probe = parse_linear_probe(builder.bytes(), "p");
  TokenFile file;
  file.fill_requests = 4;
  file.request_offsets = {0, 2, 4, 6, 8, 10};
  EXPECT_EQ(first_unfitted(probe, file), 2);
  file.request_offsets = {0, 3, 6, 7, 8, 10};
  EXPECT_EQ(first_unfitted(probe, file), 2) << "the second request has a text that it was fitted on";
  file.request_offsets = {0, 1, 2, 3, 4, 10};
  EXPECT_EQ(first_unfitted(probe, file), 0) << "it was fitted on the whole fill part";
  builder.metadata["fit_sequences"] = "x";
  expect_refused("fit_sequences");
}

TEST_F(ProbeTest, IsFoundByNameAndFitsModelAndClasses) {
  const Folder folder;
  TokenFile file;
  file.workload = "w";
  file.label_names = {"a", "b"};
  ModelFile model;
  model.name = "m";
  model.sha256 = "abc";
  const auto find = [&] { return find_linear_probe(folder / "", file, model); };
  EXPECT_FALSE(find().has_value());
  std::ofstream(folder / "w.m.probe.safetensors", std::ios::binary) << builder.bytes();
  ASSERT_TRUE(find().has_value());
  EXPECT_EQ(find()->dims, 3);
  file.label_names = {"b", "a"};
  expect_failure([&] { find(); }, "its classes are not");
  file.label_names = {"a", "b"};
  model.sha256 = "def";
  expect_failure([&] { find(); }, "SHA-256 abc, this one has def");
  model.sha256.clear();
  EXPECT_TRUE(find().has_value()) << "a model without sidecar cannot be told apart";
  builder.metadata["model"] = "other";
  std::ofstream(folder / "w.m.probe.safetensors", std::ios::binary) << builder.bytes();
  expect_failure([&] { find(); }, "for model 'other'");
}

class StreamTest : public TokenFileTest {
 protected:
  [[nodiscard]] TokenFile parsed(const std::string& order) const {
    return parse_token_file(with("/__metadata__/order", order), "x");
  }
};

TEST_F(StreamTest, KeepsTheOrderOfTheFile) {
  const Stream stream = make_stream(parsed("source order"), {});
  EXPECT_THAT(stream.requests, ElementsAre(0, 1, 2));
  EXPECT_FALSE(stream.shuffle.has_value());
  EXPECT_THAT(make_stream(parsed("source order"), {.limit = 2}).requests, ElementsAre(0, 1));
  EXPECT_THAT(make_stream(parsed("source order"), {.limit = 9}).requests, ElementsAre(0, 1, 2));
}

TEST_F(StreamTest, ShufflesWhatIsGroupedByLabel) {
  const Stream stream = make_stream(parsed("source order (grouped by label)"), {});
  EXPECT_EQ(stream.shuffle, std::uint64_t{0});
  EXPECT_EQ(stream.requests, shuffled(3, 0));
  EXPECT_EQ(make_stream(parsed("grouped by label"), {.shuffle = 5}).shuffle, std::uint64_t{5});
}

TEST_F(StreamTest, ShufflesTheRequestsThatALimitLeaves) {
  auto requests = make_stream(parsed("source order"), {.shuffle = 3, .limit = 2}).requests;
  std::sort(requests.begin(), requests.end());
  EXPECT_THAT(requests, ElementsAre(0, 1));
  EXPECT_EQ(make_stream(parsed("grouped by label"), {.shuffle = 5, .limit = 3}).requests, shuffled(3, 5));
  const auto two = make_stream(parsed("grouped by label"), {.shuffle = 5, .limit = 2}).requests;
  EXPECT_THAT(two, ElementsAre(shuffled(3, 5)[0], shuffled(3, 5)[1]));
}

TEST(ModelFileTest, ReadsAndChecksTheSidecar) {
  const Folder folder;
  Json sidecar = {{"weights", "random (seed 0)"},
                  {"tokenizer", "gpt2"},
                  {"dtype", "float32"},
                  {"vocab", 100},
                  {"max_tokens", 64},
                  {"bytes", 5},
                  {"versions", {{"torch", "2"}, {"transformers", "5"}}}};
  const auto write = [&](const Json& json) { std::ofstream(folder / "m.json") << json; };
  std::ofstream(folder / "m.pt") << "12345";
  EXPECT_EQ(read_model_file(folder / "m.pt").weights, "unknown");
  write(sidecar);
  const ModelFile model = read_model_file(folder / "m.pt");
  EXPECT_TRUE(model.random_weights());
  EXPECT_EQ(model.name, "m");
  EXPECT_EQ(model.vocabulary, 100);
  EXPECT_THAT(model_names(folder / ""), ElementsAre("m"));
  sidecar["bytes"] = 6;
  write(sidecar);
  expect_failure([&] { read_model_file(folder / "m.pt"); }, "its sidecar says 6");
  sidecar.erase("vocab");
  write(sidecar);
  expect_failure([&] { read_model_file(folder / "m.pt"); }, "'vocab'");
  std::ofstream(folder / "m.json") << "{";
  expect_failure([&] { read_model_file(folder / "m.pt"); }, "is not JSON");
  expect_failure([&] { read_model_file(folder / "other.pt"); }, "give the path of a .pt file");
  expect_failure([&] { model_names(folder / "missing"); }, "models folder");
}

}  // namespace
}  // namespace llmcache::bench
