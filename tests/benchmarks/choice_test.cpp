// What llmcache-bench runs: arguments, models and workloads chosen by them, settings, time for each.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_support.h"
#include "calibration.h"
#include "config.h"
#include "files.h"
#include "selection.h"
#include "settings.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Json = nlohmann::ordered_json;

TEST(SelectionTest, ProbesAreNoTokenFiles) {
  const Folder folder;
  for (const char* name : {"w.bert.safetensors", "w.gpt-2.5.safetensors", "w.m.probe.safetensors", "w.json"}) {
    std::ofstream(folder / name) << "x";
  }
  std::vector<std::string> found;
  for (const WorkloadFile& file : workload_files(folder / "")) found.push_back(file.workload + "/" + file.tokenizer);
  EXPECT_THAT(found, ElementsAre("w/bert", "w/gpt-2.5"));
}

/// A folder of models and token files that only have what choosing among them reads.
class ChoiceTest : public ::testing::Test {
 protected:
  ChoiceTest() {
    std::filesystem::create_directories(folder_ / "models");
    std::filesystem::create_directories(folder_ / "data");
    for (const char* name : {"chat", "generate-128", "generate-512", "openbookqa", "openbookqa-5shot",
                             "openbookqa-20shot", "sample", "squad"}) {
      file(name);
    }
  }

  void file(const std::string& workload) const {
    FileBuilder builder;
    builder.metadata = {{"workload", workload}, {"tokenizer", "t"},    {"source", "s"}, {"description", "d"},
                        {"order", "o"},         {"max_tokens", "512"}, {"version", "1"}};
    builder.add<std::int32_t>("tokens", "I32", {1}, {0});
    builder.add<std::int64_t>("sequence_offsets", "I64", {2}, {0, 1});
    builder.add<std::int64_t>("request_offsets", "I64", {2}, {0, 1});
    if (!task_.empty()) {
      builder.metadata["task"] = task_;
      builder.metadata["version"] = "2";
      builder.add<std::int64_t>("scored", "I64", {1, 2}, {1, 1});
    }
    std::ofstream(folder_ / "data" / (workload + ".t.safetensors"), std::ios::binary) << builder.bytes();
  }

  std::vector<std::string> chosen(const std::string& weights) {
    std::ofstream(folder_ / "models/m.pt") << "x";
    const Json sidecar = {{"weights", weights},  {"tokenizer", "t"},
                          {"family", "decoder"}, {"dtype", "float32"},
                          {"vocab", 10},         {"max_tokens", 64},
                          {"bytes", 1},          {"versions", {{"torch", "2"}, {"transformers", "5"}}}};
    std::ofstream(folder_ / "models/m.json") << sidecar;
    std::vector<std::string> names;
    const auto all = selected();
    for (const auto& experiment : all.front().experiments) {
      const std::string& name = experiment.tokens->workload;
      if (names.empty() || names.back() != name) names.push_back(name);  // several experiments may be for one
    }
    return names;
  }

  [[nodiscard]] std::vector<Selected> selected() const {
    Values options = options_;
    options["models"] = {(folder_ / "models").string()};
    options["data"] = {(folder_ / "data").string()};
    return select(first_run_ ? read_configuration(std::filesystem::path("first-run"), options)
                             : read_configuration("{}", "test", options));
  }

  const Folder folder_;
  Values options_;
  bool first_run_ = false;
  std::string task_;
};

TEST_F(ChoiceTest, ByDefault) {
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "generate-512", "openbookqa", "squad"));
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("generate-128", "openbookqa", "squad"));
}

