// Options.weights: linear layers on packed weights, the memory that goes with the unpacked ones, and what is refused.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <iostream>
#include <limits>
#include <thread>
#include <tuple>

#include "model/weight_panels.h"
#include "weights_support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::vector<std::string> float32_names() {
  auto names = wrappable_names({"tiny-"});
  std::erase_if(names, [](const std::string& name) { return name.find("bf16") != std::string::npos; });
  return names;
}

class PackedWeights : public ::testing::TestWithParam<std::string> {};

TEST_P(PackedWeights, AnswersAsThePlainModule) {
  Subject& plain = subject(GetParam());
  for (const auto weights : packings()) {
    SCOPED_TRACE(to_string(weights));
    if (GetParam() == "tiny-nan" && (weights == Weights::kPackedFp16 || weights == Weights::kPackedInt8)) {
      EXPECT_THAT([&] { LayerCache<Module>(load_model(GetParam()), {.weights = weights}); },
                  ThrowsError(ErrorCode::kNotAvailable, "not finite"));
      continue;
    }
    LayerCache<Module> cache = cache_of(GetParam(), {.weights = weights});
    const auto& profile = cache.profile();
    EXPECT_EQ(profile.granularity, plain.cache.profile().granularity) << profile.to_string();
    if (GetParam() != "tiny-nan") {  // how far what is not a number spreads is the kernel's business
      EXPECT_EQ(profile.left_padding, plain.cache.profile().left_padding);
    }
    EXPECT_EQ(profile.head_tokenwise, plain.cache.profile().head_tokenwise);
    EXPECT_EQ(profile.causal, plain.cache.profile().causal);
    EXPECT_EQ(profile.weights, to_string(weights));
    EXPECT_GE(profile.packed_weights, 2U * static_cast<std::size_t>(profile.layers));
    EXPECT_GT(profile.packed_weight_bytes, 0U);
    EXPECT_GT(profile.released_weight_bytes, 0U);
    EXPECT_LT(profile.released_weight_bytes, profile.weight_bytes);
    EXPECT_NE(profile.digest, plain.cache.profile().digest);
    std::uint64_t seed = 0;
    for (const std::vector<std::int64_t>& lengths :
         std::vector<std::vector<std::int64_t>>{{1}, {17}, {5, 5}, {9, 4, 12, 1}, {0, 7, 3}, {40, 33}}) {
      for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless}) {
        SCOPED_TRACE(::testing::PrintToString(lengths) + to_string(fidelity));
        const auto request = right_padded(plain.info, lengths, ++seed);
        const auto want = run_plain(plain.plain, request.inputs);
        const auto got = cache.forward(request.inputs, {.fidelity = fidelity});
        EXPECT_TRUE(close_on_real(got, want, request, tolerance_of(weights)));
        const auto hits = cache.stats().identical_hits;
        const auto again = cache.forward(request.inputs, {.fidelity = fidelity});
        if (profile.rows_independent && profile.per_row_output && !runs_plainly(request, want)) {
          EXPECT_GT(cache.stats().identical_hits, hits);
          EXPECT_TRUE(close_on_real(again, got, request, 0));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, PackedWeights, ::testing::ValuesIn(float32_names()), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, PackedWeights, ::testing::Values("tiny-bert-sdpa.pt2", "tiny-gpt2-sdpa.pt2"),
                         test_name);

TEST(PackedWeightsModels, WhatIsPacked) {
  for (const auto weights : packings()) {
    const auto packed = [&](const char* name) { return cache_of(name, {.weights = weights}).profile().packed_weights; };
    const auto layers = [](const char* name) { return static_cast<std::size_t>(model_info(name).layers); };
    // Conv1D: c_attn, c_proj, c_fc, c_proj; and lm_head, which is tied to the embedding.
    EXPECT_EQ(packed("tiny-gpt2-sdpa"), 4 * layers("tiny-gpt2-sdpa") + 1);
    EXPECT_EQ(packed("tiny-gpt2-eager"), 4 * layers("tiny-gpt2-eager") + 1);
    EXPECT_EQ(packed("tiny-llama-sdpa"), 7 * layers("tiny-llama-sdpa") + 1);
    EXPECT_EQ(packed("tiny-bert-sdpa"), 6 * layers("tiny-bert-sdpa"));
    // One layer called several times is packed once.
    EXPECT_LE(packed("zoo-albert"), 8U);
  }
}

/// What is raised names methods of the module, which is gone.
TEST(PackedWeightsModels, AModelThatRaisesSaysWhyWithoutItsModule) {
  const auto request = right_padded(model_info("tiny-throws"), {5}, 1);
  auto bad = right_padded(model_info("tiny-throws"), {5}, 1);
  bad.ids()[0][2] = 7;
  auto plain = load_model("tiny-throws");
  const auto want = run_plain(plain, request.inputs);
  for (const auto weights : packings()) {
    SCOPED_TRACE(to_string(weights));
    LayerCache<Module> cache(load_model("tiny-throws"), {.capacity_bytes = 0, .weights = weights});
    for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless}) {
      EXPECT_THAT([&] { cache.forward(bad.inputs, {.fidelity = fidelity}); },
                  ThrowsError(ErrorCode::kModelFailed, "an input id was 7"));
      EXPECT_TRUE(
          close_on_real(cache.forward(request.inputs, {.fidelity = fidelity}), want, request, tolerance_of(weights)));
    }
  }
}

