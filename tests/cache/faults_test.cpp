// Bad input, models that fail, plans that do not fit: the right error, and a cache that is as before.
#include <functional>
#include <limits>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

class Faults : public ::testing::Test {
 protected:
  explicit Faults(const std::string& name = "tiny-scripted") : model_(subject(name)), cache_(load_model(name)) {
    known_ = right_padded(model_.info, {9, 4}, 1);
    cache_.forward(known_.inputs);
  }

  c10::IValue plain(const Inputs& inputs) { return run_plain(model_.plain, inputs); }

  /// The call is refused; then everything is as before, and works.
  void expect_refused(const Inputs& inputs, ErrorCode code, const std::string& part) {
    const auto before = counters_of(cache_);
    const auto rows_before = cache_.last_report().sequences.size();
    EXPECT_THAT([&] { cache_.forward(inputs); }, ThrowsError(code, part));
    EXPECT_THAT([&] { cache_.forward(inputs, {.fidelity = Fidelity::kIdentical}); }, ThrowsError(code, part));
    EXPECT_EQ(counters_of(cache_), before);
    EXPECT_EQ(cache_.last_report().sequences.size(), rows_before);
    EXPECT_TRUE(close_on_real(cache_.forward(known_.inputs), plain(known_.inputs), known_, 1e-4));
    EXPECT_EQ(cache_.last_report().execution, Execution::kNone) << "what was known is forgotten";
    const auto fresh = right_padded(model_.info, {5, 8, 2}, ++seed_);
    EXPECT_TRUE(close_on_real(cache_.forward(fresh.inputs), plain(fresh.inputs), fresh, 1e-4));
  }
  void expect_invalid(const Inputs& inputs, const std::string& part) {
    expect_refused(inputs, ErrorCode::kInvalidInput, part);
    EXPECT_THAT([&] { return cache_.full_plan(inputs); }, ThrowsError(ErrorCode::kInvalidInput, part));
  }

  Subject& model_;
  LayerCache<Module> cache_;
  Request known_;
  std::uint64_t seed_ = 100;
};

TEST_F(Faults, WrongNumberOfInputs) {
  expect_invalid({}, "0 inputs given, 2 expected: input_ids, attention_mask");
  expect_invalid({known_.ids()}, "1 inputs given, 2 expected");
  expect_invalid({known_.ids(), known_.mask(), known_.mask()}, "3 inputs given, 2 expected");
}

TEST_F(Faults, WrongKindsOfInputs) {
  expect_invalid({known_.ids(), c10::IValue()}, "input 1 ('attention_mask') is None");
  expect_invalid({c10::IValue(), known_.mask()}, "input 0 ('input_ids') is None");
  expect_invalid({known_.ids(), at::Tensor()}, "input 1 ('attention_mask')");
  expect_invalid({at::Tensor(), known_.mask()}, "input 0 ('input_ids')");
  expect_invalid({known_.ids(), std::int64_t{1}}, "is a Int, a tensor [batch, tokens] is expected");
  expect_invalid({std::string("text"), known_.mask()}, "is a String");
  expect_invalid({std::vector<at::Tensor>{known_.ids()}, known_.mask()}, "is a GenericList");
}

TEST_F(Faults, WrongTypesOfInputs) {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kComplexFloat}) {
    expect_invalid({known_.ids().to(type), known_.mask()}, std::string("has type ") + c10::toString(type));
    expect_invalid({known_.ids(), known_.mask().to(type)}, "input 1 ('attention_mask')");
  }
}

TEST_F(Faults, WrongRanksOfInputs) {
  expect_invalid({at::scalar_tensor(5, at::kLong), known_.mask()}, "has 0 dimensions");
  expect_invalid({at::tensor({5, 6}, at::kLong), known_.mask()}, "has 1 dimensions [2], 2 are expected");
  expect_invalid({known_.ids().unsqueeze(0), known_.mask()}, "has 3 dimensions [1, 2, 9]");
  expect_invalid({known_.ids(), known_.mask().unsqueeze(1)}, "input 1 ('attention_mask') has 3 dimensions");
}

TEST_F(Faults, WrongShapesOfMasks) {
  expect_invalid({known_.ids(), at::ones({2, 8}, at::kLong)}, "input 1 ('attention_mask') is [2, 8], but input 0");
  expect_invalid({known_.ids(), at::ones({1, 9}, at::kLong)}, "is [1, 9]");
  expect_invalid({known_.ids(), at::ones({3, 9}, at::kLong)}, "is [3, 9]");
  expect_invalid({known_.ids(), at::ones({9, 2}, at::kLong)}, "is [9, 2]");
  expect_invalid({known_.ids(), at::ones({2, 0}, at::kLong)}, "is [2, 0]");
}

