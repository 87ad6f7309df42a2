// Every exported model, wrapped, against a copy of it that never was: whole batches.
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::IsSupersetOf;

class Differential : public ModelTest {
 protected:
  c10::IValue wrapped(const Request& request, Fidelity fidelity) {
    return cache().forward(request.inputs, {.fidelity = fidelity});
  }

  /// As close as the way it was run allows: bit for bit where it was not packed.
  ::testing::AssertionResult right(const c10::IValue& got, const c10::IValue& want, const Request& request) {
    if (report().execution != Execution::kPacked) return same_bits(got, want);
    const auto padding = padding_is_zero(got, request);
    return padding ? close_on_real(got, want, request, tolerance_of(info())) : padding;
  }
};

TEST_P(Differential, WithoutPaddingIsBitIdentical) {
  if (refused()) return;
  std::uint64_t seed = 0;
  for (const std::int64_t rows : {1, 3}) {
    for (const std::int64_t length : {1, 2, 5, 17, 40}) {
      for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << length << ", " << to_string(fidelity));
        const auto request =
            right_padded(info(), std::vector<std::int64_t>(static_cast<std::size_t>(rows), length), ++seed);
        const auto before = copy_of(request.inputs);
        const auto got = wrapped(request, fidelity);
        EXPECT_TRUE(same_bits(got, plain(request.inputs)));
        EXPECT_TRUE(same_bits(request.ids(), before[0]) && same_bits(request.mask(), before[1])) << "inputs modified";
        EXPECT_EQ(report().execution, Execution::kDense);
        EXPECT_EQ(report().sequences.size(), static_cast<std::size_t>(rows));
        EXPECT_EQ(report().computed_fraction(), 1.0);
      }
    }
  }
}

TEST_P(Differential, RightPaddedBatches) {
  if (refused()) return;
  const std::vector<std::vector<std::int64_t>> batches{
      {9, 4, 12, 1}, {3, 11}, {1, 1, 30}, {0, 7, 0, 13, 2}, {33, 17, 40, 5, 21, 8}};
  std::uint64_t seed = 100;
  for (const auto& lengths : batches) {
    SCOPED_TRACE(::testing::PrintToString(lengths));
    const auto request = right_padded(info(), lengths, ++seed);
    const auto want = plain(request.inputs);
    EXPECT_TRUE(right(wrapped(request, Fidelity::kLossless), want, request));
    const bool can_pack = profile().granularity != Granularity::kWholeLayers && profile().mask_argument >= 0;
    const bool packs = can_pack && !runs_plainly(request, want);
    EXPECT_EQ(report().execution, packs ? Execution::kPacked : Execution::kDense);
    EXPECT_EQ(report().fallback.empty(), !runs_plainly(request, want)) << report().fallback;
    EXPECT_TRUE(same_bits(wrapped(request, Fidelity::kIdentical), want));
    EXPECT_EQ(report().execution, Execution::kDense);
  }
}

TEST_P(Differential, PaddingBeyondTheLongestRow) {
  if (refused()) return;
  const auto request = right_padded(info(), {6, 6}, 200, 19);
  EXPECT_TRUE(right(wrapped(request, Fidelity::kLossless), plain(request.inputs), request));
}

TEST_P(Differential, LeftPaddedBatches) {
  if (refused()) return;
  std::uint64_t seed = 300;
  for (const std::vector<std::int64_t>& lengths :
       std::vector<std::vector<std::int64_t>>{{4, 11}, {9, 1, 14, 3}, {0, 6, 2}}) {
    SCOPED_TRACE(::testing::PrintToString(lengths));
    const auto request = left_padded(info(), lengths, ++seed);
    const auto want = plain(request.inputs);
    EXPECT_TRUE(right(wrapped(request, Fidelity::kLossless), want, request));
    if (!profile().left_padding) {
      EXPECT_EQ(report().execution, Execution::kDense);
    }
    EXPECT_TRUE(same_bits(wrapped(request, Fidelity::kIdentical), want));
  }
}

TEST_P(Differential, RowsPaddedOnEitherSideOrBoth) {
  if (refused()) return;
  const auto request = make_request(info(), {{0, 5}, {4, 8}, {3, 6}, {0, 12}, {11, 1}}, 12, 400);
  EXPECT_TRUE(right(wrapped(request, Fidelity::kLossless), plain(request.inputs), request));
}

