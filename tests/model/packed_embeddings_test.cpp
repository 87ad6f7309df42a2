// Models whose embeddings are looked up in packed tables: what is packed, the memory that goes, answers, saved
// profiles.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstdlib>
#include <filesystem>
#include <limits>
#include <unordered_set>

#include "encoder_decoder_support.h"
#include "model/saved_profile.h"
#include "temporary_folder.h"
#include "weights_support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

std::filesystem::path file_of(const std::string& name) {
  return std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / (name + ".pt");
}

std::size_t held(const ModelProfile& profile) {
  return profile.weight_bytes - profile.released_weight_bytes + profile.packed_weight_bytes;
}

/// tiny-llama, whose head has a weight of its own, with that of the embedding in its place.
Module tied_llama() {
  auto module = load_model("tiny-llama-sdpa");
  const auto whole = module.attr("model").toModule();
  const auto table = whole.attr("model").toModule().attr("embed_tokens").toModule().attr("weight");
  whole.attr("lm_head").toModule().setattr("weight", table);
  return module;
}

/// Where a format holds tables of embeddings in fewer bits, nothing of them stays as it was.
TEST(PackedEmbeddings, NoMatrixStays) {
  const std::map<std::string, std::size_t> tables{
      {"tiny-gpt2-sdpa", 2}, {"tiny-gpt2-sdpa.pt2", 2}, {"tiny-bert-sdpa", 3}, {"tiny-llama-sdpa", 1}};
  for (const auto& [name, count] : tables) {
    for (const auto weights : packings()) {
      SCOPED_TRACE(name + " " + to_string(weights));
      auto module = load_model(name);
      std::size_t matrices = 0;
      std::unordered_set<const void*> seen;
      for (const auto& parameter : module.parameters()) {
        if (parameter.dim() == 2 && seen.insert(parameter.const_data_ptr()).second) matrices += parameter.nbytes();
      }
      const ModelProfile profile = LayerCache<Module>(module, {.weights = weights}).profile();
      const bool packed = weights != Weights::kPackedFp32;
      EXPECT_EQ(profile.packed_tables, packed ? count : 0U);
      EXPECT_EQ(profile.released_weight_bytes >= matrices, packed);
      EXPECT_THAT(profile.to_string(), HasSubstr(std::to_string(profile.packed_tables) + " tables"));
    }
  }
}

TEST(PackedEmbeddings, OneThatIsTiedIsHeldOnceWhereItsLayerHasRows) {
  for (const auto weights : finishing()) {
    SCOPED_TRACE(to_string(weights));
    const ModelProfile untied = LayerCache<Module>(load_model("tiny-llama-sdpa"), {.weights = weights}).profile();
    const ModelProfile tied = LayerCache<Module>(tied_llama(), {.weights = weights}).profile();
    EXPECT_EQ(tied.packed_tables, 1U);
    EXPECT_EQ(tied.packed_weights, untied.packed_weights);
    const auto table = at::ones({300, 64});
    const auto layer = PackedLinear::pack(weights, table, "head");
    const std::size_t own = weights == Weights::kPackedInt8 ? table.numel() * 17 / 16 : table.numel() * 2;
    EXPECT_EQ(tied.packed_weight_bytes, untied.packed_weight_bytes - (layer->has_rows() ? own : 0));
  }
}

/// A module in bfloat16 whose table is tied: the format has as many bits, but the layer that holds them serves both.
TEST(PackedEmbeddings, OneOfTheSameBitsIsReadFromItsLayer) {
  const ModelProfile profile =
      LayerCache<Module>(load_model("tiny-gpt2-eager-bf16"), {.weights = Weights::kPackedBFloat16}).profile();
  const bool rows = PackedLinear::pack(Weights::kPackedBFloat16, at::ones({16, 64}), "head")->has_rows();
  EXPECT_EQ(profile.packed_tables, rows ? 1U : 0U) << "that of positions is as short as it is";
  if (rows) {
    EXPECT_LT(held(profile), profile.weight_bytes * 103 / 100);
  }
}

