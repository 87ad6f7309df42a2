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

#include "arguments.h"
#include "bench_support.h"
#include "budget.h"
#include "first_run.h"
#include "model_files.h"
#include "selection.h"
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
    arguments_.models_folder = folder_ / "models";
    arguments_.data_folder = folder_ / "data";
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
    const Json sidecar = {{"weights", weights},
                          {"tokenizer", "t"},
                          {"family", "decoder"},
                          {"dtype", "float32"},
                          {"vocab", 10},
                          {"max_tokens", 64},
                          {"bytes", 1},
                          {"versions", {{"torch", "2"}, {"transformers", "5"}}}};
    std::ofstream(folder_ / "models/m.json") << sidecar;
    std::vector<std::string> names;
    const auto selected = select(arguments_);
    for (const auto& workload : selected.front().workloads) names.push_back(workload->workload);
    return names;
  }

  const Folder folder_;
  Arguments arguments_;
  std::string task_;
};

TEST_F(ChoiceTest, ByDefault) {
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "generate-512", "openbookqa", "squad"));
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("generate-128", "openbookqa", "squad"));
  arguments_.shots = 5;
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "generate-512", "openbookqa-5shot", "squad"));
}

TEST(FirstRunTest, MeasuresWhatAUserWouldChoose) {
  const Arguments none;
  const auto model_of = [](const char* name, const char* family) {
    ModelFile model;
    model.name = name;
    model.weights = "pypi:x 1";
    model.family = family;
    return model;
  };
  ModelFile encoder = model_of("minilm-pooled", "encoder");
  const auto fidelities = [](const Part& part) { return part.arguments.fidelities; };
  const auto questions = first_run(none, encoder, "sample-faq", true);
  ASSERT_EQ(questions.size(), 3U);
  EXPECT_THAT(fidelities(questions[0]), ElementsAre("lossless", "budget", "threshold"));
  EXPECT_THAT(questions[0].arguments.epsilons, ElementsAre(0.02));
  EXPECT_TRUE(questions[0].arguments.equal_error);
  EXPECT_EQ(questions[1].arguments.thresholds.size(), 5U);
  EXPECT_EQ(questions[2].arguments.capacities_mib.size(), 4U);
  EXPECT_EQ(first_run(none, encoder, "banking77", true).size(), 3U) << "real data as the sample of their kind";
  EXPECT_TRUE(first_run(none, encoder, "sample-faq", false).empty()) << "no probe, nothing to judge answers by";
  EXPECT_EQ(first_run(none, encoder, "sample-edits-200", false)[0].arguments.metric, "relative");

  ModelFile decoder = model_of("smollm2", "decoder");
  for (const char* name : {"sample-chat", "squad", "sample-choices", "wikitext", "generate-128"}) {
    const auto parts = first_run(none, decoder, name, false);
    ASSERT_EQ(parts.size(), 1U) << name;
    EXPECT_THAT(parts[0].arguments.modes, ElementsAre("nocache", "kvcache", "llmcache"));
    EXPECT_THAT(fidelities(parts[0]), ElementsAre("lossless"));
  }
  decoder.weights = encoder.weights = "random (seed 0)";
  for (const ModelFile& model : {encoder, decoder}) {
    for (const char* name : {"wikitext", "sample-documents", "openbookqa"}) {  // the paper's nine cells
      const auto parts = first_run(none, model, name, false);
      ASSERT_EQ(parts.size(), 1U) << name;
      EXPECT_TRUE(parts[0].arguments.doccache_asked && parts[0].arguments.threshold_asked);
    }
    EXPECT_TRUE(first_run(none, model, "sample-faq", false).empty());
  }
}

TEST_F(ChoiceTest, WithoutOptionsRealDataComeBeforeTheSample) {
  arguments_.first_run = true;
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "openbookqa", "squad"));
  file("sample-articles");
  file("sample-chat");
  EXPECT_THAT(chosen("hub:x"), ElementsAre("chat", "generate-128", "openbookqa", "sample-articles", "squad"));
}

TEST_F(ChoiceTest, ByName) {
  arguments_.workloads = {"generate", "openbookqa"};
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("generate-128", "generate-512", "openbookqa"));
  arguments_.workloads = {"openbookqa-20shot", "chat", "generate-512"};
  EXPECT_THAT(chosen("random (seed 0)"), ElementsAre("openbookqa-20shot", "chat", "generate-512"));
  for (const char* name : {"gen", "generate-", "openbookqa-3shot", "generate-64"}) {
    arguments_.workloads = {name};
    expect_failure([&] { chosen("hub:x"); }, std::string("no workload '") + name + "'");
  }
}

