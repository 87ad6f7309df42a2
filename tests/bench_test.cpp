// The benchmark's own code: token files, request streams, statistics, results.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "arguments.h"
#include "budget.h"
#include "failure.h"
#include "model_files.h"
#include "probe.h"
#include "quality_metric.h"
#include "quality_served.h"
#include "records.h"
#include "request_stream.h"
#include "selection.h"
#include "statistics.h"
#include "table.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::ordered_json;

/// Expects `function` to throw Failure with `part` in its text.
void expect_failure(const std::function<void()>& function, const std::string& part) {
  try {
    function();
    FAIL() << "no Failure; expected one with: " << part;
  } catch (const Failure& failure) {
    EXPECT_THAT(failure.what(), HasSubstr(part));
  }
}

/// A folder that is removed again.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "llmcache-bench-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

std::string text_of(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

template <class T>
std::string raw(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

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

/// Builds a safetensors file tensor by tensor.
class FileBuilder {
 public:
  std::map<std::string, std::string> metadata;

  template <class T>
  void add(const std::string& name, const char* dtype, const std::vector<std::size_t>& shape,
           const std::vector<T>& values) {
    tensors_[name] = {dtype, shape, raw(values)};
  }
  void remove(const std::string& name) { tensors_.erase(name); }

  [[nodiscard]] std::string bytes() const {
    Json header = {{"__metadata__", metadata}};
    std::string data;
    for (const auto& [name, tensor] : tensors_) {
      header[name] = {{"dtype", tensor.dtype},
                      {"shape", tensor.shape},
                      {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
      data += tensor.bytes;
    }
    const std::string head = header.dump();
    return raw(std::vector<std::uint64_t>{head.size()}) + head + data;
  }

 private:
  struct Tensor {
    std::string dtype;
    std::vector<std::size_t> shape;
    std::string bytes;
  };
  std::map<std::string, Tensor> tensors_;
};

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
  for (const std::int64_t request : make_stream(parsed(), {.shuffle = 1, .zipf = 1.0, .limit = 50}).requests) {
    EXPECT_TRUE(request == 2 || request == 3) << request;
  }
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
    EXPECT_THROW(parsed(), Failure) << names;
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
                        {"train_accuracy", "0.875"}, {"version", "1"}};
    builder.add<float>("weight", "F32", {2, 3}, {1, 0, 0, 0, 1, -1});
    builder.add<float>("bias", "F32", {2}, {0, 0.5F});
  }
  void expect_refused(const std::string& part) const {
    expect_failure([&] { parse_probe(builder.bytes(), "p.probe.safetensors"); }, part);
    expect_failure([&] { parse_probe(builder.bytes(), "p.probe.safetensors"); }, "not a usable probe file");
  }
  FileBuilder builder;
};

TEST_F(ProbeTest, Classifies) {
  const Probe probe = parse_probe(builder.bytes(), "p");
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
    EXPECT_THROW(parse_probe(whole.substr(0, size), "p"), Failure) << size << " bytes";
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
  builder.metadata["version"] = "2";
  expect_refused("version '2'");
  builder.metadata["version"] = "1";
  builder.remove("weight");
  expect_refused("no tensor 'weight'");
}

TEST_F(ProbeTest, IsFoundByNameAndFitsModelAndClasses) {
  const Folder folder;
  TokenFile file;
  file.workload = "w";
  file.label_names = {"a", "b"};
  ModelFile model;
  model.name = "m";
  model.sha256 = "abc";
  const auto find = [&] { return find_probe(folder / "", file, model); };
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

TEST(RequestStreamTest, ShuffleIsAPermutationFixedBySeed) {
  const auto order = shuffled(1000, 7);
  EXPECT_EQ(order, shuffled(1000, 7));
  EXPECT_NE(order, shuffled(1000, 8));
  auto sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (std::int64_t i = 0; i < 1000; ++i) EXPECT_EQ(sorted[static_cast<std::size_t>(i)], i);
}

TEST(RequestStreamTest, ZipfIsFixedBySeedAndFollowsItsLaw) {
  constexpr std::int64_t kRanks = 50;
  constexpr std::int64_t kDraws = 200000;
  const auto drawn = zipf_ranks(kRanks, kDraws, 1.0, 3);
  EXPECT_EQ(drawn, zipf_ranks(kRanks, kDraws, 1.0, 3));
  EXPECT_NE(drawn, zipf_ranks(kRanks, kDraws, 1.0, 4));
  std::vector<double> counts(kRanks, 0);
  for (const std::int64_t rank : drawn) {
    ASSERT_GE(rank, 0);
    ASSERT_LT(rank, kRanks);
    counts[static_cast<std::size_t>(rank)] += 1;
  }
  double harmonic = 0;
  for (int k = 1; k <= kRanks; ++k) harmonic += 1.0 / k;
  for (int k = 1; k <= kRanks; ++k) {
    const double expected = static_cast<double>(kDraws) / (k * harmonic);
    EXPECT_NEAR(counts[static_cast<std::size_t>(k - 1)], expected, 6 * std::sqrt(expected)) << "rank " << k;
  }
  for (const int k : {0, 1, 3, 7, 15}) EXPECT_GT(counts[static_cast<std::size_t>(k)], counts[2 * k + 1]);
}

TEST(RequestStreamTest, ZipfWithExponentZeroIsUniform) {
  std::map<std::int64_t, int> counts;
  for (const std::int64_t rank : zipf_ranks(4, 40000, 0.0, 1)) ++counts[rank];
  for (const auto& [rank, count] : counts) EXPECT_NEAR(count, 10000, 600) << rank;
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

TEST_F(StreamTest, DrawsRepeatsFromTheShuffledOrder) {
  const Stream stream = make_stream(parsed("source order"), {.shuffle = 5, .zipf = 1.0, .limit = 40});
  const auto order = shuffled(3, 5);
  const auto ranks = zipf_ranks(3, 40, 1.0, 5);
  ASSERT_EQ(stream.requests.size(), 40U);
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    EXPECT_EQ(stream.requests[i], order[static_cast<std::size_t>(ranks[i])]);
  }
  EXPECT_EQ(make_stream(parsed("source order"), {.zipf = 1.0}).requests.size(), 3U);
}

TEST(StatisticsTest, Percentiles) {
  EXPECT_EQ(percentile({4, 1, 3, 2}, 0), 1);
  EXPECT_EQ(percentile({4, 1, 3, 2}, 100), 4);
  EXPECT_DOUBLE_EQ(percentile({4, 1, 3, 2}, 50), 2.5);
  EXPECT_DOUBLE_EQ(percentile({4, 1, 3, 2}, 95), 3.85);
  EXPECT_EQ(percentile({7}, 99), 7);
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_TRUE(std::isnan(percentile({}, 50)));
  EXPECT_TRUE(std::isnan(percentile({1, NAN, 2}, 50)));
  EXPECT_TRUE(std::isnan(mean({})));
  EXPECT_EQ(mean({1, 2, 6}), 3);
  EXPECT_EQ(summarize({1, 2, 6}).max, 6);
}

TEST(StatisticsTest, WilsonsInterval) {
  // E. B. Wilson 1927; values by hand from the formula with z = 1.95996.
  EXPECT_NEAR(wilson(5, 10).low, 0.236593, 1e-6);
  EXPECT_NEAR(wilson(5, 10).high, 0.763407, 1e-6);
  EXPECT_EQ(wilson(0, 10).low, 0);
  EXPECT_NEAR(wilson(0, 10).high, 0.277533, 1e-6);
  EXPECT_EQ(wilson(10, 10).high, 1);
  EXPECT_NEAR(wilson(10, 10).low, 1 - 0.277533, 1e-6);
  EXPECT_TRUE(std::isnan(wilson(0, 0).low));
}

TEST(StatisticsTest, RanksAndRankCorrelation) {
  EXPECT_THAT(average_ranks({10, 30, 20, 20}), ElementsAre(1, 4, 2.5, 2.5));
  EXPECT_THAT(average_ranks({7, 7, 7}), ElementsAre(2, 2, 2));
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3, 4}, {10, 100, 1000, 10000}), 1);
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3, 4}, {4, 3, 2, 1}), -1);
  EXPECT_DOUBLE_EQ(spearman({1, 2, 3}, {1, 3, 2}), 0.5);
  // Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
  EXPECT_DOUBLE_EQ(spearman({1, 2, 2, 3}, {1, 2, 3, 4}), 4.5 / std::sqrt(22.5));
  EXPECT_TRUE(std::isnan(spearman({1, 1, 1}, {1, 2, 3})));
  EXPECT_TRUE(std::isnan(spearman({1, NAN, 3}, {1, 2, 3})));
  EXPECT_TRUE(std::isnan(spearman({1}, {1})));
}