TEST(FirstRunTest, MeasuresWhatAUserWouldChoose) {
  const Configuration configuration = read_configuration(std::filesystem::path("first-run"), {});
  const auto first_run = [&](const ModelFile& model, const std::string& workload, bool probe) {
    return configuration.experiments_for(model, workload, probe);
  };
  const auto model_of = [](const char* name, const char* family) {
    ModelFile model;
    model.name = name;
    model.weights = "pypi:x 1";
    model.family = family;
    return model;
  };
  ModelFile encoder = model_of("minilm-pooled", "encoder");
  const auto fidelities = [](const Experiment& one) { return one.settings.fidelities; };
  const auto questions = first_run(encoder, "sample-faq", true);
  ASSERT_EQ(questions.size(), 3U);
  EXPECT_THAT(fidelities(questions[0]), ElementsAre("lossless", "budget", "threshold"));
  EXPECT_THAT(questions[0].settings.epsilons, ElementsAre(0.02));
  EXPECT_TRUE(questions[0].settings.equal_error);
  EXPECT_EQ(questions[1].settings.thresholds.size(), 5U);
  EXPECT_EQ(questions[2].settings.capacities_mib.size(), 4U);
  EXPECT_EQ(first_run(encoder, "banking77", true).size(), 3U) << "real data as the sample of their kind";
  EXPECT_TRUE(first_run(encoder, "sample-faq", false).empty()) << "no probe, nothing to judge answers by";
  EXPECT_EQ(first_run(encoder, "sample-edits-200", false)[0].settings.metric, "relative");

  ModelFile decoder = model_of("smollm2", "decoder");
  for (const char* name : {"sample-chat", "squad", "sample-choices", "wikitext", "generate-128"}) {
    const auto experiments = first_run(decoder, name, false);
    ASSERT_EQ(experiments.size(), 1U) << name;
    EXPECT_THAT(experiments[0].settings.modes, ElementsAre("nocache", "kvcache", "llmcache"));
    EXPECT_THAT(fidelities(experiments[0]), ElementsAre("lossless"));
  }
  decoder = model_of("gpt2", "decoder");
  const auto articles = first_run(decoder, "sample-articles", false);
  ASSERT_EQ(articles.size(), 1U);
  EXPECT_THAT(fidelities(articles[0]), ElementsAre("lossless", "threshold")) << "trained weights: the paper's loss";
  EXPECT_THAT(fidelities(first_run(decoder, "chat", false).at(0)), ElementsAre("lossless"));
  ModelFile answers = model_of("bert-base-squad", "encoder");
  answers.output = "(start_logits, end_logits)";
  EXPECT_EQ(first_run(answers, "squad", false).size(), 1U);
  EXPECT_TRUE(first_run(answers, "openbookqa", false).empty()) << "it was trained for questions alone";
  encoder = model_of("bert-base", "encoder");
  EXPECT_EQ(first_run(encoder, "wikitext", false).size(), 1U);
  EXPECT_TRUE(first_run(encoder, "squad", false).empty()) << "bert-base-squad answers them";
  decoder.weights = encoder.weights = "random (seed 0)";
  for (const ModelFile& model : {encoder, decoder}) {
    for (const char* name : {"wikitext", "sample-documents", "openbookqa"}) {  // the paper's nine experiments
      const auto experiments = first_run(model, name, false);
      ASSERT_EQ(experiments.size(), 1U) << name;
      EXPECT_TRUE(experiments[0].settings.is_given("mode") && experiments[0].settings.is_given("fidelity"));
      EXPECT_TRUE(experiments[0].settings.has_mode("semantic-cache"));
    }
    EXPECT_TRUE(first_run(model, "sample-faq", false).empty());
  }
}

TEST(EqualErrorTest, WhatWasFoundIsKept) {
  const Folder folder;
  const auto path = folder / "nearest.json";
  EXPECT_TRUE(load_nearest(path).empty());
  save_nearest(path, {{.similarity = 0.25, .error = 1}, {.similarity = 0.123456789012345, .error = 0}});
  const auto found = load_nearest(path);
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found[1].similarity, 0.123456789012345);
  EXPECT_EQ(found[0].error, 1);
  for (const char* damaged : {"", "[]", R"({"version": "0.0.0", "nearest": [[1, 0]]})",
                              R"({"version": ")" LLMCACHE_VERSION R"(", "nearest": [[1, 0], [1]]})",
                              R"({"version": ")" LLMCACHE_VERSION R"(", "nearest": 3})"}) {
    std::ofstream(path) << damaged;
    EXPECT_TRUE(load_nearest(path).empty()) << damaged;
  }
  save_nearest(folder / "no such folder" / "nearest.json", found);  // found again by the next run
}

TEST_F(ChoiceTest, WithoutOptionsRealDataComeBeforeTheSample) {
  first_run_ = true;
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "openbookqa", "squad"));
  file("sample-articles");
  file("sample-chat");
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "openbookqa", "sample-articles", "squad"));
}

TEST_F(ChoiceTest, ByName) {
  options_["workload"] = {"generate", "openbookqa"};
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("generate-128", "generate-512", "openbookqa"));
  options_["workload"] = {"openbookqa-20shot", "chat", "generate-512"};
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("openbookqa-20shot", "chat", "generate-512"));
  for (const char* name : {"gen", "generate-", "openbookqa-3shot", "generate-64"}) {
    options_["workload"] = {name};
    expect_failure([&] { chosen("hub:x"); }, std::string("no workload '") + name + "'");
  }
}

