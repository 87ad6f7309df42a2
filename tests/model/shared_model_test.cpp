// Several caches around one wrapped model (LayerCache::with_options), and caches that are moved.
#include <map>
#include <optional>
#include <thread>

#include "support.h"

namespace llmcache::test {
namespace {

using ModuleCache = LayerCache<Module>;

Options with(Fidelity fidelity) {
  Options options;
  options.fidelity = fidelity;
  options.threshold.tau = 0.9;
  return options;
}

class SharedModel : public ::testing::TestWithParam<std::string> {};

TEST_P(SharedModel, AnswersAsOneThatWasWrappedForIt) {
  const ModelInfo info = model_info(GetParam());
  std::vector<Fidelity> fidelities = {Fidelity::kIdentical, Fidelity::kLossless};
  if (subject(GetParam()).cache.profile().granularity != Granularity::kWholeLayers) {
    fidelities.push_back(Fidelity::kThreshold);
  }
  for (const Fidelity first : {Fidelity::kLossless, fidelities.back()}) {
    const ModuleCache wrapped(load_model(GetParam()), with(first));
    for (const Fidelity fidelity : fidelities) {
      ModuleCache shared = wrapped.with_options(with(fidelity));
      ModuleCache own(load_model(GetParam()), with(fidelity));
      EXPECT_EQ(shared.profile().digest, own.profile().digest);
      EXPECT_EQ(shared.profile().prefix_reuse, own.profile().prefix_reuse);
      EXPECT_EQ(shared.profile().notes, own.profile().notes);
      for (const std::uint64_t seed : {1U, 2U, 1U}) {  // known again at the end
        const auto request = right_padded(info, {9, 14, 3}, seed);
        EXPECT_TRUE(same_bits(shared.forward(request.inputs), own.forward(request.inputs)));
        for (std::size_t row = 0; row < 3; ++row) {
          EXPECT_EQ(shared.last_report().sequences[row].source, own.last_report().sequences[row].source);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, SharedModel,
                         ::testing::Values("tiny-bert-sdpa", "tiny-bert-pooled", "tiny-gpt2-eager", "tiny-llama-sdpa",
                                           "zoo-qwen3moe"),
                         test_name);

TEST(SharedModelTest, KeepsNothingInCommon) {
  ModuleCache first(load_model("tiny-llama-sdpa"));
  ModuleCache second = first.with_options({.capacity_bytes = 1U << 20});
  const auto request = right_padded(model_info("tiny-llama-sdpa"), {12}, 1);
  first.forward(request.inputs);
  second.forward(request.inputs);
  EXPECT_EQ(second.last_report().sequences[0].source, Source::kComputed);
  EXPECT_EQ(second.stats().requests, 1U);
  first.clear();
  second.forward(request.inputs);
  EXPECT_EQ(second.last_report().sequences[0].source, Source::kIdentical);
  EXPECT_LE(second.stats().peak_bytes, 1U << 20);
}

TEST(SharedModelTest, OutlivesTheCacheThatWrapped) {
  auto first = std::make_optional<ModuleCache>(load_model("tiny-gpt2-sdpa"), Options{.weights = Weights::kPackedFp32});
  ModuleCache second = first->with_options(first->options());
  first.reset();
  const auto request = right_padded(model_info("tiny-gpt2-sdpa"), {12, 5}, 1);
  Module module = load_model("tiny-gpt2-sdpa");
  EXPECT_TRUE(close_on_real(second.forward(request.inputs), run_plain(module, request.inputs), request, 1e-4));
}

TEST(SharedModelTest, WhatWrappingDependsOnMustBeTheSame) {
  const ModuleCache cache(load_model("tiny-bert-sdpa"));
  const auto refused = [&](const Options& options, const char* part) {
    EXPECT_THAT([&] { (void)cache.with_options(options); }, ThrowsError(ErrorCode::kInvalidOptions, part));
  };
  refused({.layers = "model.encoder.layer"}, "layers");
  refused({.mask_argument = -1}, "mask_argument");
  refused({.weights = Weights::kPackedFp32}, "weights");
  refused({.prefix = {.capacity_share = 2}}, "capacity_share");
}

TEST(SharedModelTest, WeightsOfASharedModelAreNotTakenAnew) {
  Module module = load_model("tiny-bert-sdpa");
  ModuleCache first(module);
  auto second = std::make_optional(first.with_options({}));
  const auto request = right_padded(model_info("tiny-bert-sdpa"), {7, 7}, 1);
  for (const at::Tensor& weight : module.parameters()) weight.mul_(0.5F);
  for (ModuleCache* cache : {&first, &*second}) {
    EXPECT_THAT([&] { cache->forward(request.inputs); }, ThrowsError(ErrorCode::kModelChanged, "changed"));
    EXPECT_THAT([&] { cache->weights_changed(); }, ThrowsError(ErrorCode::kNotAvailable, "with_options"));
  }
  second.reset();
  first.weights_changed();
  EXPECT_TRUE(same_bits(first.forward(request.inputs), run_plain(module, request.inputs)));
}

TEST(SharedModelTest, MadeAndUsedByManyThreads) {
  const ModuleCache wrapped(load_model("tiny-llama-sdpa"));
  const auto request = right_padded(model_info("tiny-llama-sdpa"), {9}, 1);
  Module module = load_model("tiny-llama-sdpa");
  const auto want = run_plain(module, request.inputs);
  std::vector<int> same(4, 0);
  std::vector<std::thread> threads;
  for (int& count : same) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        ModuleCache own = wrapped.with_options({});
        count += close_on_real(own.forward(request.inputs), want, request, 1e-4) ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(same, ::testing::Each(5));
}

TEST(MovedCacheTest, KeepsWhatItKnows) {
  const auto request = right_padded(model_info("tiny-bert-sdpa"), {9, 2}, 1);
  ModuleCache cache(load_model("tiny-bert-sdpa"), {.verify_rate = 1, .verify_in_background = true});
  const auto want = cache.forward(request.inputs);
  std::map<std::string, ModuleCache> service;  // as a member of something that moves
  service.emplace("bert", std::move(cache));
  ModuleCache& moved = service.at("bert");
  EXPECT_TRUE(same_bits(moved.forward(request.inputs), want));
  EXPECT_EQ(moved.last_report().sequences[0].source, Source::kIdentical);
  EXPECT_EQ(moved.stats().requests, 2U);
  ModuleCache other(load_model("tiny-gpt2-sdpa"));
  other = std::move(moved);
  EXPECT_TRUE(same_bits(other.forward(request.inputs), want));
}

}  // namespace
}  // namespace llmcache::test