TEST(PackedWeightsModels, MemoryGoesWithTheCallersModule) {
  for (const char* name : {"minilm", "tiny-gpt2-sdpa"}) {
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(name) + " " + to_string(weights));
      const auto tensors = std::make_shared<TensorBytes>();
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, tensors);
      auto module = std::make_unique<Module>(load_model(name));
      const auto loaded = tensors->live();
      LayerCache<Module> cache(*module, {.weights = weights});
      const auto& profile = cache.profile();
      EXPECT_LE(static_cast<std::int64_t>(profile.weight_bytes), loaded) << "constants are no weights";
      const auto both = tensors->live();
      // oneDNN's memory and that of panels come from the same allocator, FBGEMM's does not.
      const bool elsewhere = weights == Weights::kPackedFp16 && !WeightPanels::suit_the_cpu();
      const auto packed = elsewhere ? 0 : static_cast<std::int64_t>(profile.packed_weight_bytes);
      const auto slack = loaded / 20;
      EXPECT_NEAR(static_cast<double>(both), static_cast<double>(loaded + packed), static_cast<double>(slack))
          << "the caller still has his weights";
      module.reset();
      const auto released = static_cast<std::int64_t>(profile.released_weight_bytes);
      EXPECT_NEAR(static_cast<double>(tensors->live()), static_cast<double>(both - released),
                  static_cast<double>(slack));
      EXPECT_GT(released, loaded / 4);
      // It works without them.
      const auto request = right_padded(model_info(name), {9, 4}, 1);
      auto plain = load_model(name);
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request,
                                tolerance_of(weights)));
    }
  }
}

TEST(PackedWeightsModels, AnEmbeddingThatIsTiedStays) {
  LayerCache<Module> cache(load_model("tiny-gpt2-sdpa"), {.weights = Weights::kPackedFp16});
  auto module = load_model("tiny-gpt2-sdpa");
  std::size_t table = 0;
  std::size_t linear = 0;
  for (const auto& parameter : module.named_parameters()) {
    if (parameter.name.find("wte") != std::string::npos) table = parameter.value.nbytes();
    const bool conv1d = parameter.name.find(".c_") != std::string::npos && parameter.value.dim() == 2;
    if (conv1d) linear += parameter.value.nbytes();
  }
  ASSERT_GT(table, 0U);
  ASSERT_GT(linear, 0U);
  const auto& profile = cache.profile();
  EXPECT_GE(profile.released_weight_bytes, linear);
  EXPECT_LE(profile.released_weight_bytes, profile.weight_bytes - table);
}

TEST(PackedWeightsModels, TheCallersModuleStaysAsItWas) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-scripted", "tiny-bert-eager"}) {
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(name) + " " + to_string(weights));
      auto module = load_model(name);
      const auto request = right_padded(subject(name).info, {9, 4, 12}, 1);
      const auto want = run_plain(subject(name).plain, request.inputs);
      LayerCache<Module> cache(module, {.weights = weights});
      EXPECT_TRUE(same_bits(run_plain(module, request.inputs), want));
      LayerCache<Module> other(module);
      EXPECT_TRUE(same_bits(other.forward(request.inputs, {.fidelity = Fidelity::kIdentical}), want));
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance_of(weights)));
      EXPECT_TRUE(same_bits(run_plain(module, request.inputs), want));
    }
  }
}

