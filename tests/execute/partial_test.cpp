// Forced plans: any set of tokens through any range of layers, the rest from a donor.
#include <numeric>
#include <random>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

std::vector<std::int64_t> tokens_from(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(std::max<std::int64_t>(end - begin, 0)));
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

class Partial : public ModelTest {
 protected:
  void SetUp() override {
    ModelTest::SetUp();
    if (refused() || profile().granularity != Granularity::kWholeLayers) return;
    // The model says that it cannot: then it must not.
    const auto request = right_padded(info(), {6, 6}, 1);
    EXPECT_THAT([&] { cache().forward_plan(request.inputs, cache().full_plan(request.inputs)); },
                ThrowsError(ErrorCode::kNotAvailable, "whole layers"));
  }

  [[nodiscard]] bool runs_some_tokens() const { return !refused() && profile().granularity == Granularity::kTokens; }
  [[nodiscard]] std::int32_t layers() const { return static_cast<std::int32_t>(profile().layers); }
  [[nodiscard]] bool layers_may_differ() const {
    return ::testing::Value(profile().notes,
                            ::testing::Not(::testing::Contains(HasSubstr("all layers run the same tokens"))));
  }
  /// Lengths as asked for where padding works, else all the longest.
  [[nodiscard]] Request ragged(std::vector<std::int64_t> lengths, std::uint64_t seed) const {
    if (profile().mask_argument < 0) lengths.assign(lengths.size(), *std::max_element(lengths.begin(), lengths.end()));
    return right_padded(info(), lengths, seed);
  }

  Donors capture(const Request& request) {
    Donors donors;
    cache().forward_plan(request.inputs, cache().full_plan(request.inputs), {}, &donors);
    return donors;
  }

  /// Runs `sequences` and expects the plain model's result.
  void expect_plain(const Request& request, std::vector<SequencePlan> sequences, const Donors& donors,
                    Donors* captured = nullptr) {
    const Plan plan{request.rows(), request.padded_length, layers(), std::move(sequences)};
    SCOPED_TRACE(plan.to_string());
    c10::IValue got;
    ASSERT_NO_THROW(got = cache().forward_plan(request.inputs, plan, donors, captured));
    EXPECT_TRUE(close_on_real(got, plain(request.inputs), request, tolerance_of(info())));
    EXPECT_EQ(report().execution, Execution::kPacked);
  }
};

TEST_P(Partial, AllTokensAndWhatIsCaptured) {
  if (!runs_some_tokens()) return;
  const auto request = ragged({7, 12, 3}, 1);
  const auto plan = cache().full_plan(request.inputs);
  const auto before = counters_of(cache());
  Donors donors;
  const auto got = cache().forward_plan(request.inputs, plan, {}, &donors);
  EXPECT_TRUE(close_on_real(got, plain(request.inputs), request, tolerance_of(info())));
  EXPECT_TRUE(padding_is_zero(got, request));
  EXPECT_TRUE(same_bits(cache().forward_plan(request.inputs, plan), got)) << "capturing changes the result";
  EXPECT_EQ(counters_of(cache()), before) << "a forced plan must leave cache and statistics alone";
  ASSERT_EQ(donors.size(), 3U);
  for (std::size_t row = 0; row < 3; ++row) {
    const SequenceState& state = *donors[row];
    const auto tokens = request.spans[row].tokens;
    EXPECT_EQ(state.tokens, tokens);
    ASSERT_EQ(state.hidden.size(), static_cast<std::size_t>(layers()) + 1);
    std::size_t bytes = 0;
    for (const at::Tensor& hidden : state.hidden) {
      EXPECT_EQ(hidden.sizes(), at::IntArrayRef({1, tokens, info().hidden}));
      bytes += hidden.nbytes();
    }
    ASSERT_EQ(state.keys.size(), static_cast<std::size_t>(layers()));
    for (const auto& layer : state.keys) {
      ASSERT_FALSE(layer.empty());
      for (const auto& attention_op : layer) {
        EXPECT_FALSE(attention_op.empty());
        for (const at::Tensor& key : attention_op) {
          EXPECT_TRUE(::testing::Value(key.sizes().vec(), ::testing::Contains(tokens))) << key.sizes();
          bytes += key.nbytes();
        }
      }
    }
    EXPECT_EQ(state.bytes(), bytes);
  }
}

