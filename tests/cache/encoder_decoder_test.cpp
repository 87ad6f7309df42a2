// Models that compute a target from a source: against the plain module, in whatever order requests come.
#include <algorithm>
#include <random>
#include <thread>

#include "encoder_decoder_support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

TEST_P(EncoderDecoder, SourceAndTargetAreFound) {
  EXPECT_THAT(profile().source_arguments, ::testing::ElementsAre(0, 1));
  EXPECT_EQ(profile().source_mask_argument, 1);
  EXPECT_EQ(profile().ids_argument, 2);
  EXPECT_EQ(profile().mask_argument, model().info.inputs == 4 ? 3 : -1);
  EXPECT_TRUE(profile().causal);
  EXPECT_THAT(profile().layers_path, HasSubstr("decoder"));
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  EXPECT_TRUE(profile().prefix_reuse) << profile().to_string();
  EXPECT_TRUE(profile().head_tokenwise);
  // Each layer attends to the target, and to the source.
  EXPECT_EQ(profile().attention.size(), static_cast<std::size_t>(2 * profile().layers));
  EXPECT_EQ(profile().attention.at(0).key_inputs, 2U);
  EXPECT_EQ(profile().attention.at(1).key_inputs, 0U);
  EXPECT_TRUE(profile().source_reuse) << profile().to_string();
  EXPECT_THAT(profile().to_string(), HasSubstr("source:            input_ids, attention_mask, its states are kept"));
}

TEST_P(EncoderDecoder, LengthsOfAnyKindAreRight) {
  unsigned seed = 0;
  for (const auto& lengths : std::vector<std::vector<std::pair<std::size_t, std::size_t>>>{
           {{9, 5}}, {{3, 20}}, {{1, 1}}, {{40, 2}}, {{7, 7}, {7, 7}}, {{12, 3}, {4, 6}, {9, 1}}, {{2, 9}, {30, 4}}}) {
    SCOPED_TRACE(::testing::PrintToString(lengths));
    const auto request = request_of(profile(), rows(lengths, ++seed));
    const auto before = copy_of(request.inputs);
    const auto want = plain(request);
    EXPECT_TRUE(same_bits(model().cache.forward(request.inputs, {.fidelity = Fidelity::kIdentical}), want));
    EXPECT_TRUE(close_on_real(model().cache.forward(request.inputs), want, request, tolerance()));
    EXPECT_TRUE(model().cache.last_report().fallback.empty()) << model().cache.last_report().fallback;
    for (std::size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(same_bits(request.inputs[i], before[i])) << "modified";
  }
}

TEST_P(EncoderDecoder, HolesInTheMasksAndEmptySourcesAreRunAsTheyAre) {
  for (const bool all : {false, true}) {
    auto request = request_of(profile(), rows({{9, 5}, {7, 5}}, 31));
    auto mask = request.inputs[1].toTensor()[0];
    all ? mask.zero_() : mask.narrow(0, 2, 3).zero_();
    const auto want = plain(request);
    auto cache = cache_with({});
    for (int round = 0; round < 2; ++round) {
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance()));
    }
    EXPECT_TRUE(same_bits(cache.forward(request.inputs, {.fidelity = Fidelity::kIdentical}), want));
  }
}