TEST(PackedWeightsModels, ChangesOfWhatIsStillHeldAreNoticed) {
  const auto request = right_padded(model_info("tiny-scripted"), {9, 4}, 1);
  const auto linear_weight = [](const Module& module) {
    for (const auto& parameter : module.named_parameters()) {
      if (parameter.value.dim() == 2 && parameter.name.find("layers.") == 0) return parameter.value;
    }
    throw std::runtime_error("no weight");
  };
  {
    auto module = load_model("tiny-scripted");
    LayerCache<Module> cache(module, {.weights = Weights::kPackedFp16});
    cache.forward(request.inputs);
    module.attr("norm").toModule().attr("bias").toTensor().add_(1);
    EXPECT_THAT([&] { cache.forward(request.inputs); }, ThrowsError(ErrorCode::kModelChanged, "'norm.bias'"));
  }
  {
    auto module = load_model("tiny-scripted");
    LayerCache<Module> cache(module, {.weights = Weights::kPackedFp16});
    linear_weight(module).mul_(2);  // a packed one
    EXPECT_THAT([&] { cache.forward(request.inputs); }, ThrowsError(ErrorCode::kModelChanged, "written to"));
  }
  {
    auto module = load_model("tiny-scripted");
    LayerCache<Module> cache(module, {.weights = Weights::kPackedFp32});
    module.to(at::kBFloat16);
    EXPECT_THAT([&] { cache.forward(request.inputs); }, ThrowsError(ErrorCode::kModelChanged, "BFloat16"));
  }
  {
    // What is put in a tensor's place, and training mode, are the caller's own affair.
    auto module = load_model("tiny-scripted");
    LayerCache<Module> cache(module, {.capacity_bytes = 0, .weights = Weights::kPackedFp32});
    const auto before = cache.forward(request.inputs);
    module.attr("norm").toModule().setattr("bias", at::ones({64}));
    module.train();
    EXPECT_TRUE(same_bits(cache.forward(request.inputs), before));
  }
}

TEST(PackedWeightsModels, EntriesOfOtherWeightsAreNotTheSameModel) {
  std::vector<std::string> digests;
  auto formats = packings();
  formats.insert(formats.begin(), Weights::kAsLoaded);
  for (const auto weights : formats) {
    const auto digest = [&] {
      return LayerCache<Module>(load_model("tiny-scripted"), {.weights = weights}).profile().digest;
    };
    EXPECT_EQ(digest(), digest()) << to_string(weights);
    EXPECT_THAT(digests, Not(Contains(digest())));
    digests.push_back(digest());
  }
}

TEST(PackedWeightsModels, ProfileTellsTheMemory) {
  const LayerCache<Module> cache(load_model("minilm"), {.weights = Weights::kPackedFp16});
  EXPECT_THAT(cache.profile().to_string(),
              AllOf(HasSubstr("packed-fp16"), HasSubstr("linear layers"), HasSubstr("MiB of the weights released")));
  const auto& plain = subject("tiny-scripted").cache.profile();
  EXPECT_EQ(plain.weights, "as-loaded");
  EXPECT_EQ(plain.packed_weights + plain.packed_weight_bytes + plain.released_weight_bytes, 0U);
  EXPECT_THAT(plain.to_string(), Not(HasSubstr("packed weights")));
}

TEST(PackedWeightsModels, SomeTokensRecomputed) {
  for (const auto weights : packings()) {
    LayerCache<Module> cache = cache_of("tiny-bert-sdpa", {.weights = weights});
    const auto request = right_padded(model_info("tiny-bert-sdpa"), {12}, 1);
    Donors donors;
    const auto full = cache.forward_plan(request.inputs, cache.full_plan(request.inputs), {}, &donors);
    Plan plan{1, 12, static_cast<std::int32_t>(cache.profile().layers), {}};
    plan.sequences.push_back(compute_some(0, 0, 12, static_cast<std::int32_t>(cache.profile().layers), {9, 10, 11}, 0));
    // Where a rounding turns out otherwise, the difference grows to that of the format.
    const double allowed = PackedLinear::finishes(weights) ? tolerance_of(weights) : 1e-4;
    EXPECT_TRUE(close_on_real(cache.forward_plan(request.inputs, plan, donors), full, request, allowed));
  }
}