TEST_F(ChoiceTest, InBatchesOfTheAskedSize) {
  arguments_.batch = 3;
  arguments_.workloads = {"squad"};
  EXPECT_THAT(chosen("hub:x"), ElementsAre("squad"));
  EXPECT_THAT(select(arguments_).front().workloads.front()->request_offsets, ElementsAre(0, 1));
  task_ = "perplexity";
  file("squad");
  expect_failure([&] { chosen("hub:x"); }, "--batch 3: the requests of squad");
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
  file.scored = {{1, 2}};
  EXPECT_EQ(cell_weight(model, file, false), 2);
  file.task = Task::kAnswer;
  EXPECT_EQ(cell_weight(model, file, false), 2);
  file.scored.clear();
  EXPECT_EQ(cell_weight(model, file, false), 1) << "an encoder's";
  file.task = Task::kGeneration;
  EXPECT_EQ(cell_weight(model, file, false), 1);
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
  EXPECT_FALSE(arguments.first_run);
  EXPECT_FALSE(parse({"--limit", "3"}).first_run);
  EXPECT_TRUE(parse({}).first_run);
  EXPECT_TRUE(parse({"--threads", "2", "--json", "x.json"}).first_run) << "where and how, not what";
  expect_failure([&] { parse({"--equal-error"}); }, "name budget in --fidelity");
  expect_failure([&] { parse({"--bank-format", "int8", "--fidelity", "lossless"}); }, "name budget in --fidelity");
  EXPECT_TRUE(parse({"--equal-error", "--fidelity", "lossless,budget"}).equal_error);
  EXPECT_FALSE(parse({}).threshold_asked);
  EXPECT_FALSE(parse({}).doccache_asked);
  EXPECT_TRUE(parse({"--threshold", "0.5"}).threshold_asked);
  EXPECT_TRUE(parse({"--mode", "doccache"}).doccache_asked);
  EXPECT_THAT(parse({"--threshold", "0.9,-1", "--threshold", "0.9"}).thresholds, ElementsAre(-1, 0.9));
  EXPECT_THAT(parse({"--capacity-mib", "64,1,64"}).capacities_mib, ElementsAre(1, 64));
  EXPECT_FALSE(parse({"--centre", "off"}).centre);
  EXPECT_FALSE(parse({}).kvcache_asked);
  EXPECT_TRUE(parse({}).has_mode("kvcache"));
  EXPECT_FALSE(parse({"--mode", "llmcache"}).kvcache_asked);
  EXPECT_TRUE(parse({"--mode", "kvcache"}).kvcache_asked);
  EXPECT_THAT(parse({"--weights", "packed-fp16,as-loaded,packed-fp16"}).weights,
              ElementsAre("as-loaded", "packed-fp16"));
  EXPECT_FALSE(parse({}).output.has_value());
  EXPECT_EQ(parse({"--output", "new"}).output, "new");
  EXPECT_EQ(parse({"--shots", "5"}).shots, 5);
  EXPECT_FALSE(parse({}).batch.has_value());
  EXPECT_EQ(parse({"--batch", "32"}).batch, 32);
  EXPECT_THAT(parse({"--shots", "5", "--workload", "squad,openbookqa"}).workloads,
              ElementsAre("squad", "openbookqa-5shot"));
  EXPECT_THAT(parse({"--shots", "0", "--workload", "openbookqa"}).workloads, ElementsAre("openbookqa"));
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
                                                                                   {"--weights", "int8"},
                                                                                   {"--weights", "as-loaded,x"},
                                                                                   {"--output", "first"},
                                                                                   {"--output", "all,new"},
                                                                                   {"--batch", "0"},
                                                                                   {"--batch", "1,8"},
                                                                                   {"--shots", "-1"},
                                                                                   {"--shots", "100"},
                                                                                   {"--shots", "1.5"},
                                                                                   {"--shots", "5", "--workload=squad"},
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
    if (s.weights != "as-loaded") text << ' ' << s.weights;
    texts.push_back(text.str());
  }
  return texts;
}