/// What is known of a request changes with every call before it; what it gives does not.
TEST_P(EncoderDecoder, AnyOrderOfRequestsIsRight) {
  std::mt19937 random(7);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  std::vector<Ids> sources;
  for (const std::size_t length : {5, 5, 11, 26}) sources.push_back(random_ids(random, length));
  sources.push_back(sources[3]);  // the same beginning
  sources.back().resize(17);
  std::vector<Ids> targets;
  for (int i = 0; i < 3; ++i) targets.push_back(random_ids(random, 30));
  std::copy_n(targets[0].begin(), 12, targets[1].begin());
  auto large = cache_with({.capacity_bytes = std::size_t{64} << 20});
  auto small = cache_with({.capacity_bytes = std::size_t{300} << 10});  // evicts all the time
  std::uint64_t reused = 0;
  for (int call = 0; call < 60; ++call) {
    SCOPED_TRACE(call);
    const std::size_t tokens = 1 + below(30);
    std::vector<Row> batch;
    for (std::size_t r = 0, n = 1 + below(4); r < n; ++r) {
      Ids target = targets[below(targets.size())];
      target.resize(masked() ? 1 + below(30) : tokens);
      batch.push_back({sources[below(sources.size())], std::move(target)});
    }
    const auto request = request_of(profile(), batch, static_cast<std::int64_t>(below(2) * 5),
                                    masked() ? static_cast<std::int64_t>(below(2) * 3) : 0);
    const auto want = plain(request);
    const RequestOptions options{.fidelity = below(5) == 0 ? Fidelity::kIdentical : Fidelity::kLossless,
                                 .tenant = below(3) == 0 ? "other" : ""};
    for (LayerCache<Module>* cache : {&large, &small}) {
      const auto got = cache->forward(request.inputs, options);
      EXPECT_TRUE(close_on_real(got, want, request, tolerance()));
      EXPECT_EQ(cache->last_report().fallback, "");
      EXPECT_TRUE(options.fidelity != Fidelity::kIdentical || same_bits(got, want));
    }
    for (const auto& sequence : large.last_report().sequences) reused += sequence.reused_tokens > 0 ? 1 : 0;
  }
  EXPECT_GT(reused, 40U);
  EXPECT_GT(large.stats().source_reused, 1000U);
  EXPECT_GT(small.stats().source_reused, 100U);
  EXPECT_EQ(large.stats().verification.mismatches, 0U);
  EXPECT_EQ(small.stats().verification.mismatches, 0U);
  EXPECT_GT(small.stats().evictions, 0U);
}

TEST_P(EncoderDecoder, OutputsAreCut) {
  auto cache = cache_with({.capacity_bytes = std::size_t{64} << 20});
  auto batch = rows({{9, 12}, {4, 12}}, 5);
  const auto first = request_of(profile(), batch);
  (void)cache.forward(first.inputs, {.output = Output::kLastToken});
  for (Row& row : batch) row.target.push_back(77);
  const auto grown = request_of(profile(), batch);
  const auto want = plain(grown).toTensor();
  const auto fresh = cache.forward(grown.inputs, {.output = Output::kNewTokens}).toTensor();
  ASSERT_EQ(fresh.sizes(), (std::vector<std::int64_t>{2, 1, want.size(2)}));
  const auto last = cache.forward(grown.inputs, {.output = Output::kLastToken}).toTensor();
  for (const at::Tensor& got : {fresh, last}) {
    EXPECT_LE((got.select(1, 0) - want.select(1, 12)).abs().max().item<double>(),
              tolerance() * want.abs().max().item<double>());
  }
  for (const auto& sequence : cache.last_report().sequences) EXPECT_EQ(sequence.reused_tokens, 13);
}

TEST_P(EncoderDecoder, PaddingOfTheSourceDoesNotHideARow) {
  auto cache = cache_with({});
  const auto batch = rows({{9, 6}}, 6);
  (void)cache.forward(request_of(profile(), batch).inputs, {.output = Output::kLastToken});
  const auto padded = request_of(profile(), batch, 7);
  EXPECT_TRUE(close_on_real(cache.forward(padded.inputs), plain(padded), padded, tolerance()));
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 6);
}

TEST_P(EncoderDecoder, AnotherSourceIsAnotherRequest) {
  auto cache = cache_with({.verify_rate = 0});
  auto batch = rows({{9, 6}}, 8);
  (void)cache.forward(request_of(profile(), batch).inputs);
  batch[0].source[4] += batch[0].source[4] > 50 ? -1 : 1;
  const auto other = request_of(profile(), batch);
  const auto want = plain(other);
  EXPECT_TRUE(close_on_real(cache.forward(other.inputs), want, other, tolerance()));
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 0);
  // Its last token masked is another one again.
  auto shorter = other;
  shorter.inputs[1] = other.inputs[1].toTensor().clone();
  shorter.inputs[1].toTensor()[0][8].fill_(0);
  EXPECT_TRUE(close_on_real(cache.forward(shorter.inputs), plain(shorter), other, tolerance()));
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 0);
}