TEST(MetricTest, Values) {
  EXPECT_DOUBLE_EQ(metric_value(Metric::kAccuracy, {{7, 8}, {5, 8}}), 0.75);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kChoiceAccuracy, {{1, 1}, {0, 1}, {0, 1}, {1, 1}}), 0.5);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kAnswerNll, {{6, 2}, {2, 2}}), 2);
  EXPECT_DOUBLE_EQ(metric_value(Metric::kPerplexity, {{6, 2}, {2, 2}}), std::exp(2.0));
  EXPECT_DOUBLE_EQ(metric_value(Metric::kSpearman, {{0.1, 0}, {0.9, 5}, {0.5, 2}}), 1);
  EXPECT_TRUE(std::isnan(metric_value(Metric::kAccuracy, {})));
}

TEST(MetricTest, ChangeIsPairedAndItsIntervalFixed) {
  std::vector<Sample> with;
  std::vector<Sample> without;
  for (int i = 0; i < 400; ++i) {
    without.push_back({i % 2 == 0 ? 1.0 : 0.0, 1});              // 50 %
    with.push_back({i % 2 == 0 && i % 40 != 0 ? 1.0 : 0.0, 1});  // ten of them lost
  }
  const Comparison c = compare(Metric::kAccuracy, with, without);
  EXPECT_DOUBLE_EQ(c.value, 0.475);
  EXPECT_DOUBLE_EQ(c.baseline, 0.5);
  EXPECT_NEAR(c.change, -0.025, 1e-12);
  // Paired: the change is a mean of 400 draws that are -1 with probability 1/40, so its standard
  // deviation is 0.0078; unpaired it would be 0.035.
  EXPECT_NEAR(c.ci95.low, -0.025 - 1.96 * 0.0078, 0.003);
  EXPECT_NEAR(c.ci95.high, -0.025 + 1.96 * 0.0078, 0.003);
  const Comparison again = compare(Metric::kAccuracy, with, without);
  EXPECT_EQ(again.ci95.low, c.ci95.low);
  EXPECT_EQ(again.ci95.high, c.ci95.high);
  const Comparison same = compare(Metric::kAccuracy, with, with);
  EXPECT_EQ(same.change, 0);
  EXPECT_EQ(same.ci95.low, 0);
  EXPECT_EQ(same.ci95.high, 0);
  const Comparison alone = compare(Metric::kAccuracy, with, {});
  EXPECT_DOUBLE_EQ(alone.value, 0.475);
  EXPECT_TRUE(std::isnan(alone.baseline));
  EXPECT_TRUE(std::isnan(alone.ci95.low));
}