TEST(PackedWeightsModels, ThresholdMode) {
  for (const auto weights : packings()) {
    Options options{.fidelity = Fidelity::kThreshold, .weights = weights};
    options.threshold.tau = 0.999;
    LayerCache<Module> cache(load_model("tiny-bert-sdpa"), options);
    auto request = right_padded(model_info("tiny-bert-sdpa"), {20}, 1);
    const auto first = cache.forward(request.inputs);
    const auto want = run_plain(subject("tiny-bert-sdpa").plain, request.inputs);
    EXPECT_TRUE(close_on_real(first, want, request, tolerance_of(weights)));
    const auto again = cache.forward(request.inputs);
    EXPECT_EQ(cache.last_report().sequences.at(0).source, Source::kSimilar);
    EXPECT_TRUE(close_on_real(again, want, request, tolerance_of(weights)));
  }
}

TEST(PackedWeightsModels, ManyThreads) {
  for (const auto weights : packings()) {
    LayerCache<Module> cache = cache_of("tiny-gpt2-sdpa", {.capacity_bytes = 0, .weights = weights});
    const auto request = right_padded(model_info("tiny-gpt2-sdpa"), {11, 6}, 1);
    const auto want = cache.forward(request.inputs);
    std::vector<std::thread> threads;
    std::vector<int> wrong(4, 0);
    for (int& count : wrong) {
      threads.emplace_back([&cache, &request, &want, &count] {
        for (int i = 0; i < 20; ++i) count += same_bits(cache.forward(request.inputs), want) ? 0 : 1;
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_THAT(wrong, ::testing::Each(0));
  }
}

// --- modules made here ------------------------------------------------------------------------------

TEST(PackedWeightsModels, MatmulWithAnAttribute) {
  const Script script;
  for (const auto weights : packings()) {
    auto module = make_module(script);
    LayerCache<Module> cache(module, {.weights = weights});
    EXPECT_EQ(cache.profile().packed_weights, 6U * 3);
    const auto request = right_padded(script_info(script), {9, 4}, 1);
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request,
                              tolerance_of(weights)));
  }
}

TEST(PackedWeightsModels, TransposesAndBranches) {
  Script script;
  script.layer = Script::with(script.layer, "torch.matmul(x, self.wq)", "torch.matmul(x, self.wq.t())");
  script.layer = Script::with(script.layer, "torch.matmul(x, self.wk)", "torch.matmul(x, self.wk.transpose(-1, 0))");
  script.layer = Script::with(script.layer, "torch.matmul(x, self.wv)", "torch.matmul(x, self.wk)");
  script.layer = Script::with(
      script.layer, "    return x +",
      "    if x.size(1) > 3:\n        x = x + torch.matmul(x, self.wo)\n    else:\n        x = x * 2\n    return x +");
  for (const auto weights : packings()) {
    auto module = make_module(script);
    LayerCache<Module> cache(module, {.weights = weights});
    EXPECT_EQ(cache.profile().packed_weights, 6U * 3) << "wq', wk', wk, wo, up, down";
    for (const std::int64_t length : {2, 9}) {
      const auto request = right_padded(script_info(script), {length}, 1);
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request,
                                tolerance_of(weights)));
    }
  }
}

/// What stands behind products is done with them.
TEST(PackedWeightsModels, WhatStandsBehindALayer) {
  const std::string product = "torch.matmul(torch.tanh(torch.matmul(x, self.up)), self.down)";
  for (const char* inner : {
           "torch.relu(torch.matmul(x, self.up))",
           "torch.silu(torch.matmul(x, self.up))",
           "torch.gelu(torch.matmul(x, self.up))",
           "torch.gelu(torch.matmul(x, self.up), approximate=\"tanh\")",
           "torch.dropout(torch.matmul(x, self.up), 0.1, False)",
           "torch.relu(torch.matmul(x, self.up).view([x.size(0), x.size(1), 4, -1])).flatten(2)",
           "torch.relu(torch.matmul(x, self.up)) + torch.matmul(x * 0.5, self.up)",
           "torch.add(torch.matmul(x, self.up), torch.matmul(x * 0.5, self.up), alpha=3)",
       }) {
    Script script;
    script.layer = Script::with(script.layer, product, "torch.matmul(" + std::string(inner) + ", self.down)");
    const auto granularity = LayerCache<Module>(make_module(script)).profile().granularity;
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(inner) + " " + to_string(weights));
      auto module = make_module(script);
      LayerCache<Module> cache(module, {.weights = weights});
      EXPECT_EQ(cache.profile().granularity, granularity) << cache.profile().to_string();
      const auto request = right_padded(script_info(script), {9, 4}, 1);
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request,
                                tolerance_of(weights)));
    }
  }
}