TEST_F(ChoiceTest, InBatchesOfTheAskedSize) {
  options_["batch"] = {"3"};
  options_["workload"] = {"squad"};
  EXPECT_THAT(chosen("hub:x"), ElementsAre("squad"));
  EXPECT_THAT(selected().front().experiments.front().tokens->request_offsets, ElementsAre(0, 1));
  task_ = "perplexity";
  file("squad");
  expect_failure([&] { chosen("hub:x"); }, "--batch 3: the requests of squad");
}

TEST(BudgetTest, TimeGoesWhereQualityIsMeasured) {
  ModelFile model;
  TokenFile file;
  model.weights = "hub:x";
  EXPECT_EQ(default_share(model, file, true), 0.5);
  file.task = Task::kPerplexity;
  EXPECT_EQ(default_share(model, file, false), 1);
  file.task = Task::kDuplicates;
  EXPECT_EQ(default_share(model, file, false), 2);
  file.scored = {{1, 2}};
  EXPECT_EQ(default_share(model, file, false), 2);
  file.task = Task::kAnswer;
  EXPECT_EQ(default_share(model, file, false), 2);
  file.scored.clear();
  EXPECT_EQ(default_share(model, file, false), 1) << "an encoder's";
  file.task = Task::kGeneration;
  EXPECT_EQ(default_share(model, file, false), 1);
  file.task = Task::kClassification;
  EXPECT_EQ(default_share(model, file, false), 0.5);
  EXPECT_EQ(default_share(model, file, true), 12);
  model.weights = "random (seed 0)";
  EXPECT_EQ(default_share(model, file, true), 0.5);
  Configuration configuration;
  EXPECT_EQ(seconds_per_share(configuration, 1), 30);
  EXPECT_EQ(seconds_per_share(configuration, 48), 7.5);
  configuration.seconds_in_all = 96;
  EXPECT_EQ(seconds_per_share(configuration, 48), 2);
  configuration.settings.limit = 5;
  EXPECT_TRUE(std::isinf(seconds_per_share(configuration, 48)));
}