/// Two fill texts, four that ask: a duplicate of 0, no duplicate of 1, a duplicate of 1, one of 0.
class ServedTest : public ::testing::Test {
 protected:
  ServedTest() {
    file.task = Task::kDuplicates;
    file.tokens = {1, 2, 3, 4, 5, 6, 7, 3, 4, 8};
    file.sequence_offsets = {0, 2, 4, 5, 6, 7, 9, 10};
    file.request_offsets = {0, 1, 2, 3, 4, 5, 6, 7};
    file.fill_requests = 2;
    file.partner = {-1, -1, 0, 1, 1, 0, 0};
    file.pair_label = {-1, -1, 1, 0, 1, 1, 1};
    file.group = {0, 1, 0, 1, -1, -1, 2};
  }
  TokenFile file;
};

TEST_F(ServedTest, DuplicatesAreJudgedByTheirPair) {
  ServedCounts counts(file);
  counts.add(2, 2, 0);                         // right
  counts.add(3, 3, 1);                         // unsafe
  counts.add(4, 4, 0);                         // from a text that is not of its pair
  counts.add(5, 5, 1);                         // its ids are those of text 1, so right
  counts.add(6, 6, ServedCounts::kNotServed);  // missed
  EXPECT_DOUBLE_EQ(counts.precision(), 2.0 / 3);
  EXPECT_DOUBLE_EQ(counts.recall(), 2.0 / 4);
  EXPECT_DOUBLE_EQ(counts.unsafe().rate, 0.25);
  EXPECT_EQ(counts.unsafe().of, 4);
  EXPECT_EQ(counts.unlabelled(), 1);
  EXPECT_DOUBLE_EQ(counts.unsafe().ci95.low, wilson(1, 4).low);
  counts.add(6, 6, ServedCounts::kUnknown);
  EXPECT_EQ(counts.unsafe().of, 5);
  EXPECT_EQ(counts.unlabelled(), 2);
}