TEST_F(Faults, WrongDevice) {
  expect_invalid({known_.ids().to(at::kMeta), known_.mask()}, "is on meta, the model on cpu");
  expect_invalid({known_.ids(), known_.mask().to(at::kMeta)}, "is on meta, the model on cpu");
}

TEST_F(Faults, IdsOutOfRange) {
  for (const std::int64_t id : {std::int64_t{300}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
    auto inputs = Inputs(copy_of(known_.inputs));
    inputs[0].toTensor()[1][2].fill_(id);
    ASSERT_ANY_THROW(plain(inputs));
    expect_refused(inputs, ErrorCode::kInvalidInput, "in row 1 at position 2");
  }
}

TEST_F(Faults, MoreTokensThanTheModelTakes) {
  const auto request = right_padded(model_.info, {260}, 2);
  ASSERT_ANY_THROW(plain(request.inputs));
  expect_refused(request.inputs, ErrorCode::kInvalidInput, "row 0 has 260 tokens");
}

class FaultsInTheModel : public Faults {
 protected:
  FaultsInTheModel() : Faults("tiny-throws") {}
};

TEST_F(FaultsInTheModel, ExceptionsAreNestedAndLeaveNothing) {
  auto inputs = Inputs(copy_of(known_.inputs));
  inputs[0].toTensor()[0][5].fill_(7);
  expect_refused(inputs, ErrorCode::kModelFailed, "an input id was 7");
  // A row that is known beside one that makes the model fail.
  auto mixed = Inputs(copy_of(known_.inputs));
  mixed[0].toTensor()[1][0].fill_(7);
  expect_refused(mixed, ErrorCode::kModelFailed, "an input id was 7");
}

// --- unusual, but what the model takes the cache must take --------------------------------------------

class FaultsNotToMake : public ::testing::TestWithParam<std::string> {
 protected:
  FaultsNotToMake() : model_(subject(GetParam())), cache_(load_model(GetParam())) {}

  /// Does what the plain model does: returns the same, or fails.
  void expect_as_plain(const Inputs& inputs) {
    c10::IValue want;
    bool fails = false;
    try {
      want = run_plain(model_.plain, inputs);
    } catch (const std::exception&) {
      fails = true;
    }
    for (const auto fidelity : {Fidelity::kLossless, Fidelity::kIdentical}) {
      SCOPED_TRACE(to_string(fidelity));
      if (fails) {
        EXPECT_THROW(cache_.forward(inputs, {.fidelity = fidelity}), Error);
      } else {
        c10::IValue got;
        ASSERT_NO_THROW(got = cache_.forward(inputs, {.fidelity = fidelity}));
        EXPECT_TRUE(same_bits(got, want));
      }
    }
  }

  Subject& model_;
  LayerCache<Module> cache_;
};

TEST_P(FaultsNotToMake, EmptyBatchesAndSequences) {
  for (const auto& shape : std::vector<std::vector<std::int64_t>>{{0, 5}, {3, 0}, {0, 0}, {1, 0}}) {
    SCOPED_TRACE(::testing::PrintToString(shape));
    Inputs inputs;
    while (inputs.size() < model_.info.inputs) inputs.emplace_back(at::ones(shape, at::kLong));
    expect_as_plain(inputs);
    EXPECT_EQ(cache_.stats().entries, 0U);
    EXPECT_EQ(cache_.stats().tokens, 0U);
  }
}

TEST_P(FaultsNotToMake, BatchesOfPadding) {
  for (const std::int64_t rows : {1, 3}) {
    auto request = right_padded(model_.info, std::vector<std::int64_t>(static_cast<std::size_t>(rows), 5), 1);
    request.mask().zero_();
    expect_as_plain(request.inputs);
    EXPECT_EQ(cache_.stats().entries, 0U);
  }
}

TEST_P(FaultsNotToMake, RowsOfPaddingBesideKnownOnes) {
  const auto request = right_padded(model_.info, {0, 6, 0, 9}, 2);
  const auto want = run_plain(model_.plain, request.inputs);
  for (const auto fidelity : {Fidelity::kLossless, Fidelity::kIdentical, Fidelity::kLossless, Fidelity::kIdentical}) {
    const auto got = cache_.forward(request.inputs, {.fidelity = fidelity});
    EXPECT_TRUE(close_on_real(got, want, request, tolerance_of(model_.info)));
    ASSERT_EQ(cache_.last_report().sequences.size(), 4U);
    EXPECT_EQ(cache_.last_report().sequences[0].tokens, 0);
    if (runs_plainly(request, want)) {
      EXPECT_TRUE(same_bits(got, want)) << "the rows of padding too";
    }
  }
  const auto source = runs_plainly(request, want) ? Source::kComputed : Source::kIdentical;
  EXPECT_EQ(cache_.last_report().sequences[3].source, source);
}

INSTANTIATE_TEST_SUITE_P(Tiny, FaultsNotToMake,
                         ::testing::Values("tiny-scripted", "tiny-bert-sdpa", "tiny-bert-types-sdpa",
                                           "tiny-bert-pooled", "tiny-gpt2-eager", "tiny-llama-sdpa-bf16"),
                         test_name);

TEST(FaultsOfWeights, NanGoesThroughAsItIs) {
  Subject& model = subject("tiny-nan");
  LayerCache<Module> cache(load_model("tiny-nan"));
  for (const auto& request : {right_padded(model.info, {9, 9}, 1), right_padded(model.info, {9, 2}, 2)}) {
    const auto want = run_plain(model.plain, request.inputs).toTensor();
    ASSERT_TRUE(want.isnan().any().item<bool>());
    for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless, Fidelity::kIdentical, Fidelity::kLossless}) {
      const auto got = cache.forward(request.inputs, {.fidelity = fidelity}).toTensor();
      for (std::int64_t row = 0; row < request.rows(); ++row) {
        const auto real = [&](const at::Tensor& t) { return t[row].narrow(0, 0, request.spans[row].tokens); };
        EXPECT_TRUE(at::allclose(real(got), real(want), 1e-4, 1e-5, /*equal_nan=*/true));
      }
    }
  }
}