TEST(SettingsTest, AreReadFromOptionsAndNonsenseIsRefused) {
  const auto parse_all = [](std::vector<const char*> words) {
    words.insert(words.begin(), "path/llmcache-bench");
    return parse_command(static_cast<int>(words.size()), words.data());
  };
  const auto parse = [&](const std::vector<const char*>& words) { return parse_all(words).configuration.settings; };
  const auto is_first_run = [&](const std::vector<const char*>& words) {
    return !parse_all(words).configuration.experiments.empty();
  };
  const Command command = parse_all({"--model", "a,b", "--model", "c", "--mode", "llmcache", "--shuffle", "5"});
  const Settings& settings = command.configuration.settings;
  EXPECT_THAT(settings.models, ElementsAre("a", "b", "c"));
  EXPECT_THAT(settings.modes, ElementsAre("llmcache"));
  EXPECT_EQ(settings.shuffle, 5);
  EXPECT_EQ(command.text, "llmcache-bench --model a,b --model c --mode llmcache --shuffle 5");
  EXPECT_FALSE(is_first_run({"--model", "a"}));
  EXPECT_FALSE(is_first_run({"--limit", "3"}));
  EXPECT_TRUE(is_first_run({}));
  EXPECT_TRUE(is_first_run({"--threads", "2", "--json", "x.json"})) << "where and how, not what";
  expect_failure([&] { parse({"--equal-error"}); }, "name budget in --fidelity");
  expect_failure([&] { parse({"--bank-format", "int8", "--fidelity", "lossless"}); }, "name budget in --fidelity");
  EXPECT_TRUE(parse({"--equal-error", "--fidelity", "lossless,budget"}).equal_error);
  const std::vector<const char*> any = {"--limit", "1"};
  EXPECT_FALSE(parse(any).is_given("threshold"));
  EXPECT_FALSE(parse(any).is_given("mode"));
  EXPECT_TRUE(parse({"--threshold", "0.5"}).is_given("threshold"));
  EXPECT_TRUE(parse({"--mode", "semantic-cache"}).is_given("mode"));
  EXPECT_THAT(parse({"--threshold", "0.9,-1", "--threshold", "0.9"}).thresholds, ElementsAre(-1, 0.9));
  EXPECT_THAT(parse({"--capacity-mib", "64,1,64"}).capacities_mib, ElementsAre(1, 64));
  EXPECT_FALSE(parse({"--centre", "off"}).centre);
  EXPECT_TRUE(parse(any).has_mode("kvcache"));
  EXPECT_FALSE(parse({"--mode", "llmcache"}).has_mode("kvcache"));
  EXPECT_THAT(parse({"--weights", "packed-fp16,as-loaded,packed-fp16"}).weights,
              ElementsAre("as-loaded", "packed-fp16"));
  EXPECT_FALSE(parse(any).output.has_value());
  EXPECT_EQ(parse({"--output", "new"}).output, "new");
  EXPECT_FALSE(parse(any).batch.has_value());
  EXPECT_EQ(parse({"--batch", "32"}).batch, 32);
  EXPECT_EQ(parse({"--cache-layers", "0,3"}).cache_layers, "0,3");
  EXPECT_THROW(parse({"--help"}), HelpAsked);
  for (const std::vector<const char*>& bad : std::vector<std::vector<const char*>>{{"--threads", "0"},
                                                                                   {"--threads", "x"},
                                                                                   {"--limit", "0"},
                                                                                   {"--limit", "-3"},
                                                                                   {"--seconds", "0"},
                                                                                   {"--seconds", "nan"},
                                                                                   {"--mode", "turbo"},
                                                                                   {"--shuffle", "-1"},
                                                                                   {"--fidelity", "x"},
                                                                                   {"--weights", "int8"},
                                                                                   {"--weights", "as-loaded,x"},
                                                                                   {"--output", "first"},
                                                                                   {"--output", "all,new"},
                                                                                   {"--batch", "0"},
                                                                                   {"--batch", "1,8"},
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
                                                                                   {"--audit-rate", "2"},
                                                                                   {"--nonsense"},
                                                                                   {"stray"},
                                                                                   {"--calibration-parts", "0"},
                                                                                   {"--calibration", "profile.json"},
                                                                                   {"--config", "no such"},
                                                                                   {"--model"}}) {
    EXPECT_THROW(parse(bad), Failure) << bad[0] << " " << bad.back();
  }
}

TEST(SettingsTest, AreReadFromConfigurations) {
  const auto read = [](const std::string& text, const Values& options = {}) {
    return read_configuration(std::string_view(text), "c.json", options);
  };
  const Settings settings =
      read(R"({"settings": {"model": ["a", "b"], "threshold": [0.9, 0.85], "centre": false, "capacity-mib": 64}})")
          .settings;
  EXPECT_THAT(settings.models, ElementsAre("a", "b"));
  EXPECT_THAT(settings.thresholds, ElementsAre(0.85, 0.9));
  EXPECT_FALSE(settings.centre);
  EXPECT_THAT(settings.capacities_mib, ElementsAre(64));
  EXPECT_TRUE(settings.is_given("threshold"));
  const Values options = {{"threshold", {"0.5"}}};
  EXPECT_THAT(read(R"({"settings": {"threshold": 0.9}})", options).settings.thresholds, ElementsAre(0.5))
      << "options win";
  ModelFile model;
  model.name = "bert-base";
  model.family = "encoder";
  model.weights = "hub:x";
  const char* rules = R"({"settings": {"threshold": 0.7}, "stand_ins": {"sample": "w"}, "experiments": [
      {"models": ["bert*"], "except": ["*-squad"], "workloads": ["w"], "share": 3, "settings": {"threshold": 0.8}},
      {"trained": false, "workloads": ["w"]}, {"family": "decoder", "workloads": ["w"]},
      {"linear_probe": true, "workloads": ["w"]}]})";
  const Configuration configuration = read(rules);
  EXPECT_EQ(configuration.experiments_for(model, "other", true).size(), 0U);
  ASSERT_EQ(configuration.experiments_for(model, "sample", false).size(), 1U);
  EXPECT_EQ(configuration.experiments_for(model, "w", true).size(), 2U);
  EXPECT_EQ(configuration.experiments_for(model, "w", false)[0].share, 3);
  EXPECT_THAT(configuration.experiments_for(model, "w", false)[0].settings.thresholds, ElementsAre(0.8));
  EXPECT_THAT(read(rules, options).experiments_for(model, "w", false)[0].settings.thresholds, ElementsAre(0.5));
  model.name = "bert-base-squad";
  EXPECT_EQ(configuration.experiments_for(model, "w", false).size(), 0U);
  for (const char* bad :
       {"", "[]", R"({"settings": 3})", R"({"settings": {"treshold": 1}})", R"({"settings": {"threshold": {}}})",
        R"({"settings": {"threshold": null}})", R"({"experiment": []})", R"({"experiments": [{}]})",
        R"({"experiments": [{"workloads": ["w"], "share": "x"}]})", R"({"experiments": [{"workloads": "w", "no": 1}]})",
        R"({"experiments": [{"workloads": ["w"], "settings": {"epsilon": 7}}]})",
        R"({"experiments": [{"workloads": ["w"], "group": "none"}]})"}) {
    expect_failure([&] { read(bad); }, "configuration c.json: ");
  }
}