TEST(PackedEmbeddings, TiedAndUntiedAnswerAsThePlainModule) {
  for (const bool tied : {true, false}) {
    auto plain = tied ? tied_llama() : load_model("tiny-llama-sdpa");
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(tied ? "tied " : "untied ") + to_string(weights));
      LayerCache<Module> cache(plain, {.weights = weights});
      EXPECT_TRUE(cache.profile().prefix_reuse);
      std::uint64_t seed = 0;
      for (const std::vector<std::int64_t>& lengths : std::vector<std::vector<std::int64_t>>{{1}, {17, 4}, {40, 33}}) {
        const auto request = right_padded(model_info("tiny-llama-sdpa"), lengths, ++seed);
        const auto want = run_plain(plain, request.inputs);
        for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless}) {
          EXPECT_TRUE(close_on_real(cache.forward(request.inputs, {.fidelity = fidelity}), want, request,
                                    tolerance_of(weights)));
        }
      }
    }
  }
}

/// Positions of a target that is looked up in part, and narrow tables of relative positions beside the one of words.
TEST(PackedEmbeddings, OfASourceAndATarget) {
  for (const char* name : {"seq2seq-t5", "seq2seq-bart-masked"}) {
    auto& plain = subject(name);
    for (const auto weights : packings()) {
      SCOPED_TRACE(std::string(name) + " " + to_string(weights));
      LayerCache<Module> cache(load_model(name), {.weights = weights});
      const auto& profile = cache.profile();
      EXPECT_EQ(profile.granularity, plain.cache.profile().granularity) << profile.to_string();
      EXPECT_EQ(profile.source_reuse, plain.cache.profile().source_reuse);
      EXPECT_EQ(profile.packed_tables > 0, weights != Weights::kPackedFp32);
      std::mt19937 random(3);
      const std::vector<Row> rows{{random_ids(random, 9), random_ids(random, 6)},
                                  {random_ids(random, 4), random_ids(random, 6)}};
      const auto request = request_of(profile, rows);
      const auto want = run_plain(plain.plain, request.inputs);
      for (int turn = 0; turn < 2; ++turn) {
        EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance_of(weights)));
      }
    }
  }
}

/// Loading a file, the library frees each weight as soon as it is packed, and then holds what the bits of a format say.
TEST(PackedEmbeddings, LoadingNeverHoldsAllWeightsTwice) {
  for (const auto weights : packings()) {
    SCOPED_TRACE(to_string(weights));
    const auto tensors = std::make_shared<TensorBytes>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, tensors);
    auto cache = llmcache::load(file_of("minilm"), {.weights = weights});
    const auto& profile = cache.profile();
    const auto slack = profile.weight_bytes / 12;
    EXPECT_LT(static_cast<std::size_t>(tensors->peak()), std::max(profile.weight_bytes, held(profile)) + slack)
        << profile.weight_bytes << " bytes as loaded, " << held(profile) << " packed";
    EXPECT_LT(static_cast<std::size_t>(tensors->live()), held(profile) + slack);
    const double share = static_cast<double>(held(profile)) / static_cast<double>(profile.weight_bytes);
    if (weights == Weights::kPackedBFloat16 || weights == Weights::kPackedInt8) {
      EXPECT_NEAR(share, weights == Weights::kPackedInt8 ? 0.26 : 0.5, 0.01);
    }
    const auto request = right_padded(model_info("minilm"), {9, 4}, 1);
    auto plain = load_model("minilm");
    EXPECT_TRUE(
        close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, tolerance_of(weights)));
  }
}