TEST_F(ServedTest, NothingServedIsNoRate) {
  ServedCounts counts(file);
  counts.add(2, 2, ServedCounts::kNotServed);
  EXPECT_TRUE(std::isnan(counts.precision()));
  EXPECT_EQ(counts.recall(), 0);
  EXPECT_TRUE(std::isnan(counts.unsafe().rate));
}

TEST_F(ServedTest, AnswersAreComparedByGroup) {
  file.task = Task::kAnswer;
  ServedCounts counts(file);
  counts.add(2, 2, 0);                         // 0 and 0
  counts.add(3, 3, 0);                         // 1 and 0
  counts.add(4, 4, 5);                         // both without an answer
  counts.add(5, 5, 6);                         // none and 2
  counts.add(6, 6, ServedCounts::kNotServed);  // does not count
  EXPECT_DOUBLE_EQ(counts.same_answer().rate, 0.5);
  EXPECT_EQ(counts.same_answer().of, 4);
}

TEST(SelectionTest, ProbesAreNoTokenFiles) {
  const Folder folder;
  for (const char* name : {"w.bert.safetensors", "w.gpt-2.5.safetensors", "w.m.probe.safetensors", "w.json"}) {
    std::ofstream(folder / name) << "x";
  }
  std::vector<std::string> found;
  for (const WorkloadFile& file : workload_files(folder / "")) found.push_back(file.workload + "/" + file.tokenizer);
  EXPECT_THAT(found, ElementsAre("w/bert", "w/gpt-2.5"));
}

TEST(BudgetTest, TimeGoesWhereQualityIsMeasured) {
  ModelFile model;
  TokenFile file;
  model.weights = "hub:x";
  EXPECT_EQ(cell_weight(model, file, true), 0.5);
  file.task = Task::kPerplexity;
  EXPECT_EQ(cell_weight(model, file, false), 1);
  file.task = Task::kDuplicates;
  EXPECT_EQ(cell_weight(model, file, false), 2);
  file.task = Task::kClassification;
  EXPECT_EQ(cell_weight(model, file, false), 0.5);
  EXPECT_EQ(cell_weight(model, file, true), 12);
  model.weights = "random (seed 0)";
  EXPECT_EQ(cell_weight(model, file, true), 0.5);
  EXPECT_EQ(share_seconds({}, 1), 30);
  EXPECT_EQ(share_seconds({}, 48), 7.5);
  Arguments limited;
  limited.limit = 5;
  EXPECT_TRUE(std::isinf(share_seconds(limited, 48)));
}