TEST_P(Partial, SomeTokensOfTheSameInput) {
  if (!runs_some_tokens()) return;
  const auto request = right_padded(info(), {19}, 2);
  const auto donors = capture(request);
  for (const auto& active : {tokens_from(18, 19), tokens_from(15, 19), tokens_from(0, 4), tokens_from(0, 19),
                             std::vector<std::int64_t>{}, std::vector<std::int64_t>{0, 3, 4, 9, 17}}) {
    expect_plain(request, {compute_some(0, 0, 19, layers(), active, 0)}, donors);
  }
}

TEST_P(Partial, SequencesOfABatchDecideForThemselves) {
  if (!runs_some_tokens()) return;
  const auto request = ragged({11, 6, 14, 9, 2}, 3);
  const auto donors = capture(request);
  const auto length = [&](std::int64_t row) { return request.spans[static_cast<std::size_t>(row)].tokens; };
  const auto some = [&](std::int64_t row, const std::vector<std::int64_t>& active) {
    return compute_some(row, 0, length(row), layers(), active, static_cast<std::int32_t>(row));
  };
  expect_plain(request,
               {some(0, tokens_from(length(0) - 3, length(0))), compute_all(1, 0, length(1), layers()), some(2, {}),
                some(3, {0, 2, 7}), some(4, {1})},
               donors);
  const auto sequences = report().sequences;
  ASSERT_EQ(sequences.size(), 5U);
  EXPECT_EQ(sequences[1].source, Source::kComputed);
  EXPECT_EQ(sequences[2].source, Source::kPartial);
  const std::int64_t computed[] = {3, length(1), 0, 3, 1};
  for (std::size_t row = 0; row < 5; ++row) {
    ASSERT_EQ(sequences[row].layers.size(), static_cast<std::size_t>(layers()));
    for (const LayerTokens& layer : sequences[row].layers) {
      EXPECT_EQ(layer.computed, computed[row]);
      EXPECT_EQ(layer.computed + layer.reused, request.spans[row].tokens);
    }
  }
}

TEST_P(Partial, RowsOfPaddingAreLeftOut) {
  if (!runs_some_tokens() || profile().mask_argument < 0) return;
  const auto request = right_padded(info(), {0, 8, 0, 5, 0}, 4);
  const auto donors = capture(request);
  ASSERT_EQ(donors.size(), 2U);
  expect_plain(request,
               {compute_some(1, 0, 8, layers(), {2, 6}, 0), compute_some(3, 0, 5, layers(), tokens_from(3, 5), 1)},
               donors);
}

TEST_P(Partial, LeftPaddedRows) {
  if (!runs_some_tokens() || profile().mask_argument < 0) return;
  const auto request = left_padded(info(), {5, 13, 8}, 5);
  const auto plan = cache().full_plan(request.inputs);
  if (!profile().left_padding) {
    EXPECT_THAT([&] { cache().forward_plan(request.inputs, plan); },
                ThrowsError(ErrorCode::kNotAvailable, "left-padded"));
    return;
  }
  const auto donors = capture(request);
  expect_plain(request,
               {compute_some(0, 8, 5, layers(), tokens_from(2, 5), 0), compute_some(1, 0, 13, layers(), {1, 12}, 1),
                compute_some(2, 5, 8, layers(), {}, 2)},
               donors);
}