/// What is raised names methods of the module, which is gone.
TEST(PackedEmbeddings, AModelThatRaisesSaysWhy) {
  const auto request = right_padded(model_info("tiny-throws"), {5}, 1);
  auto bad = right_padded(model_info("tiny-throws"), {5}, 1);
  bad.ids()[0][2] = 7;
  for (const auto weights : packings()) {
    SCOPED_TRACE(to_string(weights));
    auto cache = llmcache::load(file_of("tiny-throws"), {.capacity_bytes = 0, .weights = weights});
    EXPECT_THAT([&] { cache.forward(bad.inputs); }, ThrowsError(ErrorCode::kModelFailed, "an input id was 7"));
    auto plain = load_model("tiny-throws");
    EXPECT_TRUE(
        close_on_real(cache.forward(request.inputs), run_plain(plain, request.inputs), request, tolerance_of(weights)));
  }
}

/// Where a format does not suit the model, its weights are gone by then, and are read again.
TEST(PackedEmbeddings, AFileIsReadAgainWhereAFormatDoesNotSuit) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "large.pt";
  auto module = make_module({});
  module.attr("l2").toModule().attr("up").toTensor()[3][4].fill_(std::numeric_limits<float>::max());
  module.save(path.string());
  auto cache = llmcache::load(path, {.weights = Weights::kFastest});
  EXPECT_THAT(cache.profile().weights, ::testing::AnyOf("as-loaded", "packed-fp32")) << "others do not hold the value";
  const auto request = right_padded(script_info({}), {9, 4}, 1);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request, 1e-3));
}

class PackedFromFile : public ::testing::TestWithParam<Weights> {};

TEST_P(PackedFromFile, IsTheSameFromASavedProfile) {
  const TemporaryFolder folder;
  const Options options{.capacity_bytes = 0, .weights = GetParam(), .profile_path = folder.path() / "profile.json"};
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-bert-sdpa"}) {
    SCOPED_TRACE(name);
    auto probed = llmcache::load(file_of(name), options);
    EXPECT_FALSE(probed.profile().from_file);
    auto saved = llmcache::load(file_of(name), options);
    EXPECT_TRUE(saved.profile().from_file) << saved.profile().file_note;
    LayerCache<Module> callers(load_model(name), options);
    EXPECT_TRUE(callers.profile().from_file) << callers.profile().file_note;
    EXPECT_EQ(saved.profile().digest, probed.profile().digest);
    EXPECT_EQ(callers.profile().digest, probed.profile().digest);
    EXPECT_EQ(held(saved.profile()), held(probed.profile()));
    const auto request = right_padded(model_info(name), {9, 4}, 1);
    const auto want = probed.forward(request.inputs);
    EXPECT_TRUE(same_bits(saved.forward(request.inputs), want));
    EXPECT_TRUE(same_bits(callers.forward(request.inputs), want));
  }
}

/// As one that was written when tables were not packed: the digest is another one, which shows once weights are packed
/// and let go of.
TEST_P(PackedFromFile, AProfileOfOtherWeightsIsWrittenAnew) {
  const TemporaryFolder folder;
  const Options options{.capacity_bytes = 0, .weights = GetParam(), .profile_path = folder.path() / "profile.json"};
  auto probed = llmcache::load(file_of("tiny-gpt2-sdpa"), options);
  auto changed = read_saved_profile(options.profile_path);
  changed.digest = std::string(32, '0');
  ASSERT_EQ(write_saved_profile(options.profile_path, changed), "");
  auto again = llmcache::load(file_of("tiny-gpt2-sdpa"), options);
  EXPECT_FALSE(again.profile().from_file);
  EXPECT_EQ(again.profile().digest, probed.profile().digest);
  const auto request = right_padded(model_info("tiny-gpt2-sdpa"), {9, 4}, 1);
  EXPECT_TRUE(same_bits(again.forward(request.inputs), probed.forward(request.inputs)));
  EXPECT_TRUE(llmcache::load(file_of("tiny-gpt2-sdpa"), options).profile().from_file);
}

INSTANTIATE_TEST_SUITE_P(, PackedFromFile, ::testing::ValuesIn(packings()),
                         [](const auto& param) { return std::string(to_string(param.param)).substr(7); });

}  // namespace
}  // namespace llmcache::test
