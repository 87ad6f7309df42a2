// The readers of files that may be damaged: JSON within limits, safetensors; and the seeds of the fuzz targets.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "fuzz/check.h"
#include "model/exported_guard.h"
#include "model/exported_program.h"
#include "model/exported_weights.h"
#include "reader_support.h"
#include "refresh/profile_text.h"
#include "store/bounded_json.h"
#include "store/safetensors.h"
#include "store/snapshot_entries.h"

namespace llmcache {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
namespace fs = std::filesystem;

std::string json_refusal(const std::string& text, const JsonLimits& limits = {}) {
  return refusal([&] { return parse_bounded_json(text, limits); });
}

TEST(BoundedJson, DeepNestingIsRefused) {
  for (const char* open : {"[", "{\"a\":", "[{\"a\":[1,2,", " \n["}) {
    EXPECT_THAT(json_refusal(repeated(open, 100'000)), HasSubstr("nested too deeply")) << open;
  }
  EXPECT_EQ(json_refusal("[[[]]]", {.depth = 3}), "");
  EXPECT_THAT(json_refusal("[[[[]]]]", {.depth = 3}), HasSubstr("nested too deeply: 3 levels"));
  EXPECT_EQ(json_refusal("[[[]], [[]], [[]]]", {.depth = 3}), "");  // not their number: how many are open
}

TEST(BoundedJson, ManyKeysAreReadOrRefusedByTheLimit) {
  constexpr std::size_t kKeys = 80'000;
  EXPECT_THAT(parse_bounded_json(object_of(kKeys)), SizeIs(kKeys));
  EXPECT_EQ(json_refusal(object_of(7), {.values = 8}), "");
  EXPECT_THAT(json_refusal(object_of(8), {.values = 8}), HasSubstr("more than 8 values"));
  EXPECT_THAT(json_refusal("[" + repeated("0,", 3'000'000) + "0]"), HasSubstr("more than 1048576 values"));
  EXPECT_EQ(json_refusal("[1, 2]", {.bytes = 6}), "");
  EXPECT_THAT(json_refusal("[1, 2] ", {.bytes = 6}), HasSubstr("it has 7 bytes, at most 6"));
}

TEST(BoundedJson, DoubledKeysAreRefusedWhereverTheyAre) {
  EXPECT_THAT(json_refusal(R"({"a": 1, "b": 2, "a": 1})"), HasSubstr("has 'a' twice"));
  EXPECT_THAT(json_refusal(R"({"x": [{"a": {}, "\u0061": {}}]})"), HasSubstr("has 'a' twice"));
  EXPECT_EQ(json_refusal(R"({"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 1}]})"), "");
  std::string many = object_of(50'000);
  many.back() = ',';
  EXPECT_THAT(json_refusal(many + "\"k49999\":{}}"), HasSubstr("'k49999' twice"));
}

TEST(BoundedJson, WhatIsNoJsonIsRefused) {
  for (const char* text : {"", " ", "NaN", "[NaN]", "[Infinity]", "[-Infinity]", "[1e999]", "[-1e999]", "[01]", "[1,]",
                           "{\"a\" 1}", "{a: 1}", "[1] 2", "[1]]", "'a'", "\"\xff\"", "\"\\ud800\"", "[1e]", "nul"}) {
    EXPECT_THAT(json_refusal(text), HasSubstr("is not JSON")) << text;
  }
  EXPECT_THAT(json_refusal(std::string("[1]\0", 4)), HasSubstr("is not JSON"));
  const std::string whole = R"({"a": [1, -2.5, {"b": "text\n"}], "c": null})";
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_NE(json_refusal(whole.substr(0, size)), "") << size;
  EXPECT_EQ(parse_bounded_json(whole), nlohmann::json::parse(whole));
}

TEST(BoundedJson, MessagesStayShort) {
  EXPECT_THAT(json_refusal("[\"" + std::string(1'000'000, 'x')), SizeIs(::testing::Lt(200U)));
  const std::string key(1'000'000, 'k');
  EXPECT_THAT(json_refusal("{\"" + key + "\":1,\"" + key + "\":1}"), SizeIs(::testing::Lt(200U)));
}

TEST(BoundedJson, FieldsHaveRanges) {
  const auto json = parse_bounded_json(
      R"({"n": -1, "x": 1.5, "big": 18446744073709551615, "t": "text", "l": [1, null], "r": [[1], 2], "b": true})");
  const JsonObject object(json);
  EXPECT_EQ(object.whole("n", -1, 1), -1);
  EXPECT_EQ(object.number("x", 0, 1.5), 1.5);
  EXPECT_EQ(object.number("n"), -1);
  const auto expect_refused = [](const auto& read, const std::string& part) {
    EXPECT_THAT(refusal(read), HasSubstr(part));
  };
  expect_refused([&] { return object.whole("n"); }, "'n' -1; a whole number from 0");
  expect_refused([&] { return object.whole("x"); }, "'x' 1.5");
  expect_refused([&] { return object.whole("big"); }, "'big' 18446744073709551615");
  expect_refused([&] { return object.whole("b"); }, "'b' true");
  expect_refused([&] { return object.number("x", 0, 1); }, "'x' 1.5; a number from 0 to 1");
  expect_refused([&] { return object.number("t"); }, "'t' \"text\"; a finite number");
  expect_refused([&] { return object.numbers("l"); }, "'l' null; a finite number");
  expect_refused([&] { return object.tables("r", 0, 2); }, "'r' 2; a list of lists");
  expect_refused([&] { return object.numbers("t"); }, "a list is expected");
  expect_refused([&] { return object.text("x"); }, "text is expected");
  expect_refused([&] { return object.object("x"); }, "its 'x' is not a JSON object");
  expect_refused([&] { return object.objects("l"); }, "its 'l' is not a JSON object");
  expect_refused([&] { return object.text("none"); }, "it has no 'none'");
}

template <class T>
std::string raw(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::string framed(const std::string& header, const std::string& data) {
  return raw(std::vector<std::uint64_t>{header.size()}) + header + data;
}

TEST(SafetensorsReader, ShapesThatOverflowAreRefused) {
  const auto refused = [](const std::string& shape) {
    const std::string header = R"({"a":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[0,0]}})";
    return refusal([&] { return Safetensors(framed(header, "")).tensors().size(); });
  };
  for (const char* shape : {"[4611686018427387904,4]", "[9223372036854775807]", "[18446744073709551615]",
                            "[0,9223372036854775808]", "[4294967296,0,4294967296]", "[3037000500,3037000500]"}) {
    EXPECT_THAT(refused(shape), HasSubstr("overflows")) << shape;
  }
  EXPECT_THAT(refused("[1,1,1,1,1,1,1,1,0]"), HasSubstr("has 9 dimensions"));
  EXPECT_THAT(refused("[-1]"), HasSubstr("not a whole number"));
  EXPECT_THAT(refused("[1e300]"), HasSubstr("not a whole number"));
  EXPECT_EQ(refused("[0,4294967296]"), "");
}

TEST(SafetensorsReader, ManyTensorsAreReadAndTooLongAHeaderIsRefused) {
  constexpr std::size_t kTensors = 12'000;
  std::string header = "{";
  for (std::size_t i = 0; i < kTensors; ++i) {
    header += (i > 0 ? ",\"t" : "\"t") + std::to_string(i) + R"(":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  }
  EXPECT_THAT(Safetensors(framed(header + "}", "")).tensors(), SizeIs(kTensors));
  EXPECT_THAT(refusal([&] { return Safetensors(framed(object_of(100'000), "")).tensors().size(); }),
              HasSubstr("1048576 are allowed"));
}

TEST(SafetensorsReader, FindsWhatIsNotFinite) {
  const auto finite = [](float value) {
    std::vector<float> values(9, -3.5F);
    values[4] = value;
    const std::string bytes = framed(R"({"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}})", raw(values));
    return all_finite(Safetensors(bytes).tensors().at("a"));
  };
  using Limits = std::numeric_limits<float>;
  for (const float value : {0.0F, -0.0F, Limits::max(), Limits::lowest(), Limits::denorm_min()}) {
    EXPECT_TRUE(finite(value)) << value;
  }
  for (const float value : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN()}) {
    EXPECT_FALSE(finite(value)) << value;
  }
}

/// Each seed of the fuzz targets by itself; those that are sound are read, all others are not.
TEST(Seeds, AreReadOrRefused) {
  const auto each = [](const char* target, const auto& check) {
    std::size_t count = 0;
    for (const auto& seed : fs::directory_iterator(fs::path(LLMCACHE_FUZZ_SEEDS) / target)) {
      SCOPED_TRACE(seed.path().string());
      const std::string bytes = bytes_of(seed.path());
      EXPECT_NO_THROW(check(bytes, seed.path().filename().string()));
      ++count;
    }
    EXPECT_GT(count, 10U);
  };
  each("json", [](const std::string& bytes, const std::string& name) {
    fuzz::check_json(bytes);
    EXPECT_EQ(json_refusal(bytes, {.depth = 6}).empty(), name == "object" || name == "fields" || name == "numbers");
  });
  each("exported", [](const std::string& bytes, const std::string& name) {
    fuzz::check_exported(bytes);
    const auto read = [&] {
      if (name.starts_with("weights")) return exported::parse_weights(bytes).size();
      if (name.starts_with("guard_"))
        return std::size_t{exported::ShapeGuard::parse(bytes) ? 1U : throw DamagedData("")};
      return exported::parse_program(bytes).nodes.size();
    };
    const bool sound = refusal<std::runtime_error>(read).empty() && name != "guard_deep";
    const std::set<std::string> expected{"program", "none",         "of_two",       "overlap",      "sums",
                                         "weights", "guard_divide", "guard_modulo", "guard_negate", "guard_text"};
    EXPECT_EQ(sound, expected.contains(name)) << refusal<std::runtime_error>(read);
  });
  each("snapshot", [](const std::string& bytes, const std::string& name) {
    fuzz::check_snapshot(bytes);
    const bool sound = refusal([&] { return read_output(bytes); }).empty() ||
                       refusal([&] { return read_prefix(bytes); }).empty() ||
                       refusal([&] { return read_token_states(bytes); }).empty() ||
                       refusal([&] { return read_calibration(bytes); }).empty();
    EXPECT_EQ(sound, name == "output" || name == "prefix" || name == "states" || name == "calibration");
  });
  each("profile", [](const std::string& bytes, const std::string& name) {
    fuzz::check_profile(bytes);
    const auto read = [&] {
      const std::size_t end = bytes.find('\0');
      const auto text = parse_profile(bytes.substr(0, end), ContentHash::kIgnored);
      const std::string beside = bytes.substr(end + 1);
      if (text.exit) check_exit_tensors(Safetensors(beside), text);
      return 0;
    };
    EXPECT_EQ(refusal<std::runtime_error>(read).empty(),
              name == "neighbour" || name == "cache_free" || name == "reuse");
  });
}

}  // namespace
}  // namespace llmcache