// --- plans ------------------------------------------------------------------------------------------

class Plans : public ::testing::Test {
 protected:
  Plans() : model_(subject("tiny-scripted")), request_(right_padded(model_.info, {9, 4}, 1)) {
    plan_ = model_.cache.full_plan(request_.inputs);
    model_.cache.forward_plan(request_.inputs, plan_, {}, &donors_);
  }

  /// Plan::validate itself says no.
  static void expect_invalid(const Plan& plan, const std::string& part, std::size_t donors = 2) {
    EXPECT_THAT([&] { plan.validate(donors); }, ThrowsError(ErrorCode::kInvalidOptions, part)) << plan.to_string();
  }
  void expect_unfit(const Plan& plan, const std::string& part) { expect_unfit(plan, donors_, part); }
  void expect_unfit(const Plan& plan, const Donors& donors, const std::string& part,
                    ErrorCode code = ErrorCode::kInvalidOptions) {
    const auto before = counters_of(model_.cache);
    EXPECT_THAT([&] { model_.cache.forward_plan(request_.inputs, plan, donors); }, ThrowsError(code, part));
    EXPECT_EQ(counters_of(model_.cache), before);
    const auto got = model_.cache.forward_plan(request_.inputs, plan_);
    EXPECT_TRUE(close_on_real(got, run_plain(model_.plain, request_.inputs), request_, 1e-4));
  }
  /// Row 0 takes token 8 from layer `first` on, all else from donor 0.
  [[nodiscard]] Plan partial(std::int32_t first = 0, std::int32_t last = 3) const {
    auto plan = plan_;
    plan.sequences[0] = {0, 0, 9, 0, {{0, 8, 0, 0, 0}, {8, 9, first, last, 8}}};
    return plan;
  }
  std::shared_ptr<SequenceState> copy_of_donor() const { return std::make_shared<SequenceState>(*donors_[0]); }

  Subject& model_;
  Request request_;
  Plan plan_;
  Donors donors_;
};

TEST_F(Plans, ComputeAllAndSome) {
  EXPECT_NO_THROW(plan_.validate(0));
  EXPECT_NO_THROW(partial().validate(1));
  const auto all = compute_all(2, 1, 5, 3);
  EXPECT_TRUE(all.computes_all(3));
  EXPECT_FALSE(all.computes_all(4));
  EXPECT_TRUE(all.active(4, 2));
  EXPECT_FALSE(all.active(5, 2));
  EXPECT_FALSE(all.active(0, 3));
  const auto some = compute_some(0, 0, 6, 3, {1, 2, 5}, 7);
  EXPECT_EQ(some.donor, 7);
  EXPECT_FALSE(some.computes_all(3));
  for (std::int64_t token = 0; token < 6; ++token) {
    EXPECT_EQ(some.active(token, 1), token == 1 || token == 2 || token == 5) << token;
  }
  EXPECT_EQ(some.ranges.size(), 4U);
  const auto none = compute_some(0, 0, 6, 3, {}, 0);
  ASSERT_EQ(none.ranges.size(), 1U);
  EXPECT_EQ(none.ranges[0].last_layer, 0);
  for (const auto& wrong : std::vector<std::vector<std::int64_t>>{{6}, {-1}, {2, 1}, {1, 1}}) {
    EXPECT_THAT([&] { compute_some(0, 0, 6, 3, wrong, 0); }, ThrowsError(ErrorCode::kInvalidOptions, "active token"));
  }
}