TEST_P(Differential, MaskWithHolesIsRunAsItIs) {
  if (refused()) return;
  auto request = right_padded(info(), {10, 7, 10}, 500);
  request.mask()[0][4].fill_(0);
  request.mask()[2].narrow(0, 0, 3).fill_(0);
  request.mask()[2][5].fill_(0);
  const auto want = plain(request.inputs);
  EXPECT_TRUE(same_bits(wrapped(request, Fidelity::kLossless), want));
  EXPECT_EQ(report().execution, Execution::kDense);
  EXPECT_TRUE(same_bits(wrapped(request, Fidelity::kIdentical), want));
}

TEST_P(Differential, IdsAtPaddingPositionsAreNotSeen) {
  if (refused()) return;
  // Nonsense instead of zeros where nobody should look.
  auto request = right_padded(info(), {3, 9, 5}, 600);
  request.ids().masked_fill_(request.mask().eq(0), info().vocab - 1);
  EXPECT_TRUE(right(wrapped(request, Fidelity::kLossless), plain(request.inputs), request));
}

TEST_P(Differential, ViewsAsInputs) {
  if (refused()) return;
  const auto request = right_padded(info(), {8, 5, 3}, 700);
  Request views = request;
  for (c10::IValue& input : views.inputs) {  // every second entry of a larger tensor; column-major
    const auto own = input.toTensor();
    input = at::stack({own, own.mul(0)}, 2).flatten(1).t().contiguous().t().slice(1, 0, 16, 2);
    ASSERT_FALSE(input.toTensor().is_contiguous());
    ASSERT_TRUE(at::equal(input.toTensor(), own));
  }
  EXPECT_TRUE(right(wrapped(views, Fidelity::kLossless), plain(request.inputs), request));
}

