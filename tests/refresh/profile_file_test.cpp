// Calibration profiles on disk: read as they were written, or refused with what is wrong.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "fuzz/check.h"
#include "llmcache/error.h"
#include "llmcache/refresh/calibration.h"
#include "reader_support.h"
#include "refresh/exit_model.h"
#include "refresh/profile_text.h"

namespace llmcache {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

/// A small profile of two layers, of which one is used, on disk.
class ProfileFileTest : public ::testing::TestWithParam<EarlyExit> {
 protected:
  static constexpr std::int64_t kEntries = ExitModel::kLeastEntries;
  static constexpr std::int64_t kHidden = 3;
  static constexpr std::int64_t kValues = 2;

  ProfileFileTest() {
    std::string name = (fs::temp_directory_path() / "llmcache-profile-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    folder_ = name;
    path_ = folder_ / "profile.json";
    tensors_ = path_.string() + ".safetensors";
    profile_.budget = {BudgetMetric::kDecision, 0.05, 0.1};
    profile_.model_digest = "0123abcd";
    profile_.fitted = kEntries;
    profile_.certified = 100;
    profile_.certified_error = 0.01;
    profile_.error_bound = 0.04;
    profile_.expected_share = 0.5;
    profile_.expected_exits = {0.5, 0};
    profile_.typical_distance = 1.5;
    set(model(EarlyExit::kCachedNeighbour), EarlyExit::kCachedNeighbour);
  }
  ~ProfileFileTest() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  static ExitModel model(EarlyExit kind) {
    ExitModel model;
    model.cache_free = kind == EarlyExit::kCacheFree;
    const std::int64_t entries = model.cache_free ? 0 : kEntries;
    const auto ramp = [](std::int64_t rows, std::int64_t columns) {
      return at::linspace(-1, 1, rows * columns).reshape({rows, columns});
    };
    model.outputs = ramp(entries, kValues);
    model.decisions = at::arange(entries) % 2;
    model.mean_output = at::full({kValues}, 0.5);
    model.thresholds = {{0.25, -1}, {0.125, -1}};
    model.layers.resize(2);
    ExitLayer& layer = model.layers[0];
    layer.centre = at::full({kHidden}, 0.25);
    layer.translator = ramp(kHidden, kValues);
    if (!model.cache_free) {
      layer.states = ramp(kEntries, kHidden);
      layer.lengths = layer.states.norm(2, 1);
      layer.projection = ramp(kHidden, 1);
      layer.projected = ramp(kEntries, 1);
    }
    const std::vector<double> features(model.features(), 0.5);
    layer.gate = {features, features, features, 0.125};
    return model;
  }

  void set(ExitModel model, EarlyExit kind) {
    profile_.early_exit = kind;
    profile_.bytes = model.bytes();
    profile_.exit = std::make_shared<ExitModel>(std::move(model));
  }

  [[nodiscard]] CalibrationProfile load() const { return CalibrationProfile::load(path_); }

  /// What load() says; empty if it has nothing against the files.
  [[nodiscard]] std::string load_refusal() const {
    try {
      static_cast<void>(load());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidFile);
      return error.what();
    }
    return "";
  }

  /// Writes the JSON with one place changed (or removed, by null), and the hash that belongs to it.
  void change(const std::string& pointer, const Json& value) const {
    Json json = Json::parse(saved_);
    json.erase("content_xxh3");
    const Json::json_pointer place(pointer);
    if (value.is_null()) {
      json.at(place.parent_pointer()).erase(place.back());
    } else {
      json[place] = value;
    }
    write_hashed(json);
  }
  void write_hashed(Json json) const {
    json["content_xxh3"] = content_hash(json.dump());
    write(path_, json.dump(2));
  }

  /// Files that load again are the same ones.
  void expect_same_or_refused() const {
    if (!load_refusal().empty()) return;
    const fs::path again = folder_ / "again.json";
    load().save(again);
    EXPECT_EQ(bytes_of(again), saved_);
    EXPECT_EQ(bytes_of(again.string() + ".safetensors"), saved_tensors_);
  }

