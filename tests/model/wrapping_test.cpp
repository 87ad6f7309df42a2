// What wrapping finds, what it refuses, what it leaves alone, and what it notices afterwards.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <functional>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::Not;

void wrap(const std::string& name, const Options& options = {}) { LayerCache<Module> cache(load_model(name), options); }

/// Resident memory of this process, in bytes. AddressSanitizer keeps what was freed: with a sanitizer it says nothing.
std::int64_t resident_bytes() {
#ifdef LLMCACHE_TESTS_SANITIZED
  return 0;
#else
  std::ifstream file("/proc/self/statm");
  std::int64_t size = 0;
  std::int64_t resident = 0;
  file >> size >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
#endif
}

std::string graphs_of(const Module& module) {
  std::string text;
  for (const Module& part : module.modules()) {
    for (const auto& method : part.get_methods()) text += method.graph()->toString(false);
  }
  return text;
}

TEST(Profile, Encoder) {
  const auto& profile = subject("tiny-bert-sdpa").cache.profile();
  EXPECT_EQ(profile.layers_path, "model.encoder.layer");
  EXPECT_EQ(profile.layers, 3);
  EXPECT_EQ(profile.hidden, 64);
  EXPECT_THAT(profile.hidden_argument, ElementsAre(0, 0, 0));
  EXPECT_THAT(profile.inputs, ElementsAre("input_ids", "attention_mask"));
  EXPECT_EQ(profile.ids_argument, 0);
  EXPECT_EQ(profile.mask_argument, 1);
  EXPECT_EQ(profile.vocabulary, 300);
  EXPECT_FALSE(profile.causal);
  EXPECT_TRUE(profile.head_tokenwise);
  EXPECT_TRUE(profile.left_padding);
  EXPECT_THAT(profile.attention, Each(Field("kind", &AttentionOp::kind, "sdpa")));
  EXPECT_EQ(profile.attention.size(), 3U);
  EXPECT_EQ(profile.device, "cpu");
  EXPECT_EQ(profile.digest.size(), 32U);
  EXPECT_GT(profile.wrap_ms, 0);
  EXPECT_THAT(profile.to_string(),
              AllOf(HasSubstr("model.encoder.layer"), HasSubstr("hidden 64"), HasSubstr("attention_mask"),
                    HasSubstr("vocabulary 300"), HasSubstr("3 (sdpa)"), HasSubstr("tokens, right and left padding"),
                    HasSubstr("token-wise"), HasSubstr("Float, cpu"), HasSubstr(profile.digest)));
}

TEST(Profile, Decoder) {
  const auto& profile = subject("tiny-llama-eager").cache.profile();
  EXPECT_EQ(profile.layers, 4);
  EXPECT_TRUE(profile.causal);
  EXPECT_TRUE(profile.head_tokenwise);
  EXPECT_THAT(profile.attention, Each(Field("kind", &AttentionOp::kind, "eager")));
  EXPECT_EQ(profile.hidden_argument.size(), 4U);
}

/// In threads that have turned TorchScript's optimisations off.
class WithoutOptimisations : public ::testing::TestWithParam<std::string> {};

TEST_P(WithoutOptimisations, AModelIsWrappedAlike) {
  auto& usual = subject(GetParam());
  const torch::jit::GraphOptimizerEnabledGuard off(false);
  LayerCache<Module> cache(load_model(GetParam()), {.capacity_bytes = 0});
  EXPECT_EQ(cache.profile().digest, usual.cache.profile().digest);
  EXPECT_EQ(cache.profile().granularity, usual.cache.profile().granularity);
  EXPECT_EQ(cache.profile().hidden_argument, usual.cache.profile().hidden_argument);
  const auto request = right_padded(usual.info, {9, 4, 7}, 1);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(usual.plain, request.inputs), request,
                            tolerance_of(usual.info)));
}

INSTANTIATE_TEST_SUITE_P(Tiny, WithoutOptimisations,
                         ::testing::Values("tiny-bert-sdpa", "tiny-distilbert-eager", "tiny-gpt2-sdpa",
                                           "tiny-llama-eager", "tiny-scripted"),
                         test_name);

TEST(Profile, FurtherInputsAndHeads) {
  const auto& types = subject("tiny-bert-types-sdpa").cache.profile();
  EXPECT_THAT(types.inputs, ElementsAre("input_ids", "attention_mask", "token_type_ids"));
  EXPECT_EQ(types.ids_argument, 0);
  EXPECT_EQ(types.mask_argument, 1);
  const auto& pooled = subject("tiny-bert-pooled").cache.profile();
  EXPECT_FALSE(pooled.head_tokenwise);
  EXPECT_THAT(pooled.notes, Contains(HasSubstr("head is not token-wise")));
  EXPECT_THAT(pooled.to_string(), AllOf(HasSubstr("on the padded batch"), HasSubstr("note: ")));
}