TEST_P(EncoderDecoder, TenantsDoNotMeet) {
  auto cache = cache_with({});
  const auto request = request_of(profile(), rows({{9, 6}}, 9));
  (void)cache.forward(request.inputs, {.tenant = "a"});
  (void)cache.forward(request.inputs, {.tenant = "b"});
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 0);
  (void)cache.forward(request.inputs, {.tenant = "a"});
  EXPECT_EQ(cache.last_report().sequences.at(0).reused_tokens, 6);
}

TEST_P(EncoderDecoder, TargetsOfOneSourceShareTheirBeginning) {
  auto cache = cache_with({});
  auto batch = rows({{9, 8}, {9, 8}, {9, 8}}, 10);
  for (std::size_t r = 1; r < 3; ++r) {
    batch[r].source = batch[0].source;
    std::copy_n(batch[0].target.begin(), 5, batch[r].target.begin());
  }
  const auto request = request_of(profile(), batch);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), plain(request), request, tolerance()));
  const auto sequences = cache.last_report().sequences;
  EXPECT_EQ(sequences.at(0).shared_tokens, 0);
  EXPECT_EQ(sequences.at(1).shared_tokens, 5);
  EXPECT_EQ(sequences.at(2).shared_tokens, 5);
}

TEST_P(EncoderDecoder, ASourceIsComputedOnce) {
  auto cache = cache_with({});
  auto batch = rows({{9, 4}, {9, 4}, {5, 4}}, 12);
  batch[1].source = batch[0].source;
  const auto first = request_of(profile(), batch);
  EXPECT_TRUE(close_on_real(cache.forward(first.inputs), plain(first), first, tolerance()));
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(0, 9, 0));
  EXPECT_EQ(cache.last_report().sequences.at(2).source_tokens, 5);
  // Other targets, another order, a new source, more padding.
  auto other = rows({{5, 7}, {13, 7}, {9, 7}}, 13);
  other[0].source = batch[2].source;
  other[2].source = batch[0].source;
  const auto second = request_of(profile(), other, 3);
  EXPECT_TRUE(close_on_real(cache.forward(second.inputs), plain(second), second, tolerance()));
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(5, 0, 9));
  for (const auto& sequence : cache.last_report().sequences) EXPECT_EQ(sequence.reused_tokens, 0);
  (void)cache.forward(second.inputs, {.tenant = "other"});
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(0, 0, 0));
  const Stats stats = cache.stats();
  EXPECT_EQ(stats.source_tokens, 23U + 2 * 27U);
  EXPECT_EQ(stats.source_reused, 23U);
  EXPECT_EQ(stats.verification.mismatches, 0U);
  EXPECT_THAT(stats.to_string(), HasSubstr("sources:   77 tokens, not computed 29.9 % (23 of 77)"));
  cache.clear();
  (void)cache.forward(second.inputs);
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(0, 0, 0));
}

TEST_P(EncoderDecoder, WhatIsKeptOfASourceIsNobodyElses) {
  auto cache = cache_with({.verify_rate = 0});
  const auto request = request_of(profile(), rows({{9, 6}}, 14));
  const auto want = plain(request);
  for (int round = 0; round < 3; ++round) {
    auto given = request;
    given.inputs = copy_of(request.inputs);
    given.inputs[2].toTensor()[0][5].fill_(20 + round);  // else the whole row is known
    const auto got = cache.forward(given.inputs).toTensor();
    EXPECT_TRUE(close_on_real(got, plain(given), request, tolerance()));
    got.fill_(1e6);
    for (auto& input : given.inputs) input.toTensor().fill_(1);
  }
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(9));
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance()));
}

TEST_P(EncoderDecoder, IdenticalStaysIdentical) {
  // What was computed from a kept source is equal up to rounding only.
  auto cache = cache_with({});
  auto batch = rows({{9, 6}}, 15);
  (void)cache.forward(request_of(profile(), batch).inputs, {.output = Output::kLastToken});
  batch[0].target[0] = 33;
  const auto request = request_of(profile(), batch);
  (void)cache.forward(request.inputs);
  EXPECT_THAT(reused_of_source(cache), ::testing::ElementsAre(9));
  EXPECT_TRUE(same_bits(cache.forward(request.inputs, {.fidelity = Fidelity::kIdentical}), plain(request)));
}