TEST_F(Plans, ThatAreWrongInThemselves) {
  constexpr auto kHuge = std::numeric_limits<std::int64_t>::max();
  const auto with = [&](const std::function<void(Plan&)>& change) {
    auto plan = partial();
    change(plan);
    return plan;
  };
  using P = Plan&;
  expect_invalid(with([](P p) { p.rows = -1; }), "-1 rows");
  expect_invalid(with([](P p) { p.padded_length = -1; }), "padded length -1");
  expect_invalid(with([](P p) { p.layers = 0; }), "layers 0");
  expect_invalid(with([](P p) { p.sequences[1].row = 2; }), "sequence 1: row 2");
  expect_invalid(with([](P p) { p.sequences[1].row = 0; }), "sequence 1: row 0 is out of order");
  expect_invalid(with([](P p) { p.sequences[0].row = -1; }), "sequence 0: row -1");
  expect_invalid(with([](P p) { p.sequences[0].tokens = 0; }), "0 tokens from position 0");
  expect_invalid(with([](P p) { p.sequences[0].first = 1; }),
                 "9 tokens from position 1 do not fit into a padded length of 9");
  expect_invalid(with([](P p) { p.sequences[0].first = -1; }), "from position -1");
  expect_invalid(with([](P p) { p.sequences[0].first = kHuge; }), "do not fit");
  expect_invalid(with([](P p) { p.sequences[0].tokens = kHuge; }), "do not fit");
  expect_invalid(with([](P p) { p.sequences[0].donor = 2; }), "donor 2 of 2");
  expect_invalid(with([](P p) { p.sequences[0].donor = -2; }), "donor -2");
  expect_invalid(partial(), "donor 0 of 0", 0);
  expect_invalid(with([](P p) { p.sequences[0].ranges[1].begin = 7; }), "leaves a gap, overlaps");
  expect_invalid(with([](P p) { p.sequences[0].ranges[0].end = 7; }), "7 was expected");
  expect_invalid(with([](P p) { p.sequences[0].ranges[0].begin = 1; }), "0 was expected next");
  expect_invalid(with([](P p) { p.sequences[0].ranges[0].end = 0; }), "is empty");
  expect_invalid(with([](P p) { p.sequences[0].ranges.pop_back(); }), "its ranges end at 8, it has 9 tokens");
  expect_invalid(with([](P p) { p.sequences[0].ranges.clear(); }), "its ranges end at 0");
  expect_invalid(with([](P p) { p.sequences[0].ranges[1].end = 10; }), "its ranges end at 10");
  expect_invalid(with([](P p) { p.sequences[0].ranges[1].first_layer = -1; }), "layers [-1, 3)");
  expect_invalid(with([](P p) { p.sequences[0].ranges[1].last_layer = 4; }), "layers [0, 4) of 3");
  expect_invalid(with([](P p) { p.sequences[0].ranges[0] = {0, 8, 2, 1, 0}; }), "layers [2, 1)");
  expect_invalid(with([](P p) { p.sequences[0].donor = -1; }), "tokens [0, 8) are not computed in every layer");
  expect_invalid(with([](P p) { p.sequences[0].ranges[0].donor_begin = -1; }), "have no donor");
}

TEST_F(Plans, OfOtherInputs) {
  const auto with = [&](const std::function<void(Plan&)>& change) {
    auto plan = plan_;
    change(plan);
    return plan;
  };
  expect_unfit(with([](Plan& p) { p.padded_length = 10; }), "made for 2 rows, padded length 10");
  expect_unfit(with([](Plan& p) { p.rows = 3; }), "made for 3 rows");
  expect_unfit(with([](Plan& p) {
                 p.layers = 4;
                 for (auto& sequence : p.sequences) sequence = compute_all(sequence.row, 0, sequence.tokens, 4);
               }),
               "4 layers");
  expect_unfit(with([](Plan& p) { p.sequences.clear(); }), "row 0 has real tokens, but no sequence");
  expect_unfit(with([](Plan& p) { p.sequences.pop_back(); }), "row 1 has real tokens, but no sequence");
  expect_unfit(with([](Plan& p) { p.sequences[1] = compute_all(1, 0, 5, 3); }), "row 1 has 4 real tokens");
  expect_unfit(with([](Plan& p) { p.sequences[1] = compute_all(1, 1, 3, 3); }), "the plan says 3 from 1");
  expect_unfit(with([](Plan& p) { p.sequences[0].ranges.clear(); }), "its ranges end at 0");
}