TEST(SettingsTest, SimilarityRunsWhereItsQualityCanBeSeen) {
  Arguments arguments;
  arguments.thresholds = {0.8, 0.9};
  EXPECT_THAT(names(settings(arguments, {})), ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024"));
  EXPECT_THAT(names(settings(arguments, {.quality = true})),
              ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                          "llmcache/threshold 0.9 lru 1024", "doccache/ 0.8 lru 1024", "doccache/ 0.9 lru 1024"));
  arguments.threshold_asked = true;
  EXPECT_THAT(names(settings(arguments, {})),
              ElementsAre("nocache/ 0  0", "llmcache/lossless 0  1024", "llmcache/threshold 0.8 lru 1024",
                          "llmcache/threshold 0.9 lru 1024"));
  arguments.modes = {"doccache"};
  EXPECT_THAT(settings(arguments, {}), IsEmpty());
  arguments.doccache_asked = true;
  EXPECT_EQ(settings(arguments, {}).size(), 2U);
}

TEST(SettingsTest, DecodersHaveKvcacheAndGenerationIsLossless) {
  Arguments arguments;
  EXPECT_THAT(names(settings(arguments, {.prefix_reuse = true})),
              ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "llmcache/lossless 0  1024"));
  EXPECT_EQ(names(settings(arguments, {.quality = true, .prefix_reuse = true})),
            names(settings(arguments, {.prefix_reuse = true})));
  arguments.threshold_asked = true;
  arguments.doccache_asked = true;
  EXPECT_EQ(settings(arguments, {.quality = true, .prefix_reuse = true}).size(), 3U + 3 + 3);
  arguments.fidelities = {"identical", "lossless", "threshold"};
  arguments.capacities_mib = {64, 128};
  EXPECT_THAT(
      names(settings(arguments, {.prefix_reuse = true, .generation = true})),
      ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "llmcache/lossless 0  64", "llmcache/lossless 0  128"));
  arguments.modes = {"doccache"};
  EXPECT_THAT(settings(arguments, {.prefix_reuse = true, .generation = true}), IsEmpty());
}

TEST(SettingsTest, WeightsAreHeldInEachWay) {
  Arguments arguments;
  arguments.weights = {"as-loaded", "packed-fp16"};
  arguments.thresholds = {0.8};
  arguments.threshold_asked = arguments.doccache_asked = true;
  EXPECT_THAT(names(settings(arguments, {.quality = true, .prefix_reuse = true})),
              ElementsAre("nocache/ 0  0", "kvcache/lossless 0  1024", "kvcache/lossless 0  1024 packed-fp16",
                          "llmcache/lossless 0  1024", "llmcache/lossless 0  1024 packed-fp16",
                          "llmcache/threshold 0.8 lru 1024", "llmcache/threshold 0.8 lru 1024 packed-fp16",
                          "doccache/ 0.8 lru 1024"));
}

TEST(SettingsTest, EveryCombinationOnce) {
  Arguments arguments;
  arguments.modes = {"llmcache"};
  arguments.fidelities = {"threshold"};
  arguments.thresholds = {0.8};
  arguments.evictions = {"gdsf", "lru"};
  arguments.capacities_mib = {1, 2};
  EXPECT_THAT(names(settings(arguments, {.quality = true})),
              ElementsAre("llmcache/threshold 0.8 gdsf 1", "llmcache/threshold 0.8 lru 1",
                          "llmcache/threshold 0.8 gdsf 2", "llmcache/threshold 0.8 lru 2"));
}

TEST(SettingsTest, ThePapersModeStandsBesideEachBudget) {
  Arguments arguments;
  arguments.modes = {"llmcache"};
  arguments.fidelities = {"budget"};
  arguments.epsilons = {0.01, 0.02};
  arguments.early_exits = {"neighbour", "cache-free"};
  const Possible encoder{.quality = true, .budget = true};
  EXPECT_EQ(settings(arguments, encoder).size(), 4U);
  arguments.equal_error = true;
  const auto all = settings(arguments, encoder);
  ASSERT_EQ(all.size(), 6U);
  EXPECT_EQ(all[4].fidelity, "threshold");
  EXPECT_EQ(all[4].equal_error, 0.01);
  EXPECT_EQ(all[5].equal_error, 0.02);
  EXPECT_EQ(all[5].capacity_mib, all[0].capacity_mib);
  EXPECT_EQ(settings(arguments, {.quality = true}).size(), 0U);
}

}  // namespace
}  // namespace llmcache::bench