TEST(PackedWeightsModels, AKnownPrefix) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-llama-sdpa"}) {
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(name) + " " + to_string(weights));
      LayerCache<Module> cache = cache_of(name, {.weights = weights});
      EXPECT_TRUE(cache.profile().prefix_reuse) << cache.profile().to_string();
      const auto request = right_padded(model_info(name), {30}, 1);
      Inputs beginning;
      for (const auto& input : request.inputs) beginning.emplace_back(input.toTensor().narrow(1, 0, 20).contiguous());
      cache.forward(beginning);
      const auto got = cache.forward(request.inputs);
      EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 20);
      EXPECT_TRUE(close_on_real(got, run_plain(subject(name).plain, request.inputs), request, tolerance_of(weights)));
    }
  }
}

TEST(PackedWeightsModels, ModulesInBFloat16) {
  for (const char* name : {"tiny-bert-sdpa-bf16", "tiny-gpt2-eager-bf16", "tiny-llama-sdpa-bf16"}) {
    for (const auto weights : finishing()) {
      if (!takes(weights, at::kBFloat16)) continue;
      SCOPED_TRACE(std::string(name) + " " + to_string(weights));
      LayerCache<Module> cache = cache_of(name, {.weights = weights});
      EXPECT_EQ(cache.profile().granularity, subject(name).cache.profile().granularity) << cache.profile().to_string();
      const auto request = right_padded(model_info(name), {9, 4, 12}, 1);
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(subject(name).plain, request.inputs), request,
                                tolerance_of(weights)));
    }
  }
}

/// Of LibTorch's products in half precision some CPUs have slow ones only. The packed ones sum in float32, so that they
/// are compared with the module in float32 too.
TEST(PackedWeightsModels, ModulesInHalfPrecision) {
  const Script script;
  const auto in_half = [&] {
    auto module = make_module(script);
    module.to(at::kHalf);
    return module;
  };
  LayerCache<Module> loaded(in_half());
  auto wide = in_half();
  wide.to(at::kFloat);
  for (const auto weights : finishing()) {
    SCOPED_TRACE(to_string(weights));
    auto module = in_half();
    LayerCache<Module> cache(module, {.weights = weights});
    EXPECT_EQ(cache.profile().granularity, loaded.profile().granularity) << cache.profile().to_string();
    EXPECT_EQ(cache.profile().packed_weights, 6U * 3);
    const auto request = right_padded(script_info(script), {9, 4, 12}, 1);
    const auto got = cache.forward(request.inputs);
    EXPECT_EQ(got.toTensor().scalar_type(), at::kHalf);
    EXPECT_TRUE(close_on_real(got, run_plain(module, request.inputs), request, tolerance_of(weights)));
    EXPECT_TRUE(
        close_on_real(got.toTensor().to(at::kFloat), run_plain(wide, request.inputs), request, tolerance_of(weights)));
  }
}

TEST(PackedWeightsModels, MemoryIsWhatTheBitsSay) {
  const auto share = [](Weights weights) {
    const ModelProfile profile = LayerCache<Module>(load_model("minilm"), {.weights = weights}).profile();
    return static_cast<double>(profile.packed_weight_bytes) / static_cast<double>(profile.released_weight_bytes);
  };
  EXPECT_NEAR(share(Weights::kPackedBFloat16), 0.5, 0.015);
  EXPECT_NEAR(share(Weights::kPackedInt8), 0.26, 0.015);
  if (WeightPanels::suit_the_cpu()) {
    EXPECT_NEAR(share(Weights::kPackedFp16), 0.5, 0.015);
  }
}