Record example() {
  Record r;
  r.model = "m";
  r.weights = "random (seed 0)";
  r.workload = "w";
  r.mode = "llmcache";
  r.fidelity = "lossless";
  r.threads = 2;
  r.requests = 10;
  r.requests_available = 20;
  r.sequences = 40;
  r.tokens = 4000;
  r.tokens_computed_fraction = 0.75;
  r.latency_ms = {.mean = 1.5, .p50 = 1.25, .p95 = 3, .p99 = 4};
  r.speedup_vs_nocache = 2.5;
  r.speedup_median = 2.25;
  r.hit_rate = 0.25;
  r.divergence = {.mean = 1e-7, .p95 = 2e-7, .max = 3e-7};
  r.cache_bytes = 123456789;
  r.zipf = 1.1;
  r.shuffle = std::uint64_t{1} << 63;
  r.source = "a \"quoted\" source";
  r.model_torch = "2.13.0";
  return r;
}

/// With everything that a run on similarity adds.
Record similar_example() {
  Record r = example();
  r.weights = "hub:x";
  r.fidelity = "threshold";
  r.threshold = 0.9;
  r.fingerprint = "simhash128";
  r.fingerprint_layer = 0;
  r.centring = "running";
  r.cache_layers = "0,5";
  r.eviction = "lru";
  r.ttl_seconds = 60;
  r.shadow_rate = 0.125;
  r.capacity_bytes = 1 << 20;
  r.filled = 30;
  r.fill_available = 40;
  r.hit_rate_by_layer = {0.125, 0, 0.125};
  r.task = {.metric = "accuracy", .value = 0.917, .baseline = 0.929, .change = -0.012, .ci95 = {-0.019, -0.006}};
  r.recall = 0.5;
  r.unsafe_served = {.rate = {0.25, {0.1, 0.4}, 40}, .unlabelled = 7};
  r.same_answer = {0.75, {0.5, 0.875}, 16};
  return r;
}

const Versions kVersions = {"0.1.0", "2.13.0", "g++ 12.2.0"};

TEST(RecordsTest, RoundTrip) {
  const Json json = to_json(example(), kVersions);
  const Json parsed = Json::parse(json.dump());
  EXPECT_EQ(parsed, json);
  EXPECT_EQ(to_json(record_from_json(parsed), kVersions), json);
  EXPECT_EQ(record_from_json(parsed).shuffle, std::uint64_t{1} << 63);
  EXPECT_TRUE(parsed["versions"]["model_transformers"].is_null());
}

TEST(RecordsTest, RoundTripOfSimilarity) {
  const Json json = to_json(similar_example(), kVersions);
  EXPECT_EQ(to_json(record_from_json(Json::parse(json.dump())), kVersions), json);
  EXPECT_EQ(json["threshold"], 0.9);
  EXPECT_EQ(json["task"]["ci95"], (Json{-0.019, -0.006}));
  EXPECT_EQ(json["unsafe_served"]["unlabelled"], 7);
  EXPECT_EQ(json["hit_rate_by_layer"].size(), 3U);
  const Json plain = to_json(example(), kVersions);
  for (const char* key :
       {"threshold", "fingerprint", "fingerprint_layer", "centring", "cache_layers", "eviction", "task", "ttl_seconds",
        "shadow_rate", "capacity_bytes", "hit_rate_by_layer", "recall", "unsafe_served", "same_answer"}) {
    EXPECT_TRUE(plain.at(key).is_null()) << key;
  }
  Record unmeasured = similar_example();
  unmeasured.task->baseline = kNotMeasured;
  unmeasured.task->ci95 = {kNotMeasured, kNotMeasured};
  const Json nulls = to_json(unmeasured, kVersions);
  EXPECT_TRUE(nulls["task"]["baseline"].is_null());
  EXPECT_TRUE(nulls["task"]["ci95"][0].is_null());
  EXPECT_EQ(to_json(record_from_json(nulls), kVersions), nulls);
}

TEST(RecordsTest, WhatIsNotFiniteIsNull) {
  Record r = example();
  r.speedup_vs_nocache = kNotMeasured;
  r.divergence.max = std::numeric_limits<double>::infinity();
  r.zipf.reset();
  r.shuffle.reset();
  r.fidelity.clear();
  const Json json = Json::parse(to_json(r, kVersions).dump());
  EXPECT_TRUE(json["speedup_vs_nocache"].is_null());
  EXPECT_TRUE(json["divergence"]["max"].is_null());
  EXPECT_TRUE(json["zipf"].is_null());
  EXPECT_TRUE(json["shuffle"].is_null());
  EXPECT_TRUE(json["fidelity"].is_null());
  EXPECT_TRUE(std::isnan(record_from_json(json).speedup_vs_nocache));
}