TEST(SettingsTest, ConfigurationsOfTheRepositoryAreGood) {
  for (const auto& file : std::filesystem::directory_iterator(LLMCACHE_BENCH_CONFIGS)) {
    EXPECT_NO_THROW(read_configuration(file.path(), {})) << file.path();
    EXPECT_NO_THROW(read_configuration(file.path().stem(), {})) << file.path();
  }
  EXPECT_EQ(needs_text(read_configuration(std::filesystem::path("first-run"), {})),
            "models bench\nworkloads banking77 chat generate-128 openbookqa small-edits-256 squad wikitext\nsample "
            "\nbudgets yes\n");
}

TEST(SettingsTest, NeedsAreModelsAndWorkloadsThatAreMade) {
  const auto needs = [](const Values& options) {
    return needs_text(read_configuration(std::string_view("{}"), "none", options));
  };
  EXPECT_EQ(needs({{"model", {"a", "b/c.pt"}}, {"workload", {"openbookqa-5shot", "squad"}}}),
            "models a\nworkloads openbookqa-5shot squad\nsample \nbudgets \n");
  EXPECT_EQ(needs({{"model", {"b/c.pt"}}, {"fidelity", {"budget"}}}), "models \nworkloads \nsample \nbudgets yes\n");
}

TEST(SettingsTest, TheSampleOfWeightsIsOneForTheWholeRun) {
  EXPECT_EQ(needs_text(read_configuration(std::string_view("{}"), "none", {{"weights-sample", {"sample-articles"}}})),
            "models bench\nworkloads \nsample sample-articles\nbudgets \n");
  expect_failure(
      [] {
        read_configuration(std::string_view(R"({"experiments": [{"workloads": ["squad"],
                                                 "settings": {"weights-sample": "chat"}}]})"),
                           "own", {});
      },
      "'weights-sample' is a setting of the whole run");
}

TEST(SettingsTest, CacheLayers) {
  EXPECT_THAT(parse_cache_layers("all", 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(parse_cache_layers("last", 3), ElementsAre(2));
  EXPECT_THAT(parse_cache_layers("2,0,2", 3), ElementsAre(0, 2));
  expect_failure([] { parse_cache_layers("0,3", 3); }, "no layer 3, its layers are 0 to 2");
  expect_failure([] { parse_cache_layers("99999999999999999999", 3); }, "no layer");
}

/// "mode/fidelity threshold eviction capacity" of each setting.
std::vector<std::string> names(const std::vector<RunConfig>& all) {
  std::vector<std::string> texts;
  for (const RunConfig& s : all) {
    std::ostringstream text;
    text << s.mode << '/' << s.fidelity << ' ' << s.threshold.value_or(0) << ' ' << s.eviction << ' '
         << s.capacity_mib.value_or(0);
    if (s.weights != "as-loaded") text << ' ' << s.weights;
    texts.push_back(text.str());
  }
  return texts;
}

TEST(RunConfigTest, SimilarityRunsWhereItsQualityCanBeSeen) {
  Settings wanted;
  wanted.thresholds = {0.8, 0.9};
  EXPECT_THAT(names(run_configs(wanted, {})), ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024"));
  EXPECT_THAT(
      names(run_configs(wanted, {.quality = true})),
      ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                  "llmcache/threshold 0.9 lru 1024", "semantic-cache/ 0.8 lru 1024", "semantic-cache/ 0.9 lru 1024"));
  wanted.given.insert("threshold");
  EXPECT_THAT(names(run_configs(wanted, {})),
              ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                          "llmcache/threshold 0.9 lru 1024"));
  wanted.modes = {"semantic-cache"};
  EXPECT_THAT(run_configs(wanted, {}), IsEmpty());
  wanted.given.insert("mode");
  EXPECT_EQ(run_configs(wanted, {}).size(), 2U);
}

TEST(RunConfigTest, DecodersHaveKvcacheAndGenerationIsLossless) {
  Settings wanted;
  EXPECT_THAT(names(run_configs(wanted, {.prefix_reuse = true})),
              ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "llmcache/lossless 0  1024"));
  EXPECT_EQ(names(run_configs(wanted, {.quality = true, .prefix_reuse = true})),
            names(run_configs(wanted, {.prefix_reuse = true})));
  wanted.given.insert("threshold");
  wanted.given.insert("mode");
  EXPECT_EQ(run_configs(wanted, {.quality = true, .prefix_reuse = true}).size(), 3U + 3 + 3);
  wanted.fidelities = {"identical", "lossless", "threshold"};
  wanted.capacities_mib = {64, 128};
  EXPECT_THAT(
      names(run_configs(wanted, {.prefix_reuse = true, .generation = true})),
      ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "llmcache/lossless 0  64", "llmcache/lossless 0  128"));
  wanted.modes = {"semantic-cache"};
  EXPECT_THAT(run_configs(wanted, {.prefix_reuse = true, .generation = true}), IsEmpty());
}