TEST(Profile, ScriptedLayersOfOneClass) {
  const auto& profile = subject("tiny-scripted").cache.profile();
  EXPECT_EQ(profile.layers_path, "layers");
  EXPECT_EQ(profile.layers, 3);
}

TEST(Profile, DigestsTellModelsApart) {
  const auto digest = subject("tiny-scripted").cache.profile().digest;
  EXPECT_EQ(LayerCache<Module>(load_model("tiny-scripted")).profile().digest, digest);
  EXPECT_NE(subject("tiny-scripted-eager").cache.profile().digest, digest) << "same weights, other structure";
  auto other = load_model("tiny-scripted");
  {
    const c10::NoGradGuard no_grad;
    other.attr("norm").toModule().attr("bias").toTensor()[5].add_(1e-3);
  }
  EXPECT_NE(LayerCache<Module>(other).profile().digest, digest) << "same structure, other weights";
}

TEST(Wrapping, LayersByPath) {
  const LayerCache<Module> cache(load_model("tiny-bert-sdpa"), {.layers = "model.encoder.layer"});
  EXPECT_EQ(cache.profile().layers, 3);
  EXPECT_EQ(cache.profile().layers_path, "model.encoder.layer");
  EXPECT_EQ(cache.profile().granularity, Granularity::kTokens);
}

TEST(Wrapping, OneOfSeveralLayersByPath) {
  // Everything else is then in front of the layers or behind them.
  LayerCache<Module> cache(load_model("tiny-bert-sdpa"), {.layers = "model.encoder.layer.1"});
  EXPECT_GE(cache.profile().layers, 1);
  const auto request = right_padded(subject("tiny-bert-sdpa").info, {9, 4, 12}, 1);
  const auto want = run_plain(subject("tiny-bert-sdpa").plain, request.inputs);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, 1e-4));
}

TEST(Wrapping, LayersByWrongPath) {
  for (const char* path : {"model.decoder.layer", "model.encoder.layers", "nothing"}) {
    EXPECT_THAT([&] { wrap("tiny-bert-sdpa", {.layers = path}); }, ThrowsError(ErrorCode::kUnsupportedModel, path));
  }
  for (const char* path : {".", "model.", ".model", "model..encoder"}) {
    EXPECT_THAT([&] { wrap("tiny-bert-sdpa", {.layers = path}); },
                ThrowsError(ErrorCode::kInvalidOptions, "Options.layers"));
  }
}

TEST(Wrapping, MaskArgument) {
  for (const int wrong : {-2, 0, 2, 100}) {
    EXPECT_THAT([&] { wrap("tiny-scripted", {.mask_argument = wrong}); },
                ThrowsError(ErrorCode::kInvalidOptions, "Options.mask_argument is " + std::to_string(wrong)));
  }
  EXPECT_EQ(LayerCache<Module>(load_model("tiny-scripted"), {.mask_argument = 1}).profile().mask_argument, 1);
  // Told that there is no mask, it runs everything as it is.
  LayerCache<Module> without(load_model("tiny-scripted"), {.mask_argument = -1});
  EXPECT_EQ(without.profile().mask_argument, -1);
  const auto request = right_padded(subject("tiny-scripted").info, {9, 4}, 1);
  EXPECT_TRUE(same_bits(without.forward(request.inputs), run_plain(subject("tiny-scripted").plain, request.inputs)));
}

TEST(Wrapping, AFidelityThatTheCacheWasNotMadeForIsRefused) {
  auto& cache = subject("tiny-scripted").cache;
  const auto request = right_padded(subject("tiny-scripted").info, {5}, 1);
  const auto before = counters_of(cache);
  EXPECT_THAT([&] { cache.forward(request.inputs, {.fidelity = Fidelity::kBudget}); },
              ThrowsError(ErrorCode::kInvalidOptions, "budget"));
  EXPECT_EQ(counters_of(cache), before);
  EXPECT_THAT([&] { Options{.fidelity = static_cast<Fidelity>(17)}.validate(); },
              ThrowsError(ErrorCode::kInvalidOptions, "fidelity is 17"));
  for (const char* name : {"identical", "lossless", "budget", "threshold"}) {
    EXPECT_STREQ(to_string(fidelity_from_string(name)), name);
  }
  EXPECT_THAT([] { fidelity_from_string("Lossless"); }, ThrowsError(ErrorCode::kInvalidOptions, "'Lossless'"));
}