TEST_P(Partial, LayersDecideForThemselves) {
  if (!runs_some_tokens()) return;
  const auto request = ragged({10, 7}, 6);
  const auto donors = capture(request);
  const std::int32_t last = layers();
  const std::vector<std::vector<TokenRange>> cases{
      {{0, 7, 1, last, 0}},                                       // resumes from the donor's state
      {{0, 7, 0, last - 1, 0}},                                   // leaves early: the final state is the donor's
      {{0, 7, 1, 2, 0}},                                          // both
      {{0, 7, 2, 2, 0}},                                          // not at all
      {{0, 3, 0, last, 0}, {3, 7, last - 1, last, 3}},            // a tail that joins late
      {{0, 2, 0, 1, 0}, {2, 5, 1, last, 2}, {5, 7, 0, last, 5}},  // everything at once
      {{0, 4, 0, 1, 0}, {4, 7, last - 1, last, 4}}};              // nobody runs in between
  for (const auto& ranges : cases) {
    auto longer = ranges;
    longer.back().end = request.spans[0].tokens;
    auto other = ranges;
    other.back().end = request.spans[1].tokens;
    std::vector<SequencePlan> sequences{{0, 0, request.spans[0].tokens, 0, longer},
                                        {1, 0, request.spans[1].tokens, 1, other}};
    if (layers_may_differ()) {
      expect_plain(request, sequences, donors);
      // Beside a row that is computed whole.
      expect_plain(request, {compute_all(0, 0, request.spans[0].tokens, last), sequences[1]}, donors);
    } else if (ranges[0].first_layer != ranges[0].last_layer) {
      const Plan plan{2, request.padded_length, last, sequences};
      EXPECT_THAT([&] { cache().forward_plan(request.inputs, plan, donors); },
                  ThrowsError(ErrorCode::kNotAvailable, "same tokens"));
    }
  }
}

TEST_P(Partial, RandomPlans) {
  if (!runs_some_tokens() || !layers_may_differ()) return;
  const auto request = ragged({13, 1, 9, 6}, 7);
  const auto donors = capture(request);
  std::mt19937 random(7);
  const auto up_to = [&](std::int64_t n) { return std::uniform_int_distribution<std::int64_t>(0, n)(random); };
  for (int round = 0; round < 12; ++round) {
    std::vector<SequencePlan> sequences;
    for (std::int32_t row = 0; row < 4; ++row) {
      const auto tokens = request.spans[static_cast<std::size_t>(row)].tokens;
      SequencePlan sequence{row, 0, tokens, row, {}};
      for (std::int64_t begin = 0; begin < tokens;) {
        const std::int64_t end = std::min(tokens, begin + 1 + up_to(4));
        const auto first = static_cast<std::int32_t>(up_to(layers()));
        const auto last = static_cast<std::int32_t>(first + up_to(layers() - first));
        sequence.ranges.push_back({begin, end, first, last, begin});
        begin = end;
      }
      sequences.push_back(std::move(sequence));
    }
    expect_plain(request, std::move(sequences), donors);
  }
}

TEST_P(Partial, ThePrefixOfAnotherInput) {
  if (!runs_some_tokens()) return;
  // Two inputs with 12 tokens in common; the second runs on the first one's states.
  const auto first = right_padded(info(), {16}, 8);
  auto second = right_padded(info(), {19}, 9);
  for (std::size_t i = 0; i < first.inputs.size(); ++i) {
    second.inputs[i].toTensor().narrow(1, 0, 12).copy_(first.inputs[i].toTensor().narrow(1, 0, 12));
  }
  ASSERT_FALSE(at::equal(second.ids().narrow(1, 12, 4), first.ids().narrow(1, 12, 4)));
  const auto donors = capture(first);
  const auto plan = compute_some(0, 0, 19, layers(), tokens_from(12, 19), 0);
  if (profile().causal) {
    expect_plain(second, {plan}, donors);
    return;
  }
  // Every token of a bidirectional model sees all others: this must go wrong, or nothing was reused.
  if (info().name == "tiny-nan") return;  // NaN everywhere, whatever is done
  const auto got = cache().forward_plan(second.inputs, {1, 19, layers(), {plan}}, donors);
  EXPECT_GT(real_difference(got, plain(second.inputs), second), 2 * tolerance_of(info()));
}