TEST(RunConfigTest, WeightsAreHeldInEachWay) {
  Settings wanted;
  wanted.weights = {"as-loaded", "packed-fp16"};
  wanted.thresholds = {0.8};
  wanted.given = {"threshold", "mode"};
  EXPECT_THAT(names(run_configs(wanted, {.quality = true, .prefix_reuse = true})),
              ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "kvcache/lossless 0  1024 packed-fp16",
                          "llmcache/lossless 0  1024", "llmcache/lossless 0  1024 packed-fp16",
                          "llmcache/threshold 0.8 lru 1024", "llmcache/threshold 0.8 lru 1024 packed-fp16",
                          "semantic-cache/ 0.8 lru 1024"));
}

TEST(RunConfigTest, EveryCombinationOnce) {
  Settings wanted;
  wanted.modes = {"llmcache"};
  wanted.fidelities = {"threshold"};
  wanted.thresholds = {0.8};
  wanted.evictions = {"gdsf", "lru"};
  wanted.capacities_mib = {1, 2};
  EXPECT_THAT(names(run_configs(wanted, {.quality = true})),
              ElementsAre("llmcache/threshold 0.8 gdsf 1", "llmcache/threshold 0.8 lru 1",
                          "llmcache/threshold 0.8 gdsf 2", "llmcache/threshold 0.8 lru 2"));
}

TEST(RunConfigTest, ThePapersModeStandsBesideEachBudget) {
  Settings wanted;
  wanted.modes = {"llmcache"};
  wanted.fidelities = {"budget"};
  wanted.epsilons = {0.01, 0.02};
  wanted.early_exits = {"neighbour", "cache-free"};
  const Possible encoder{.quality = true, .budget = true};
  EXPECT_EQ(run_configs(wanted, encoder).size(), 4U);
  wanted.equal_error = true;
  const auto all = run_configs(wanted, encoder);
  ASSERT_EQ(all.size(), 6U);
  EXPECT_EQ(all[4].fidelity, "threshold");
  EXPECT_EQ(all[4].equal_error, 0.01);
  EXPECT_EQ(all[5].equal_error, 0.02);
  EXPECT_EQ(all[5].capacity_mib, all[0].capacity_mib);
  EXPECT_EQ(run_configs(wanted, {.quality = true}).size(), 0U);
}

TEST(RunConfigTest, BudgetsRunOnEachPartOfTheCalibration) {
  Settings wanted;
  wanted.modes = {"llmcache"};
  wanted.fidelities = {"budget"};
  wanted.epsilons = {0.05};
  wanted.early_exits = {"neighbour"};
  EXPECT_FALSE(run_configs(wanted, {.budget = true})[0].calibration_part.has_value());
  wanted.calibration_parts = 3;
  const auto all = run_configs(wanted, {.budget = true});
  ASSERT_EQ(all.size(), 3U);
  EXPECT_EQ(all[2].calibration_part, 3);
}

}  // namespace
}  // namespace llmcache::bench