TEST(Wrapping, RefusedWithTheReason) {
  EXPECT_THAT([] { wrap("tiny-bert-frozen"); }, ThrowsError(ErrorCode::kUnsupportedModel, "frozen"));
  EXPECT_THAT([] { wrap("tiny-bert-training"); }, ThrowsError(ErrorCode::kUnsupportedModel, "training mode"));
  EXPECT_THAT([] { wrap("tiny-mlp"); }, ThrowsError(ErrorCode::kUnsupportedModel, "no chain of layers"));
  EXPECT_THAT([] { LayerCache<Module> cache(Module("empty")); }, ThrowsError(ErrorCode::kUnsupportedModel, "forward"));
}

TEST(Wrapping, TracedInTrainingModeIsRefusedAfterEvalToo) {
  auto module = load_model("tiny-bert-training");
  module.eval();
  EXPECT_THAT([&] { LayerCache<Module> cache(module); }, ThrowsError(ErrorCode::kUnsupportedModel, "dropout"));
}

TEST(Wrapping, OneChildInTrainingModeIsRefused) {
  auto module = load_model("tiny-scripted");
  module.attr("norm").toModule().train();
  EXPECT_THAT([&] { LayerCache<Module> cache(module); },
              ThrowsError(ErrorCode::kUnsupportedModel, "'norm' is in training mode"));
}

TEST(Wrapping, TheCallersModuleStaysAsItWas) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-scripted", "tiny-bert-eager"}) {
    SCOPED_TRACE(name);
    auto module = load_model(name);
    const auto request = right_padded(subject(name).info, {9, 4, 12}, 1);
    const auto want = run_plain(subject(name).plain, request.inputs);
    const auto graphs = graphs_of(module);
    LayerCache<Module> cache(module);
    EXPECT_EQ(graphs_of(module), graphs);
    const auto got = cache.forward(request.inputs);
    EXPECT_EQ(graphs_of(module), graphs);
    EXPECT_TRUE(same_bits(run_plain(module, request.inputs), want));
    EXPECT_TRUE(close_on_real(got, want, request, 1e-4));
  }
}

TEST(Wrapping, TheModuleMayGoBeforeTheCache) {
  const auto request = right_padded(subject("tiny-gpt2-sdpa").info, {9, 4, 12}, 1);
  std::unique_ptr<LayerCache<Module>> cache;
  {
    auto module = load_model("tiny-gpt2-sdpa");
    cache = std::make_unique<LayerCache<Module>>(module);
  }
  EXPECT_TRUE(close_on_real(cache->forward(request.inputs), run_plain(subject("tiny-gpt2-sdpa").plain, request.inputs),
                            request, 1e-4));
}

TEST(Wrapping, TwoCachesOfOneModule) {
  auto module = load_model("tiny-scripted");
  LayerCache<Module> first(module);
  LayerCache<Module> second(module);
  const auto request = right_padded(subject("tiny-scripted").info, {9, 9}, 1);
  const auto want = run_plain(module, request.inputs);
  EXPECT_TRUE(same_bits(first.forward(request.inputs), want));
  EXPECT_EQ(second.last_report().sequences.size(), 0U) << "reports are kept cache by cache";
  EXPECT_TRUE(same_bits(second.forward(request.inputs), want));
  EXPECT_EQ(second.stats().identical_hits, 0U);
}

TEST(Wrapping, TwoModelsDoNotShareEntries) {
  // Structure equal, weights not.
  auto other = load_model("tiny-scripted");
  {
    const c10::NoGradGuard no_grad;
    other.attr("tokens").toModule().attr("weight").toTensor().mul_(1.5);
  }
  LayerCache<Module> first(load_model("tiny-scripted"));
  LayerCache<Module> second(other);
  const auto request = right_padded(subject("tiny-scripted").info, {9}, 1);
  EXPECT_FALSE(same_bits(first.forward(request.inputs), second.forward(request.inputs)));
  EXPECT_TRUE(same_bits(second.forward(request.inputs), run_plain(other, request.inputs)));
}