  void save() {
    profile_.save(path_);
    saved_ = bytes_of(path_);
    saved_tensors_ = bytes_of(tensors_);
  }

  fs::path folder_;
  fs::path path_;
  fs::path tensors_;
  std::string saved_;
  std::string saved_tensors_;
  CalibrationProfile profile_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, ProfileFileTest, ::testing::Values(EarlyExit::kCachedNeighbour, EarlyExit::kCacheFree),
                         [](const auto& kind) {
                           return kind.param == EarlyExit::kCacheFree ? "CacheFree" : "Neighbour";
                         });

TEST_P(ProfileFileTest, IsReadAsItWasWritten) {
  set(model(GetParam()), GetParam());
  ReuseChoice reuse;
  reuse.mechanism = "token reuse";
  reuse.setting = "every 4th token";
  reuse.computed = 0.4;
  profile_.reuse = reuse;
  profile_.verified = {.tokens = 64, .rows = 8, .padding = 16, .codes = {1, 4'000'000'000U}};
  save();
  ASSERT_EQ(load_refusal(), "");
  const auto read = load();
  EXPECT_EQ(read.to_string(), profile_.to_string());
  EXPECT_EQ(read.exit->thresholds, profile_.exit->thresholds);
  EXPECT_EQ(read.exit->layers[0].gate.weights, profile_.exit->layers[0].gate.weights);
  EXPECT_TRUE(at::equal(read.exit->outputs, profile_.exit->outputs));
  EXPECT_TRUE(at::equal(read.exit->layers[0].translator, profile_.exit->layers[0].translator));
  EXPECT_FALSE(read.exit->layers[1].used());
  EXPECT_EQ(read.reuse->computed, 0.4);
  EXPECT_EQ(read.verified.codes, profile_.verified.codes);
  expect_same_or_refused();
  write(path_, Json::parse(saved_).dump());  // white space does not count
  EXPECT_EQ(load_refusal(), "");
}

/// Whatever the hashes say: each change is refused for a reason of its own, or what is read is sound.
TEST_P(ProfileFileTest, EveryChangedByteIsSoundWithoutAHashToo) {
  set(model(GetParam()), GetParam());
  save();
  const std::string whole = saved_ + '\0' + saved_tensors_;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const std::size_t bit : {i, i + 3}) EXPECT_NO_THROW(fuzz::check_profile(flipped(whole, i, bit))) << i;
    EXPECT_NO_THROW(fuzz::check_profile(whole.substr(0, i))) << i;
  }
}

using ProfileFile = ProfileFileTest;

TEST_F(ProfileFile, EveryTruncationIsRefused) {
  set(model(EarlyExit::kCacheFree), EarlyExit::kCacheFree);
  save();
  for (const char* more : {"{}", ",", "x"}) {
    write(path_, saved_ + more);
    EXPECT_THAT(load_refusal(), HasSubstr("damaged")) << more;
  }
  write(path_, saved_ + '\0' + "more");
  EXPECT_THAT(load_refusal(), HasSubstr("damaged"));
  for (std::size_t size = saved_.size() - 2; size > 0; --size) {  // the last byte is an end of line
    fs::resize_file(path_, size);
    EXPECT_THAT(load_refusal(), HasSubstr("damaged")) << size;
  }
  write(path_, "");
  EXPECT_THAT(load_refusal(), HasSubstr("damaged"));
  write(path_, saved_);
  write(tensors_, saved_tensors_ + "more");
  EXPECT_THAT(load_refusal(), HasSubstr("damaged"));
  for (std::size_t size = saved_tensors_.size(); size > 0; --size) {
    fs::resize_file(tensors_, size - 1);
    EXPECT_THAT(load_refusal(), HasSubstr("damaged")) << size - 1;
  }
}

TEST_F(ProfileFile, EveryChangedByteIsRefusedOrChangesNothing) {
  set(model(EarlyExit::kCacheFree), EarlyExit::kCacheFree);
  save();
  const auto change_each = [&](const fs::path& path, const std::string& whole) {
    for (std::size_t i = 0; i < whole.size(); ++i) {
      write(path, flipped(whole, i, i));
      expect_same_or_refused();
    }
    write(path, whole);
  };
  change_each(path_, saved_);
  change_each(tensors_, saved_tensors_);
  EXPECT_EQ(load_refusal(), "");
}

TEST_F(ProfileFile, NoTensorMayHaveAValueThatIsNotFinite) {
  const auto tensors = [](ExitModel& model) {
    ExitLayer& layer = model.layers[0];
    return std::vector<at::Tensor*>{&model.outputs, &model.mean_output, &layer.centre,    &layer.states,
                                    &layer.lengths, &layer.projection,  &layer.projected, &layer.translator};
  };
  ExitModel counted = model(EarlyExit::kCachedNeighbour);
  for (std::size_t i = 0; i < tensors(counted).size(); ++i) {
    for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity()}) {
      ExitModel damaged = model(EarlyExit::kCachedNeighbour);
      tensors(damaged)[i]->view({-1})[1] = value;
      set(std::move(damaged), EarlyExit::kCachedNeighbour);
      save();
      EXPECT_THAT(load_refusal(), HasSubstr("not finite")) << i << " " << value;
    }
  }
  ExitModel damaged = model(EarlyExit::kCachedNeighbour);
  damaged.decisions[3] = -1;
  set(damaged, EarlyExit::kCachedNeighbour);
  save();
  EXPECT_THAT(load_refusal(), HasSubstr("'decisions' has the value -1"));
  damaged = model(EarlyExit::kCachedNeighbour);
  damaged.layers[0].lengths[3] = 0;
  set(damaged, EarlyExit::kCachedNeighbour);
  save();
  EXPECT_THAT(load_refusal(), HasSubstr("lengths' has the value 0"));
}

