// Every model that is exported in both formats: as a program of torch.export it is what it is as a TorchScript file.
#include <algorithm>
#include <map>

#include "budget_support.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsSupersetOf;

std::string as_script(const std::string& program) { return program.substr(0, program.find(".pt2")); }

std::vector<std::string> wrappable_programs() {
  auto names = program_names({"tiny-", "unusual-", "zoo-", "seq2seq-", "classify-"});
  std::erase_if(names, [](const std::string& name) {
    return name == "tiny-mlp.pt2" || name == "tiny-bert-training.pt2" || name == "zoo-qwen3moe.pt2";
  });
  return names;
}

std::vector<std::string> wrappable_without_source() {
  auto names = wrappable_programs();
  std::erase_if(names, [](const std::string& name) { return name.starts_with("seq2seq-"); });
  return names;
}

/// Granularities of the two formats where they differ, and why (docs/exported-programs.md).
const std::map<std::string, Granularity> kExceptions{
    // TorchScript traces one operator for a whole layer of nn.TransformerEncoder, torch.export its parts.
    {"unusual-encoder-trace.pt2", Granularity::kTokens},
    // The list that the states are kept in is gone, and with it what tells that they are not returned.
    {"unusual-states-back.pt2", Granularity::kPacked}};

class ExportedModel : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] const ModelProfile& script() const { return subject(as_script(GetParam())).cache.profile(); }
  [[nodiscard]] Subject& program() const { return subject(GetParam()); }
};

TEST_P(ExportedModel, IsWrappedAsItsScriptIs) {
  const ModelProfile& got = program().cache.profile();
  const ModelProfile& want = script();
  const auto exception = kExceptions.find(GetParam());
  EXPECT_EQ(got.granularity, exception == kExceptions.end() ? want.granularity : exception->second) << got.to_string();
  EXPECT_EQ(got.layers, want.layers);
  EXPECT_EQ(got.hidden, want.hidden);
  EXPECT_EQ(got.inputs, want.inputs);
  EXPECT_EQ(got.vocabulary, want.vocabulary);
  EXPECT_EQ(got.dtype, want.dtype);
  if (exception != kExceptions.end()) return;
  EXPECT_EQ(got.layers_path, want.layers_path);
  EXPECT_EQ(got.causal, want.causal);
  EXPECT_EQ(got.prefix_reuse, want.prefix_reuse);
  EXPECT_EQ(got.left_padding, want.left_padding);
  EXPECT_EQ(got.source_arguments, want.source_arguments);
  EXPECT_EQ(got.source_mask_argument, want.source_mask_argument);
  EXPECT_EQ(got.source_reuse, want.source_reuse);
  EXPECT_EQ(got.max_source_tokens, want.max_source_tokens);
  EXPECT_EQ(got.rows_independent, want.rows_independent);
  EXPECT_EQ(got.per_row_output, want.per_row_output);
  EXPECT_EQ(got.head_tokenwise, want.head_tokenwise);
  EXPECT_EQ(got.attention.size(), want.attention.size());
  EXPECT_EQ(got.notes.size(), want.notes.size());
}

/// Encoder-decoders answer in tests/cache/encoder_decoder_test.cpp.
class ExportedModelWithoutSource : public ExportedModel {};

TEST_P(ExportedModelWithoutSource, AnswersAsItsScriptDoes) {
  Module module = load_model(GetParam());
  std::uint64_t seed = 0;
  for (const std::vector<std::int64_t>& lengths :
       std::vector<std::vector<std::int64_t>>{{12, 9, 3}, {1}, {33}, {1, 1}, {17, 17}}) {
    SCOPED_TRACE(::testing::PrintToString(lengths));
    const auto request = right_padded(program().info, lengths, ++seed);
    const auto want = run_plain(program().plain, request.inputs);
    const auto whole = run_plain(module, request.inputs);
    if (GetParam() != "unusual-encoder-trace.pt2") {
      EXPECT_TRUE(same_bits(whole, want));
    }
    EXPECT_TRUE(close_on_real(whole, want, request, tolerance_of(program().info)));
    const auto tensors = leaves(want);
    const bool by_token = std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.dim() <= 3; });
    if (!by_token && lengths.size() > 1 && lengths[0] != lengths[1]) continue;  // keys: which are padding is not seen
    const auto packed = program().cache.forward(request.inputs);
    EXPECT_TRUE(close_on_real(packed, want, request, tolerance_of(program().info)));
    EXPECT_TRUE(program().cache.last_report().fallback.empty()) << program().cache.last_report().fallback;
  }
}