TEST_P(Differential, TheProfileIsRight) {
  if (refused()) return;
  EXPECT_EQ(profile().layers, info().layers);
  EXPECT_EQ(profile().hidden, info().hidden);
  EXPECT_EQ(profile().inputs.size(), info().inputs);
  EXPECT_EQ(profile().ids_argument, 0);
  EXPECT_EQ(profile().vocabulary, info().vocab);
  EXPECT_EQ(c10::toString(profile().dtype), std::string(info().dtype == "float32" ? "Float" : "BFloat16"));
  if (info().name != "tiny-nan") {
    EXPECT_EQ(profile().causal, info().family == "decoder");
  }
  EXPECT_EQ(profile().hidden_argument.size(), static_cast<std::size_t>(info().layers));
  if (profile().granularity == Granularity::kWholeLayers) {
    EXPECT_FALSE(profile().notes.empty()) << "why not more?";
  } else {
    EXPECT_GE(profile().attention.size(), static_cast<std::size_t>(info().layers));
    for (const auto& attention_op : profile().attention) EXPECT_EQ(attention_op.kind, info().attention);
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, Differential, ::testing::ValuesIn(wrappable_names({"tiny-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Zoo, Differential, ::testing::ValuesIn(wrappable_names({"zoo-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, Differential,
                         ::testing::Values("tiny-bert-types-sdpa.pt2", "tiny-llama-sdpa-bf16.pt2", "zoo-albert.pt2"),
                         test_name);

TEST(DifferentialModels, TheExpectedOnesAreThere) {
  EXPECT_THAT(
      model_names({"tiny-"}),
      IsSupersetOf({"tiny-bert-sdpa", "tiny-bert-eager", "tiny-bert-sdpa-bf16", "tiny-bert-types-sdpa",
                    "tiny-bert-pooled", "tiny-distilbert-sdpa", "tiny-distilbert-eager", "tiny-gpt2-sdpa",
                    "tiny-gpt2-eager", "tiny-gpt2-eager-bf16", "tiny-llama-sdpa", "tiny-llama-eager",
                    "tiny-llama-sdpa-bf16", "tiny-scripted", "tiny-scripted-eager", "tiny-nan", "tiny-throws"}));
  EXPECT_THAT(model_names({"zoo-"}),
              IsSupersetOf({"zoo-albert", "zoo-bloom", "zoo-convbert", "zoo-deberta-v2", "zoo-falcon", "zoo-fnet",
                            "zoo-gemma2", "zoo-gptj", "zoo-gptneox", "zoo-mistral", "zoo-modernbert", "zoo-mpnet",
                            "zoo-opt", "zoo-phi", "zoo-qwen2", "zoo-roberta", "zoo-t5-encoder", "zoo-xlm-roberta"}));
}

TEST(DifferentialModels, TokenGranularityWhereItMustWork) {
  for (const char* name :
       {"tiny-bert-sdpa", "tiny-bert-eager", "tiny-bert-sdpa-bf16", "tiny-bert-types-sdpa", "tiny-bert-pooled",
        "tiny-distilbert-sdpa", "tiny-distilbert-eager", "tiny-gpt2-sdpa", "tiny-gpt2-eager", "tiny-gpt2-eager-bf16",
        "tiny-llama-sdpa", "tiny-llama-eager", "tiny-llama-sdpa-bf16", "tiny-scripted", "tiny-scripted-eager"}) {
    SCOPED_TRACE(name);
    const auto& profile = subject(name).cache.profile();
    EXPECT_EQ(profile.granularity, Granularity::kTokens) << profile.to_string();
    EXPECT_EQ(profile.mask_argument, 1);
    EXPECT_TRUE(profile.rows_independent && profile.per_row_output);
  }
}

TEST(DifferentialModels, RelativeAndCountedPositionsRunTokenByToken) {
  for (const char* name : {"zoo-deberta-v2", "zoo-roberta", "zoo-xlm-roberta"}) {
    const auto& profile = subject(name).cache.profile();
    EXPECT_EQ(profile.granularity, Granularity::kTokens) << profile.to_string();
    EXPECT_TRUE(profile.left_padding) << profile.to_string();
  }
}

TEST(DifferentialModels, CountedPositionsLeaveOutPadding) {
  // XLM-R counts ids that are not padding's, which is 1: in texts, too, and in front of them.
  Subject& model = subject("zoo-xlm-roberta");
  LayerCache<Module> keeping(load_model("zoo-xlm-roberta"));
  for (const std::int64_t in_front : {1, 0, 7}) {
    auto request = left_padded(model.info, {12, 5, 9}, 900);
    request.inputs[0] = request.ids().masked_fill(request.mask().eq(0), in_front);
    for (const std::int64_t place : {7, 10}) request.ids()[0][place].fill_(1);
    const auto want = run_plain(model.plain, request.inputs);
    for (LayerCache<Module>* cache : {&model.cache, &keeping, &keeping}) {
      EXPECT_TRUE(close_on_real(cache->forward(request.inputs), want, request, 1e-4)) << in_front;
    }
    EXPECT_EQ(keeping.last_report().sequences[1].source, Source::kIdentical);
  }
}

TEST(DifferentialModels, WhatMixesTokensOutsideAttentionIsNotPacked) {
  for (const char* name : {"zoo-convbert", "zoo-fnet"}) {
    EXPECT_EQ(subject(name).cache.profile().granularity, Granularity::kWholeLayers) << name;
  }
}

TEST(DifferentialModels, FurtherInputsAndTuples) {
  Subject& model = subject("tiny-bert-types-sdpa");
  ASSERT_EQ(model.info.inputs, 3U);
  const auto request = right_padded(model.info, {6, 14, 9}, 800);
  const auto want = run_plain(model.plain, request.inputs);
  ASSERT_TRUE(want.isTuple());
  const auto got = model.cache.forward(request.inputs, {.fidelity = Fidelity::kLossless});
  ASSERT_TRUE(got.isTuple());
  EXPECT_TRUE(close_on_real(got, want, request, 1e-4));
  // Other types are another input: the result must follow them.
  auto other = request;
  other.inputs[2] = request.mask() - request.inputs[2].toTensor();
  const auto other_got = model.cache.forward(other.inputs, {.fidelity = Fidelity::kLossless});
  EXPECT_TRUE(close_on_real(other_got, run_plain(model.plain, other.inputs), request, 1e-4));
  EXPECT_GT(real_difference(other_got, got, request), 1e-2);
}

}  // namespace
}  // namespace llmcache::test