TEST(Wrapping, WeightsAreSharedNotCopied) {
  auto module = load_model("minilm");
  const auto info = model_info("minilm");
  const auto request = right_padded(info, {12, 5}, 1);
  const auto want = run_plain(module, request.inputs);
  std::vector<const void*> before;
  for (const at::Tensor& parameter : module.parameters()) before.push_back(parameter.const_data_ptr());
  const auto resident = resident_bytes();
  const auto tensors = std::make_shared<TensorBytes>();
  auto guard = std::make_unique<c10::DebugInfoGuard>(c10::DebugInfoKind::PROFILER_STATE, tensors);
  LayerCache<Module> cache(module);
  guard.reset();
  const auto growth = resident_bytes() - resident;
  std::vector<const void*> after;
  for (const at::Tensor& parameter : module.parameters()) after.push_back(parameter.const_data_ptr());
  EXPECT_EQ(before, after);
  const auto weights = static_cast<std::int64_t>(cache.profile().weight_bytes);
  EXPECT_GT(weights, 80 << 20);
  EXPECT_LT(growth, weights / 4) << "wrapping made the process grow by " << growth << " bytes";
  EXPECT_GT(tensors->peak(), 0) << "nothing was counted";
  EXPECT_LT(tensors->live(), weights / 100) << "wrapping made tensors of " << tensors->live() << " bytes that stay";
  RecordProperty("growth_bytes", std::to_string(growth));
  RecordProperty("tensor_bytes", std::to_string(tensors->live()));
  EXPECT_EQ(cache.profile().granularity, Granularity::kTokens);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, 1e-4));
}

// --- changes after wrapping -------------------------------------------------------------------------

class ModelChanged : public ::testing::Test {
 protected:
  ModelChanged() : module_(load_model("tiny-scripted")), cache_(module_), info_(model_info("tiny-scripted")) {}

  /// After `change`, calls are refused, and the refusal changes nothing.
  void expect_noticed(const std::function<void()>& change, const std::string& part) {
    const auto known = right_padded(info_, {9, 4}, 1);
    const auto fresh = right_padded(info_, {7}, 2);
    cache_.forward(known.inputs);
    const auto plan = cache_.full_plan(fresh.inputs);
    const auto before = counters_of(cache_);
    {
      const c10::NoGradGuard no_grad;
      change();
    }
    for (const auto* request : {&known, &fresh}) {
      EXPECT_THAT([&] { cache_.forward(request->inputs); }, ThrowsError(ErrorCode::kModelChanged, part));
    }
    EXPECT_THAT([&] { cache_.forward_plan(fresh.inputs, plan); }, ThrowsError(ErrorCode::kModelChanged, part));
    EXPECT_EQ(counters_of(cache_), before);
  }

  Module part(const std::string& name) { return module_.attr(name).toModule(); }

  Module module_;
  LayerCache<Module> cache_;
  ModelInfo info_;
};

TEST_F(ModelChanged, OtherType) {
  expect_noticed([&] { module_.to(at::kBFloat16); }, "converted from Float to BFloat16");
}

TEST_F(ModelChanged, TrainingMode) {
  expect_noticed([&] { module_.train(); }, "training mode");
}

TEST_F(ModelChanged, TrainingModeOfAPart) {
  expect_noticed([&] { part("norm").train(); }, "training");
}

TEST_F(ModelChanged, WrittenInPlace) {
  expect_noticed([&] { part("tokens").attr("weight").toTensor().add_(1); }, "'tokens.weight' was written to");
}

TEST_F(ModelChanged, WrittenThroughAView) {
  expect_noticed([&] { part("tokens").attr("weight").toTensor()[12].zero_(); }, "'tokens.weight' was written to");
}

TEST_F(ModelChanged, Replaced) {
  expect_noticed([&] { part("norm").setattr("bias", at::ones({64})); }, "'norm.bias' was replaced");
}

TEST_F(ModelChanged, ReplacedByAnEqualOne) {
  expect_noticed([&] { part("norm").setattr("bias", part("norm").attr("bias").toTensor().clone()); },
                 "'norm.bias' was replaced");
}

TEST_F(ModelChanged, OtherData) {
  expect_noticed([&] { part("norm").attr("bias").toTensor().set_data(at::ones({64})); }, "'norm.bias' was");
}

TEST_F(ModelChanged, NothingChanged) {
  const auto request = right_padded(info_, {9, 9}, 1);
  const auto want = run_plain(module_, request.inputs);
  module_.eval();
  module_.to(at::kFloat);
  EXPECT_TRUE(same_bits(cache_.forward(request.inputs), want));
  EXPECT_TRUE(same_bits(cache_.forward(request.inputs), want));
  EXPECT_EQ(cache_.stats().identical_hits, 2U);
}

}  // namespace
}  // namespace llmcache::test