TEST_F(Plans, MasksWithHolesAndWithoutAnyToken) {
  auto holes = right_padded(model_.info, {9, 4}, 1);
  holes.mask()[0][3].fill_(0);
  EXPECT_THAT([&] { return model_.cache.full_plan(holes.inputs); }, ThrowsError(ErrorCode::kInvalidInput, "holes"));
  auto padding = right_padded(model_.info, {3}, 1);
  padding.mask().zero_();
  const auto plan = model_.cache.full_plan(padding.inputs);
  EXPECT_TRUE(plan.sequences.empty());
  EXPECT_THAT([&] { model_.cache.forward_plan(padding.inputs, plan); },
              ThrowsError(ErrorCode::kInvalidOptions, "no sequence"));
}

TEST_F(Plans, DonorsThatDoNotServe) {
  expect_unfit(partial(), {}, "donor 0 of 0");
  expect_unfit(partial(), {nullptr, nullptr}, "donor 0 is null");
  auto shifted = partial();
  shifted.sequences[0].ranges[0].donor_begin = 2;
  expect_unfit(shifted, "from position 2 of a donor of 9");
  shifted.sequences[0].ranges[0].donor_begin = std::numeric_limits<std::int64_t>::max() - 3;
  expect_unfit(shifted, "of a donor of 9");
  auto other = partial();
  other.sequences[0].donor = 1;
  expect_unfit(other, "of a donor of 4");

  auto empty = std::make_shared<SequenceState>();
  empty->tokens = 9;
  expect_unfit(partial(), {empty}, "row 0: its donor has no");
  auto without_final = copy_of_donor();
  without_final->hidden.back() = at::Tensor();
  expect_unfit(partial(), {without_final}, "no final state");
  auto without_resume = copy_of_donor();
  without_resume->hidden[1] = at::Tensor();
  expect_unfit(partial(1), {without_resume}, "no hidden state before layer 1");
  auto without_keys = copy_of_donor();
  without_keys->keys[1].clear();
  expect_unfit(partial(), {without_keys}, "no keys of layer 1");
  auto fewer_layers = copy_of_donor();
  fewer_layers->keys.pop_back();
  expect_unfit(partial(), {fewer_layers}, "");
}

TEST_F(Plans, DonorsOfAnotherModel) {
  auto without_tensors = copy_of_donor();
  without_tensors->keys[1][0].clear();
  expect_unfit(partial(), {without_tensors}, "");
  auto other_shape = copy_of_donor();
  for (at::Tensor& hidden : other_shape->hidden) hidden = at::zeros({1, 9, 32});
  expect_unfit(partial(), {other_shape}, "");
  auto other_type = copy_of_donor();
  for (at::Tensor& hidden : other_type->hidden) hidden = hidden.to(at::kDouble);
  expect_unfit(partial(), {other_type}, "");
  auto fewer_tokens = copy_of_donor();
  for (auto& layer : fewer_tokens->keys) {
    for (at::Tensor& key : layer[0]) {
      for (std::int64_t dim = 0; dim < key.dim(); ++dim) {
        if (key.size(dim) == 9) key = key.narrow(dim, 0, 5);
      }
    }
  }
  expect_unfit(partial(), {fewer_tokens}, "");
  // Of another architecture with as many layers, and attention operators of another kind.
  Subject& gpt2 = subject("tiny-gpt2-eager");
  const auto request = right_padded(gpt2.info, {9}, 1);
  Donors foreign;
  gpt2.cache.forward_plan(request.inputs, gpt2.cache.full_plan(request.inputs), {}, &foreign);
  auto longer = std::make_shared<SequenceState>(*foreign[0]);
  for (auto& layer : longer->keys) {
    for (auto& attention_op : layer) attention_op.resize(1);
  }
  expect_unfit(partial(), {longer}, "");
}

TEST_F(Plans, CapturedStatesAreOwnCopies) {
  auto plan = partial();
  const auto before = model_.cache.forward_plan(request_.inputs, plan, donors_);
  Donors captured;
  auto got = model_.cache.forward_plan(request_.inputs, plan_, {}, &captured).toTensor();
  got.fill_(5);
  EXPECT_TRUE(same_bits(model_.cache.forward_plan(request_.inputs, plan, captured), before));
}

}  // namespace
}  // namespace llmcache::test