TEST_F(ProfileFile, TensorsMustFitEachOther) {
  const auto expect_refused = [&](const std::function<void(ExitModel&)>& damage, const std::string& part) {
    ExitModel damaged = model(EarlyExit::kCachedNeighbour);
    damage(damaged);
    set(std::move(damaged), EarlyExit::kCachedNeighbour);
    save();
    EXPECT_THAT(load_refusal(), HasSubstr(part));
  };
  expect_refused([](ExitModel& m) { m.outputs = at::Tensor(); }, "no tensor 'outputs'");
  expect_refused([](ExitModel& m) { m.outputs = at::zeros({kEntries, 5}); }, "'mean_output' is [2]; [5] is expected");
  expect_refused([](ExitModel& m) { m.outputs = at::zeros({3, kValues}); }, "3 entries; 32 or more");
  expect_refused([](ExitModel& m) { m.outputs = at::zeros({kEntries, 0}); }, "has no values");
  expect_refused([](ExitModel& m) { m.decisions = at::zeros({kEntries}); }, "is F32 with 1 dimensions, expected I64");
  expect_refused([](ExitModel& m) { m.mean_output = at::Tensor(); }, "no tensor 'mean_output'");
  expect_refused([](ExitModel& m) { m.layers[0].centre = at::Tensor(); }, "layer 0 has a threshold and no tensors");
  expect_refused([](ExitModel& m) { m.layers[0].states = at::Tensor(); }, "no tensor 'layers.0.states'");
  expect_refused([](ExitModel& m) { m.layers[0].states = at::zeros({kEntries, 2}); }, "[32, 3] is expected");
  expect_refused([](ExitModel& m) { m.layers[0].translator = at::zeros({kValues, kHidden}); }, "[3, 2] is expected");
  expect_refused([](ExitModel& m) { m.layers[0].projected = at::Tensor(); }, "no tensor 'layers.0.projected'");
  expect_refused([](ExitModel& m) { m.layers[0].projection = at::Tensor(); }, "it has 8 tensors, 7 are expected");
  expect_refused([](ExitModel& m) { m.layers[1].states = at::zeros({kEntries, 3}); }, "it has 10 tensors, 9");
  expect_refused([](ExitModel& m) { m.layers[0].gate = {}; }, "has 0 features; 18 are expected");
  expect_refused([](ExitModel& m) { m.layers[1].gate.means = {1}; }, "means, scales and weights of unlike numbers");
}