TEST(RecordsTest, WritesAtomically) {
  const Folder folder;
  write_atomically(folder / "r.json", "one");
  write_atomically(folder / "r.json", "two");
  EXPECT_EQ(text_of(folder / "r.json"), "two");
  const std::filesystem::directory_iterator files(folder / "");
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
  expect_failure([&] { write_atomically(folder / "missing/r.json", "x"); }, "cannot be written");
}

TEST(TableTest, EveryLineOfARandomModelSaysSo) {
  Record plain = example();
  plain.mode = "nocache";
  plain.fidelity.clear();
  std::istringstream table(results_table({plain, example()}));
  std::string line;
  std::getline(table, line);  // headers
  int lines = 0;
  while (std::getline(table, line)) {
    ++lines;
    EXPECT_THAT(line, HasSubstr("random weights"));
    EXPECT_THAT(line, HasSubstr("w (zipf 1.1)"));
  }
  EXPECT_EQ(lines, 2);
}

TEST(TableTest, QualityStandsBesideSpeed) {
  const std::string table = results_table({similar_example()});
  EXPECT_THAT(table, HasSubstr("llmcache/threshold 0.90"));
  EXPECT_THAT(table,
              HasSubstr("accuracy 91.7%, -1.2 [-1.9, -0.6], recall 50.0%, unsafe 25.0% [10.0, 40.0], same answer"));
  EXPECT_THAT(table, HasSubstr("30/40"));
  EXPECT_THAT(results_table({example()}), HasSubstr("divergence only"));
  Record larger = similar_example();
  larger.capacity_bytes = 64 << 20;
  const std::string both = results_table({similar_example(), larger});
  EXPECT_THAT(both, HasSubstr("threshold 0.90 1 MiB"));
  EXPECT_THAT(both, HasSubstr("threshold 0.90 64 MiB"));
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
  expect_failure([&] { read_model_file(folder / "m.pt"); }, "not a JSON object");
  expect_failure([&] { read_model_file(folder / "other.pt"); }, "give the path of a .pt file");
  expect_failure([&] { model_names(folder / "missing"); }, "models folder");
}

TEST(ArgumentsTest, ReadsListsAndRefusesNonsense) {
  const auto parse = [](std::vector<const char*> words) {
    words.insert(words.begin(), "path/llmcache-bench");
    return parse_arguments(static_cast<int>(words.size()), words.data());
  };
  const Arguments arguments = parse({"--model", "a,b", "--model", "c", "--mode", "llmcache", "--zipf", "1.5"});
  EXPECT_THAT(arguments.models, ElementsAre("a", "b", "c"));
  EXPECT_THAT(arguments.modes, ElementsAre("llmcache"));
  EXPECT_EQ(arguments.zipf, 1.5);
  EXPECT_EQ(arguments.command, "llmcache-bench --model a,b --model c --mode llmcache --zipf 1.5");
  EXPECT_FALSE(parse({}).threshold_asked);
  EXPECT_FALSE(parse({}).doccache_asked);
  EXPECT_TRUE(parse({"--threshold", "0.5"}).threshold_asked);
  EXPECT_TRUE(parse({"--mode", "doccache"}).doccache_asked);
  EXPECT_THAT(parse({"--threshold", "0.9,-1", "--threshold", "0.9"}).thresholds, ElementsAre(-1, 0.9));
  EXPECT_THAT(parse({"--capacity-mib", "64,1,64"}).capacities_mib, ElementsAre(1, 64));
  EXPECT_FALSE(parse({"--centre", "off"}).centre);
  EXPECT_EQ(parse({"--cache-layers", "0,3"}).cache_layers, "0,3");
  EXPECT_THROW(parse({"--help"}), HelpAsked);
  for (const std::vector<const char*>& bad : std::vector<std::vector<const char*>>{{"--threads", "0"},
                                                                                   {"--threads", "x"},
                                                                                   {"--limit", "0"},
                                                                                   {"--limit", "-3"},
                                                                                   {"--seconds", "0"},
                                                                                   {"--seconds", "nan"},
                                                                                   {"--mode", "turbo"},
                                                                                   {"--zipf", "-1"},
                                                                                   {"--zipf", "nan"},
                                                                                   {"--shuffle", "-1"},
                                                                                   {"--fidelity", "x"},
                                                                                   {"--capacity-mib", "-1"},
                                                                                   {"--capacity-mib", "1,x"},
                                                                                   {"--threshold", "1.5"},
                                                                                   {"--threshold", "-1.5"},
                                                                                   {"--threshold", "nan"},
                                                                                   {"--threshold", "0.9,x"},
                                                                                   {"--fingerprint", "md5"},
                                                                                   {"--fingerprint-layer", "-1"},
                                                                                   {"--centre", "left"},
                                                                                   {"--cache-layers", "some"},
                                                                                   {"--cache-layers", "1,,2"},
                                                                                   {"--cache-layers", "-1"},
                                                                                   {"--eviction", "fifo"},
                                                                                   {"--ttl", "0"},
                                                                                   {"--shadow-rate", "2"},
                                                                                   {"--pca", "file"},
                                                                                   {"--nonsense"},
                                                                                   {"stray"},
                                                                                   {"--model"}}) {
    EXPECT_THROW(parse(bad), Failure) << bad[0] << " " << bad.back();
  }
}