TEST_P(Partial, TokenByToken) {
  if (!runs_some_tokens() || !profile().causal) return;
  // Generation: each step computes the new token and hands its states to the next.
  const auto whole = ragged({14, 9}, 10);
  const auto part = [&](std::int64_t tokens) {
    Request request{{}, {{0, tokens}, {0, std::min(tokens, whole.spans[1].tokens)}}, tokens};
    for (const auto& input : whole.inputs) request.inputs.emplace_back(input.toTensor().narrow(1, 0, tokens).clone());
    return request;
  };
  Donors donors = capture(part(5));
  for (std::int64_t tokens = 6; tokens <= 14; ++tokens) {
    const auto request = part(tokens);
    std::vector<SequencePlan> sequences;
    for (std::int32_t row = 0; row < 2; ++row) {
      const auto own = request.spans[static_cast<std::size_t>(row)].tokens;
      sequences.push_back(compute_some(row, 0, own, layers(), {own - 1}, row));
    }
    Donors next;
    expect_plain(request, std::move(sequences), donors, &next);
    donors = std::move(next);
  }
}

TEST_P(Partial, DonorPositionsMayBeElsewhere) {
  if (!runs_some_tokens()) return;
  // A donor that has three tokens of something else in front.
  const auto request = right_padded(info(), {13}, 11);
  const auto junk = capture(right_padded(info(), {3}, 12)).at(0);
  const auto own = capture(request).at(0);
  const auto join = [](const at::Tensor& front, const at::Tensor& back) {
    for (std::int64_t dim = 0; dim < back.dim(); ++dim) {
      if (front.size(dim) == 3 && back.size(dim) == 13) return at::cat({front, back}, dim);
    }
    return at::Tensor();
  };
  auto moved = std::make_shared<SequenceState>();
  moved->tokens = 16;
  for (std::size_t l = 0; l < own->hidden.size(); ++l) moved->hidden.push_back(join(junk->hidden[l], own->hidden[l]));
  moved->keys.resize(own->keys.size());
  for (std::size_t l = 0; l < own->keys.size(); ++l) {
    for (std::size_t s = 0; s < own->keys[l].size(); ++s) {
      auto& attention_op = moved->keys[l].emplace_back();
      for (std::size_t i = 0; i < own->keys[l][s].size(); ++i) {
        attention_op.push_back(join(junk->keys[l][s][i], own->keys[l][s][i]));
        ASSERT_TRUE(attention_op.back().defined());
      }
    }
  }
  auto plan = compute_some(0, 0, 13, layers(), {4, 5, 12}, 0);
  for (TokenRange& range : plan.ranges) range.donor_begin += 3;
  expect_plain(request, {plan}, {moved});
}

TEST_P(Partial, LayersThatNobodyNeedsAreNotRun) {
  if (!runs_some_tokens() || !layers_may_differ()) return;
  const auto request = right_padded(info(), {8}, 13);
  const auto donors = capture(request);
  expect_plain(request, {{0, 0, 8, 0, {{0, 8, 1, 2, 0}}}}, donors);
  ASSERT_EQ(report().layer_ms.size(), static_cast<std::size_t>(layers()));
  for (std::size_t l = 0; l < report().layer_ms.size(); ++l) {
    EXPECT_EQ(report().layer_ms[l] > 0, l == 1) << "layer " << l << " took " << report().layer_ms[l] << " ms";
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, Partial, ::testing::ValuesIn(wrappable_names({"tiny-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Zoo, Partial, ::testing::ValuesIn(wrappable_names({"zoo-"})), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, Partial,
                         ::testing::Values("tiny-bert-sdpa.pt2", "tiny-gpt2-eager.pt2", "zoo-t5-encoder.pt2"),
                         test_name);

}  // namespace
}  // namespace llmcache::test