TEST_F(ProfileFile, FieldsOutOfRangeAreRefused) {
  save();
  const double far = 1e300;
  const std::vector<std::pair<std::string, std::vector<Json>>> cases = {
      {"/budget", {nullptr, 3, Json::array()}},
      {"/budget/metric", {nullptr, "luck", 3}},
      {"/budget/epsilon", {nullptr, 0, -1, 0.6, "a", far}},
      {"/budget/delta", {nullptr, 0, 1, -1, true}},
      {"/early_exit", {nullptr, "never", 1}},
      {"/model", {nullptr, 3}},
      {"/fitted", {nullptr, -1, 1.5, far, "1", std::uint64_t{1} << 63}},
      {"/certified", {nullptr, -1, 1.5, far}},
      {"/certified_error", {nullptr, -0.1, 1.1, "0"}},
      {"/error_bound", {nullptr, -0.1, 1.1}},
      {"/expected_share", {nullptr, -0.1, 1.1}},
      {"/expected_exits", {nullptr, 3, Json{-0.1}, Json{2}, Json{"a"}}},
      {"/typical_distance", {nullptr, -1}},
      {"/bytes", {nullptr, -1, 1.5, far, 0}},  // 0: the tensors are larger
      {"/exit/tensors_xxh3", {nullptr, "0", 3}},
      {"/exit/thresholds", {nullptr, 3, Json::array(), Json{Json::array()}, Json{Json{0.5}}, Json{Json{0.5, -0.5}}}},
      {"/exit/thresholds/0/0", {-2, 2, "a", far}},
      {"/exit/gates", {nullptr, 3, Json::array(), Json{3}}},
      {"/exit/gates/0/means/3", {"a", true}},
      {"/exit/gates/0/scales/3", {0, -1}},
      {"/exit/gates/0/weights", {Json{1}, 3}},
      {"/exit/gates/0/intercept", {nullptr, "a"}},
      {"/verified",
       {3, Json{{"tokens", -1}, {"rows", 1}, {"padding", 0}, {"codes", Json::array()}},
        Json{{"tokens", 1}, {"rows", 1}, {"padding", 0}, {"codes", {2, 1}}},
        Json{{"tokens", 1}, {"rows", 1}, {"padding", 0}, {"codes", {std::uint64_t{1} << 32}}}}},
      {"/reuse", {3, Json::object()}}};
  for (const auto& [place, values] : cases) {
    for (const Json& value : values) {
      change(place, value);
      if (place == "/bytes" && value == 0) {  // a small file is within the room for its header
        fs::resize_file(tensors_, std::uintmax_t{8} << 20);
      }
      EXPECT_THAT(load_refusal(), HasSubstr("damaged")) << place << " " << value;
      write(tensors_, saved_tensors_);
    }
  }
  change("/certified", 101);
  EXPECT_EQ(load_refusal(), "");
}

TEST_F(ProfileFile, NumbersThatAreNotFiniteAreRefused) {
  for (double LogisticModel::*unused : {&LogisticModel::intercept}) {
    ExitModel damaged = model(EarlyExit::kCachedNeighbour);
    damaged.layers[0].gate.*unused = std::numeric_limits<double>::quiet_NaN();
    set(std::move(damaged), EarlyExit::kCachedNeighbour);
    save();
    EXPECT_THAT(load_refusal(), HasSubstr("'intercept' null; a finite number"));
  }
  for (auto LogisticModel::*values : {&LogisticModel::means, &LogisticModel::scales, &LogisticModel::weights}) {
    ExitModel damaged = model(EarlyExit::kCachedNeighbour);
    (damaged.layers[0].gate.*values)[2] = std::numeric_limits<double>::infinity();
    set(std::move(damaged), EarlyExit::kCachedNeighbour);
    save();
    EXPECT_THAT(load_refusal(), HasSubstr("null; a "));
  }
  set(model(EarlyExit::kCachedNeighbour), EarlyExit::kCachedNeighbour);
  save();
  for (const char* text : {"NaN", "Infinity", "1e999"}) {
    std::string changed = saved_;
    changed.replace(changed.find("0.125"), 5, text);
    write(path_, changed);
    EXPECT_THAT(load_refusal(), HasSubstr("not JSON")) << text;
  }
}