TEST_P(EncoderDecoder, BadInputsAreNamed) {
  const auto request = request_of(profile(), rows({{9, 6}, {5, 6}}, 11));
  const auto changed = [&](std::size_t input, const at::Tensor& value) {
    Inputs inputs = request.inputs;
    inputs[input] = value;
    return [this, inputs] { (void)model().cache.forward(inputs); };
  };
  const auto ids = request.inputs[0].toTensor();
  EXPECT_THAT(changed(0, ids.narrow(0, 0, 1)), ThrowsError(ErrorCode::kInvalidInput, "both must have as many rows"));
  EXPECT_THAT(changed(1, ids.narrow(1, 0, 4)),
              ThrowsError(ErrorCode::kInvalidInput, "input 1 ('attention_mask') is [2, 4], but input 0 ('input_ids')"));
  auto far = ids.clone();
  far[1][3].fill_(300);
  EXPECT_THAT(changed(0, far), ThrowsError(ErrorCode::kInvalidInput, "'input_ids' holds 300 in row 1 at position 3"));
  auto target = request.inputs[2].toTensor().clone();
  target[0][5].fill_(-1);
  EXPECT_THAT(changed(2, target), ThrowsError(ErrorCode::kInvalidInput, "holds -1 in row 0 at position 5"));
  if (masked()) {
    EXPECT_THAT(changed(3, ids), ThrowsError(ErrorCode::kInvalidInput, "both must have one entry a token"));
  }
  // Padding may hold what it likes.
  auto padding = request;
  padding.inputs[0] = ids.clone();
  padding.inputs[0].toTensor()[1][8].fill_(299);
  EXPECT_TRUE(close_on_real(model().cache.forward(padding.inputs), plain(padding), padding, tolerance()));
}

INSTANTIATE_TEST_SUITE_P(Seq2Seq, EncoderDecoder, ::testing::ValuesIn(model_names({"seq2seq-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, EncoderDecoder, ::testing::ValuesIn(program_names({"seq2seq-"})), test_name);

/// T5 takes any length, the others have a table of positions.
class EncoderDecoderWithPositions : public EncoderDecoder {};

TEST_P(EncoderDecoderWithPositions, WhatFailsLeavesTheCacheAsItWas) {
  auto cache = cache_with({});
  const auto good = request_of(profile(), rows({{9, 6}}, 16));
  (void)cache.forward(good.inputs);
  const auto before = counters_of(cache);
  const auto longer = request_of(profile(), rows({{300, 6}, {9, 6}}, 17));  // than its table of positions
  EXPECT_THAT([&] { (void)cache.forward(longer.inputs); },
              ThrowsError(ErrorCode::kInvalidInput, "source 0 has 300 tokens, the model has positions for"));
  EXPECT_EQ(counters_of(cache), before);
}

std::vector<std::string> with_positions(std::vector<std::string> names) {
  std::erase_if(names, [](const std::string& name) { return name.starts_with("seq2seq-t5"); });
  return names;
}

INSTANTIATE_TEST_SUITE_P(Seq2Seq, EncoderDecoderWithPositions,
                         ::testing::ValuesIn(with_positions(model_names({"seq2seq-"}))), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, EncoderDecoderWithPositions,
                         ::testing::ValuesIn(with_positions(program_names({"seq2seq-"}))), test_name);

TEST(EncoderDecoderModels, TheExpectedOnesAreThere) {
  EXPECT_THAT(model_names({"seq2seq-"}),
              ::testing::IsSupersetOf({"seq2seq-t5", "seq2seq-bart", "seq2seq-marian", "seq2seq-mbart",
                                       "seq2seq-pegasus", "seq2seq-t5-eager-masked", "seq2seq-bart-eager",
                                       "seq2seq-bart-masked", "seq2seq-bart-bf16"}));
  EXPECT_THAT(program_names({"seq2seq-"}), ::testing::IsSupersetOf({"seq2seq-t5.pt2", "seq2seq-bart.pt2",
                                                                    "seq2seq-marian.pt2", "seq2seq-bart-masked.pt2"}));
}

}  // namespace
}  // namespace llmcache::test