TEST_P(ExportedModelWithoutSource, ContinuesWhatItKnows) {
  if (!program().cache.profile().prefix_reuse) return;
  LayerCache<Module> cache(load_model(GetParam()));
  const auto whole = right_padded(program().info, {24}, 7);
  for (std::int64_t tokens = 20; tokens <= 24; ++tokens) {
    Request request{{}, {{0, tokens}}, tokens};
    for (const auto& input : whole.inputs) request.inputs.emplace_back(input.toTensor().narrow(1, 0, tokens).clone());
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(program().plain, request.inputs), request,
                              tolerance_of(program().info)));
    EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, tokens == 20 ? 0 : tokens - 1);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ExportedModel, ::testing::ValuesIn(wrappable_programs()), test_name);
INSTANTIATE_TEST_SUITE_P(All, ExportedModelWithoutSource, ::testing::ValuesIn(wrappable_without_source()), test_name);

TEST(ExportedModels, TheExpectedOnesAreThere) {
  EXPECT_THAT(
      wrappable_programs(),
      IsSupersetOf({"tiny-bert-sdpa.pt2", "tiny-bert-eager.pt2", "tiny-distilbert-sdpa.pt2", "tiny-gpt2-sdpa.pt2",
                    "tiny-gpt2-eager-bf16.pt2", "tiny-llama-sdpa.pt2", "tiny-scripted.pt2", "zoo-albert.pt2",
                    "seq2seq-t5.pt2", "seq2seq-bart.pt2", "seq2seq-marian.pt2"}))
      << "run the tests with tools/run.sh test";
}

TEST(ExportedModels, WhatCannotBeWrappedSaysWhy) {
  EXPECT_THAT([] { (void)load_model("zoo-qwen3moe.pt2"); },
              ThrowsError(ErrorCode::kUnsupportedModel, "in module 'model.model.layers.0.mlp.experts' is no operator"));
  EXPECT_THAT([] { LayerCache<Module> cache(load_model("tiny-bert-training.pt2")); },
              ThrowsError(ErrorCode::kUnsupportedModel, "training mode"));
  EXPECT_THAT([] { LayerCache<Module> cache(load_model("tiny-mlp.pt2")); },
              ThrowsError(ErrorCode::kUnsupportedModel, "no chain of layers"));
}

TEST(ExportedModels, ReuseWithinABudget) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, 0.1, 0.1};
  options.budget.scores = classes;
  options.budget.audit_rate = 0;
  options.budget.exit_layers = {0, 1, 2};
  const std::string name = std::string(kModel) + ".pt2";
  LayerCache<Module> cache(load_model(name), options);
  const auto profile = cache.calibrate(Traffic(1).sample(300));
  ASSERT_TRUE(profile.reuses()) << profile.to_string();
  Module plain = load_plain(name);
  Traffic traffic(2);
  std::int64_t wrong = 0;
  for (int i = 0; i < 100; ++i) {
    const auto request = traffic.next();
    const auto got = classes(cache.forward(request.inputs).toTensor()).argmax(1);
    wrong += got.ne(classes(run_plain(plain, request.inputs).toTensor()).argmax(1)).sum().item<std::int64_t>();
  }
  EXPECT_LE(static_cast<double>(wrong) / 400, 0.1 + 3 * 0.015) << "three standard errors of 400 draws";
  EXPECT_GT(cache.stats().budget->early_exits, 0U);
}

}  // namespace
}  // namespace llmcache::test