TEST(ArgumentsTest, CacheLayers) {
  EXPECT_THAT(parse_cache_layers("all", 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(parse_cache_layers("last", 3), ElementsAre(2));
  EXPECT_THAT(parse_cache_layers("2,0,2", 3), ElementsAre(0, 2));
  expect_failure([] { parse_cache_layers("0,3", 3); }, "no layer 3, its layers are 0 to 2");
  expect_failure([] { parse_cache_layers("99999999999999999999", 3); }, "no layer");
}

/// "mode/fidelity threshold eviction capacity" of each setting.
std::vector<std::string> names(const std::vector<Setting>& all) {
  std::vector<std::string> texts;
  for (const Setting& s : all) {
    std::ostringstream text;
    text << s.mode << '/' << s.fidelity << ' ' << s.threshold.value_or(0) << ' ' << s.eviction << ' '
         << s.capacity_mib.value_or(0);
    texts.push_back(text.str());
  }
  return texts;
}

TEST(SettingsTest, SimilarityRunsWhereItsQualityCanBeSeen) {
  Arguments arguments;
  arguments.thresholds = {0.8, 0.9};
  EXPECT_THAT(names(settings(arguments, false)), ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024"));
  EXPECT_THAT(names(settings(arguments, true)),
              ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                          "llmcache/threshold 0.9 lru 1024", "doccache/ 0.8 lru 1024", "doccache/ 0.9 lru 1024"));
  arguments.threshold_asked = true;
  EXPECT_THAT(names(settings(arguments, false)),
              ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                          "llmcache/threshold 0.9 lru 1024"));
  arguments.modes = {"doccache"};
  EXPECT_THAT(settings(arguments, false), IsEmpty());
  arguments.doccache_asked = true;
  EXPECT_EQ(settings(arguments, false).size(), 2U);
}

TEST(SettingsTest, EveryCombinationOnce) {
  Arguments arguments;
  arguments.modes = {"llmcache"};
  arguments.fidelities = {"threshold"};
  arguments.thresholds = {0.8};
  arguments.evictions = {"gdsf", "lru"};
  arguments.capacities_mib = {1, 2};
  EXPECT_THAT(names(settings(arguments, true)),
              ElementsAre("llmcache/threshold 0.8 gdsf 1", "llmcache/threshold 0.8 lru 1",
                          "llmcache/threshold 0.8 gdsf 2", "llmcache/threshold 0.8 lru 2"));
}

}  // namespace
}  // namespace llmcache::bench