TEST_F(ProfileFile, HarmfulFilesAreRefused) {
  save();
  for (const char* open : {"[", "{\"a\":", "{\"format\":\"llmcache calibration\",\"exit\":["}) {
    write(path_, repeated(open, 100'000));
    EXPECT_THAT(load_refusal(), HasSubstr("nested too deeply"));
  }
  write(path_, object_of(80'000));
  EXPECT_THAT(load_refusal(), HasSubstr("no calibration profile"));
  std::string keys = saved_;
  keys.insert(keys.find('{') + 1, object_of(80'000).substr(1, object_of(80'000).size() - 2) + ",");
  write(path_, keys);
  EXPECT_THAT(load_refusal(), HasSubstr("content was changed"));
  std::string twice = saved_;
  twice.insert(twice.find('{') + 1, "\"bytes\": 5,");
  write(path_, twice);
  EXPECT_THAT(load_refusal(), HasSubstr("'bytes' twice"));
  fs::resize_file(path_, std::uintmax_t{1} << 40);  // takes no room on the disk
  EXPECT_THAT(load_refusal(), HasSubstr("has 1099511627776 bytes, at most 16777216"));
  write(path_, saved_);
  fs::resize_file(tensors_, std::uintmax_t{1} << 40);
  EXPECT_THAT(load_refusal(), HasSubstr("has 1099511627776 bytes"));
}

TEST_F(ProfileFile, WhatIsNoFileIsRefused) {
  save();
  const fs::path pipe = folder_ / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const auto expect_refused = [](const fs::path& path, const std::string& part) {
    EXPECT_THAT(refusal<Error>([&] { return CalibrationProfile::load(path).bytes; }),
                ::testing::AllOf(HasSubstr("cannot be read"), HasSubstr(part)));
  };
  expect_refused(folder_, "it is a directory");
  expect_refused("/dev/zero", "device or pipe");
  expect_refused(pipe, "device or pipe");
  expect_refused(folder_ / "missing", "no such file");
  expect_refused(path_ / "below", "calibration profile");
  fs::remove(tensors_);
  EXPECT_THAT(load_refusal(), HasSubstr("profile.json.safetensors' cannot be read (there is no such file)"));
  fs::create_directory(tensors_);
  EXPECT_THAT(load_refusal(), HasSubstr("it is a directory"));
  fs::remove(tensors_);
  fs::create_symlink("/dev/zero", tensors_);
  EXPECT_THAT(load_refusal(), HasSubstr("device or pipe"));
}

TEST_F(ProfileFile, ForeignFormatsAndVersionsAreNamed) {
  save();
  change("/version", 3);
  EXPECT_THAT(load_refusal(), HasSubstr("has version 3; this library reads version 2: calibrate again"));
  change("/version", 1);
  EXPECT_THAT(load_refusal(), HasSubstr("has version 1"));
  change("/version", nullptr);
  EXPECT_THAT(load_refusal(), HasSubstr("has version 0"));
  change("/format", "recipe");
  EXPECT_THAT(load_refusal(), HasSubstr("no calibration profile"));
}

/// Written by the library before it had this reader.
TEST_F(ProfileFile, EarlierFilesAreRead) {
  const fs::path seed = fs::path(LLMCACHE_FUZZ_SEEDS) / "earlier" / "profile.json";
  const auto read = CalibrationProfile::load(seed);
  EXPECT_EQ(read.exit->layers.size(), 2U);
  EXPECT_EQ(read.exit->outputs.size(0), 32);
  EXPECT_EQ(read.model_digest, "0123abcd");
}

}  // namespace
}  // namespace llmcache