TEST(PackedWeightsModels, TheFastestIsOneOfTheOthers) {
  LayerCache<Module> cache(load_model("minilm"), {.weights = Weights::kFastest});
  const auto& profile = cache.profile();
  EXPECT_THAT(profile.weights, ::testing::AnyOf("as-loaded", "packed-fp32", "packed-fp16", "packed-bf16"));
  EXPECT_THAT(profile.weights_reason, HasSubstr("packed-int8 may not be chosen"));
  EXPECT_THAT(profile.to_string(), HasSubstr("weights chosen"));
  const auto request = right_padded(model_info("minilm"), {9, 4}, 1);
  auto plain = load_model("minilm");
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request,
                            tolerance_of(Weights::kPackedBFloat16)));
  const Options any{.weights = Weights::kFastest, .fastest_may_be_int8 = true};
  EXPECT_THAT(LayerCache<Module>(load_model("minilm"), any).profile().weights_reason, Not(HasSubstr("int8")));
  EXPECT_THAT(subject("tiny-scripted").cache.profile().weights_reason, IsEmpty());
}

TEST(PackedWeightsModels, NothingToPackIsANote) {
  Script script;
  for (const char* name : {"wq", "wk", "wv", "wo", "up", "down"}) {
    script.layer = Script::with(script.layer, std::string("self.") + name, std::string("(self.") + name + " * 1.0)");
  }
  auto module = make_module(script);
  LayerCache<Module> cache(module, {.weights = Weights::kPackedFp32});
  EXPECT_EQ(cache.profile().packed_weights, 0U);
  EXPECT_THAT(cache.profile().notes, Contains(HasSubstr("no linear layer was found")));
  const auto request = right_padded(script_info(script), {9, 4}, 1);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request, 1e-4));
}

TEST(PackedWeightsModels, AWeightThatHalfPrecisionCannotHoldIsNamed) {
  for (const double bad : {1e6, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    auto module = make_module({});
    module.attr("l1").toModule().attr("up").toTensor()[3][4].fill_(bad);
    EXPECT_THAT([&] { LayerCache<Module>(module, {.weights = Weights::kPackedFp16}); },
                ThrowsError(ErrorCode::kNotAvailable, "'l1.up'"));
  }
}

TEST(PackedWeightsModels, OtherTypesAreRefused) {
  for (const auto weights : {Weights::kPackedFp32, Weights::kPackedFp16}) {
    for (const char* name : {"tiny-bert-sdpa-bf16", "tiny-gpt2-eager-bf16"}) {
      EXPECT_THAT([&] { LayerCache<Module>(load_model(name), {.weights = weights}); },
                  ThrowsError(ErrorCode::kNotAvailable, "BFloat16"));
    }
  }
}

/// Keeps its weights to itself.
struct Opaque {
  Activations embed(const Inputs& inputs) const {
    return {at::one_hot(inputs.at(0).toTensor().to(at::kLong), 4).to(at::kFloat), nullptr};
  }
  std::int64_t layers() const { return 1; }
  void layer(std::int64_t /*i*/, Activations& activations) const { activations.hidden = activations.hidden * 2; }
  c10::IValue head(Activations& activations) const { return activations.hidden; }
  at::Device device() const { return at::kCPU; }
  at::ScalarType dtype() const { return at::kFloat; }
  std::string digest() const { return "opaque"; }
};

TEST(PackedWeightsModels, OtherKindsOfModelAreRefused) {
  for (const auto weights : packings()) {
    EXPECT_THAT([&] { LayerCache<Opaque>(Opaque(), {.weights = weights}); },
                ThrowsError(ErrorCode::kNotAvailable, "Options.weights is packed"));
  }
  EXPECT_EQ(LayerCache<Opaque>(Opaque()).profile().weights, "as-loaded");
  EXPECT_EQ(LayerCache<Opaque>(Opaque(), {.weights = Weights::kFastest}).profile().weights, "as-loaded");
}

TEST(PackedWeightsModels, Names) {
  for (const auto weights : {Weights::kAsLoaded, Weights::kPackedFp32, Weights::kPackedFp16, Weights::kPackedBFloat16,
                             Weights::kPackedInt8, Weights::kFastest}) {
    EXPECT_EQ(weights_from_string(to_string(weights)), weights);
  }
  EXPECT_THAT([] { weights_from_string("fp16"); }, ThrowsError(ErrorCode::kInvalidOptions, "'fp16'"));
  EXPECT_THAT([] { Options{.weights = static_cast<Weights>(9)}.validate(); },
              ThrowsError(ErrorCode::kInvalidOptions, "Options.weights is 9"));
}

}  // namespace
}  // namespace llmcache::test
