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
#include "failure.h"
#include "model_files.h"
#include "records.h"
#include "request_stream.h"
#include "statistics.h"
#include "table.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
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
  expect_refused(with("/__metadata__/version", "2"), "version '2'");
  expect_refused(with("/__metadata__/max_tokens", "many"), "max_tokens");
  expect_refused(with("/__metadata__/max_tokens", "99999999999999999999"), "max_tokens");
  expect_refused(with("/__metadata__/workload", 1), "'workload'");
  expect_refused(with("/__metadata__", "text"), "__metadata__");
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

const Versions kVersions = {"0.1.0", "2.13.0", "g++ 12.2.0"};

TEST(RecordsTest, RoundTrip) {
  const Json json = to_json(example(), kVersions);
  const Json parsed = Json::parse(json.dump());
  EXPECT_EQ(parsed, json);
  EXPECT_EQ(to_json(record_from_json(parsed), kVersions), json);
  EXPECT_EQ(record_from_json(parsed).shuffle, std::uint64_t{1} << 63);
  EXPECT_TRUE(parsed["versions"]["model_transformers"].is_null());
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
  EXPECT_THAT(parse({}).modes, ElementsAre("nocache", "llmcache"));
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
                                                                                   {"--nonsense"},
                                                                                   {"stray"},
                                                                                   {"--model"}}) {
    EXPECT_THROW(parse(bad), Failure) << bad[0] << " " << bad.back();
  }
}

}  // namespace
}  // namespace llmcache::bench
