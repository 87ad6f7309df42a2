// Small TorchScript models that do unusual things: each is wrapped and right, or refused; never wrong.
#include <optional>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

class Generality : public ::testing::Test {
 protected:
  /// Changes of the script's source.
  void change_layer(const std::string& from, const std::string& to) {
    script_.layer = Script::with(script_.layer, from, to);
  }
  void change_model(const std::string& from, const std::string& to) {
    script_.forward = Script::with(script_.forward, from, to);
  }
  /// Adds a line in front of a layer's attention.
  void add_to_layer(const std::string& line) { change_layer("    q = ", "    " + line + "\n    q = "); }

  void wrap() {
    plain_.emplace(make_module(script_));
    cache_ = std::make_unique<LayerCache<Module>>(make_module(script_), Options{.capacity_bytes = 0});
    keeping_ = std::make_unique<LayerCache<Module>>(make_module(script_));
  }
  [[nodiscard]] const ModelProfile& profile() const { return cache_->profile(); }

  void expect_right(const Request& request) {
    const auto want = run_plain(*plain_, request.inputs);
    for (const auto fidelity : {Fidelity::kLossless, Fidelity::kIdentical}) {
      SCOPED_TRACE(::testing::Message() << to_string(fidelity) << ", mask\n" << request.mask());
      const auto got = cache_->forward(request.inputs, {.fidelity = fidelity});
      if (cache_->last_report().execution == Execution::kPacked) {
        EXPECT_EQ(fidelity, Fidelity::kLossless);
        EXPECT_TRUE(close_on_real(got, want, request, 1e-4));
      } else {
        EXPECT_TRUE(same_bits(got, want));
      }
    }
    // What a bank keeps of one batch must be right in another.
    const auto mixed = keeping_->forward(request.inputs);
    EXPECT_TRUE(close_on_real(mixed, want, request, 1e-4)) << keeping_->last_report().to_string();
    for (std::size_t row = 0; row < request.spans.size(); ++row) {
      if (request.spans[row].tokens == 0) continue;
      const auto alone = request.alone(row);
      const auto again = keeping_->forward(alone.inputs);
      EXPECT_TRUE(close_on_real(again, run_plain(*plain_, alone.inputs), alone, 1e-4))
          << "row " << row << " alone: " << keeping_->last_report().to_string();
    }
  }

  /// All kinds of batches; partial plans where the profile says that they work.
  void expect_right_everywhere() {
    const auto info = script_info(script_);
    std::uint64_t seed = 0;
    for (const std::vector<std::int64_t>& lengths : std::vector<std::vector<std::int64_t>>{
             {1}, {2}, {6, 6}, {17, 17, 17}, {70}, {5, 9, 2}, {1, 0, 12}, {40, 35, 38}, {70, 3, 31}}) {
      expect_right(right_padded(info, lengths, ++seed));
    }
    expect_right(left_padded(info, {4, 11, 7}, ++seed));
    auto holes = right_padded(info, {9, 9}, ++seed);
    holes.mask()[1][3].fill_(0);
    EXPECT_TRUE(same_bits(cache_->forward(holes.inputs), run_plain(*plain_, holes.inputs)));
    if (profile().granularity != Granularity::kTokens) return;
    const auto request = right_padded(info, {14, 9}, ++seed);
    const auto layers = static_cast<std::int32_t>(profile().layers);
    Donors donors;
    cache_->forward_plan(request.inputs, cache_->full_plan(request.inputs), {}, &donors);
    const Plan plan{
        2, 14, layers, {compute_some(0, 0, 14, layers, {2, 3, 13}, 0), compute_some(1, 0, 9, layers, {8}, 1)}};
    const auto got = cache_->forward_plan(request.inputs, plan, donors);
    EXPECT_TRUE(close_on_real(got, run_plain(*plain_, request.inputs), request, 1e-4)) << "partly computed";
  }

  void expect_refused(const std::string& reason) {
    EXPECT_THAT([&] { LayerCache<Module> cache(make_module(script_)); },
                ThrowsError(ErrorCode::kUnsupportedModel, reason));
  }

  Script script_;
  std::optional<Module> plain_;
  std::unique_ptr<LayerCache<Module>> cache_;
  std::unique_ptr<LayerCache<Module>> keeping_;
};

TEST_F(Generality, AsItIs) {
  wrap();
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  EXPECT_TRUE(profile().head_tokenwise);
  expect_right_everywhere();
}

TEST_F(Generality, OneLayerCalledRepeatedly) {
  script_.layers = 1;
  change_model("self.l1", "self.l0");
  change_model("self.l2", "self.l0");
  wrap();
  EXPECT_EQ(profile().layers, 3);
  expect_right_everywhere();
}

TEST_F(Generality, TwoAttentionSitesInALayer) {
  change_layer("    return x", R"(    y = torch.tanh(x)
    x = x + torch.scaled_dot_product_attention(y, torch.matmul(y, self.wk), torch.matmul(y, self.wv), bias)
    return x)");
  wrap();
  EXPECT_EQ(profile().attention.size(), 6U);
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  expect_right_everywhere();
}

TEST_F(Generality, EagerAttentionWithPositionsMadeInTheLayer) {
  change_layer("    mixed = torch.scaled_dot_product_attention(q, k, v, bias)",
               R"(    places = torch.arange(x.size(1))
    distance = (places.unsqueeze(0) - places.unsqueeze(1)).abs().to(x.dtype)
    scores = torch.matmul(q, k.transpose(1, 2)) * 0.1 + bias - 0.3 * distance
    mixed = torch.matmul(torch.softmax(scores, -1), v))");
  wrap();
  EXPECT_NE(profile().granularity, Granularity::kWholeLayers) << profile().to_string();
  expect_right_everywhere();
}

TEST_F(Generality, ScoresOfKeysByQueries) {
  // The other way round: which dimension is whose matters where some tokens run only.
  change_layer("    mixed = torch.scaled_dot_product_attention(q, k, v, bias)",
               R"(    places = torch.arange(x.size(1)).to(x.dtype)
    distance = torch.tanh(0.1 * (2.0 * places.unsqueeze(1) - places.unsqueeze(0)))
    scores = torch.matmul(k, q.transpose(1, 2)) * 0.1 + bias.transpose(1, 2) + distance
    mixed = torch.matmul(torch.softmax(scores, 1).transpose(1, 2), v))");
  wrap();
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  expect_right_everywhere();
}

TEST_F(Generality, WeightsRepeatedForEachRow) {
  const std::string repeated = "repeated = self.wq.unsqueeze(0).repeat(x.size(0), 1, 1)";
  const std::string used = "\n    x = x + 0.3 * torch.bmm(x, repeated)";
  add_to_layer(repeated + used);
  wrap();
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  expect_right_everywhere();
  // Each row has its own after all: by its place, by its padding, in another order.
  for (const char* own : {" * torch.arange(x.size(0)).to(x.dtype).view(-1, 1, 1)",
                          " * (1.0 + 1e-9 * bias.mean([1, 2], True))", " + x.mean([1], True)"}) {
    SCOPED_TRACE(own);
    script_ = {};
    add_to_layer(repeated + own + used);
    wrap();
    EXPECT_EQ(profile().granularity, Granularity::kWholeLayers) << profile().to_string();
    expect_right_everywhere();
  }
}

TEST_F(Generality, LayersFedByEarlierOnes) {
  change_model("    x = self.l0.forward(x, bias)", "    first = self.l0.forward(x, bias)\n    x = first");
  change_model("self.l2.forward(x, bias)", "self.l2.forward(x + 0.5 * torch.tanh(first), bias)");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, RowsThatSeeEachOther) {
  add_to_layer("x = x - 0.5 * torch.mean(x, [0], True)");
  wrap();
  EXPECT_FALSE(profile().rows_independent);
  EXPECT_EQ(profile().granularity, Granularity::kWholeLayers);
  const auto request = right_padded(script_info(script_), {8, 8}, 1);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(same_bits(keeping_->forward(request.inputs), run_plain(*plain_, request.inputs)));
    const auto alone = request.alone(0);
    EXPECT_TRUE(same_bits(keeping_->forward(alone.inputs), run_plain(*plain_, alone.inputs)));
  }
  EXPECT_EQ(keeping_->stats().entries, 0U) << "a row means nothing without its batch";
}

TEST_F(Generality, ResultsThatDependOnTheSizeOfTheBatch) {
  add_to_layer("x = x / float(x.size(0))");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, ResultsThatDependOnTheWidth) {
  add_to_layer("x = x * 3.0 / float(x.size(1))");
  wrap();
  // With the padding the width changes, and with it the plain result: rows are not what they are alone.
  const auto info = script_info(script_);
  for (const std::vector<std::int64_t>& lengths : std::vector<std::vector<std::int64_t>>{{5, 9, 2}, {30, 3}, {4, 4}}) {
    const auto request = right_padded(info, lengths, 1);
    EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
    const auto wider = right_padded(info, lengths, 1, 50);
    for (const auto* given : {&request, &wider, &request}) {
      EXPECT_TRUE(close_on_real(keeping_->forward(given->inputs), run_plain(*plain_, given->inputs), *given, 1e-4));
    }
  }
}

TEST_F(Generality, BranchOnTheLength) {
  // No probe is as long as that, but the packed rows of a batch may be.
  add_to_layer("if x.size(1) > 64:\n        x = x * 0.5");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, BranchOnTheLengthBeforeTheLayers) {
  change_model("    bias = ", "    if input_ids.size(1) > 64:\n        x = x * 0.5\n    bias = ");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, NumbersThatFollowTheLengthOnlyIfItIsLarge) {
  for (const char* line : {"x = x * 40.0 / float(max(x.size(1), 64))", "x = x * 10.0 / float(min(x.size(1), 10))"}) {
    SCOPED_TRACE(line);
    script_ = {};
    add_to_layer(line);
    wrap();
    const auto info = script_info(script_);
    for (const std::vector<std::int64_t>& lengths :
         std::vector<std::vector<std::int64_t>>{{40, 35, 38}, {90, 3}, {5, 2}}) {
      const auto request = right_padded(info, lengths, 1);
      EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
    }
  }
}

TEST_F(Generality, BranchOnTheLengthBehindTheLayers) {
  change_model("    return", "    if x.size(1) > 64:\n        x = x * 0.5\n    return");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, BranchOnTheValuesOfOtherTokens) {
  // Decided by all tokens together: by which of them run, if not all do.
  add_to_layer("if bool((x.abs() > 1.2).any()):\n        x = x * 0.5");
  wrap();
  EXPECT_NE(profile().granularity, Granularity::kTokens);
  const auto request = right_padded(script_info(script_), {9, 4, 12}, 1);
  EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
}

TEST_F(Generality, TokensMixedOutsideAttention) {
  for (const char* line : {"x = x + 0.1 * torch.cumsum(x, 1)", "x = x + torch.cat([x[:, :1], x[:, :-1]], 1)",
                           "x = x + torch.mean(x, [1], True)", "x = x + torch.flip(x, [1])"}) {
    SCOPED_TRACE(line);
    script_ = {};
    add_to_layer(line);
    wrap();
    EXPECT_EQ(profile().granularity, Granularity::kWholeLayers) << profile().to_string();
    EXPECT_FALSE(profile().notes.empty());
    const auto info = script_info(script_);
    for (const auto& request : {right_padded(info, {5, 9, 2}, 1), left_padded(info, {3, 8}, 2)}) {
      EXPECT_TRUE(same_bits(cache_->forward(request.inputs), run_plain(*plain_, request.inputs)));
    }
  }
}

TEST_F(Generality, SequencesCutAtALengthThatNoProbeReaches) {
  const std::vector<std::pair<const char*, std::string>> lines{
      {"layer", "x = torch.cat([x[:, :50] * 1.5, x[:, 50:]], 1)"},
      {"layer", "x = torch.cat([x[:, :-50] * 0.5, x[:, -50:]], 1)"},
      {"layer", "x = torch.cat([x[:, :min(50, x.size(1))] * 1.5, x[:, min(50, x.size(1)):]], 1)"},
      {"model", "    x = x[:, :50]\n    attention_mask = attention_mask[:, :50]\n"},
  };
  for (const auto& [where, line] : lines) {
    SCOPED_TRACE(line);
    script_ = {};
    if (std::string(where) == "layer") {
      add_to_layer(line);
    } else {
      change_model("    bias = ", line + "    bias = ");
      // A layer that asks for the length of its states must get theirs, not that of the input.
      add_to_layer("x = x * (1.0 + 3.0 / float(x.size(1)))");
    }
    wrap();
    EXPECT_THAT(profile().notes, ::testing::Contains(HasSubstr("cuts sequences at a fixed length")));
    const auto info = script_info(script_);
    for (const std::vector<std::int64_t>& lengths :
         std::vector<std::vector<std::int64_t>>{{9, 4}, {70, 9, 31}, {30, 31}, {90}}) {
      const auto request = right_padded(info, lengths, 1);
      for (int turn = 0; turn < 2; ++turn) {
        EXPECT_TRUE(same_bits(cache_->forward(request.inputs), run_plain(*plain_, request.inputs)));
        const auto kept = keeping_->forward(request.inputs);
        EXPECT_TRUE(same_bits(kept, run_plain(*plain_, request.inputs))) << keeping_->last_report().to_string();
      }
    }
  }
}

TEST_F(Generality, ResultsCutAtALengthThatNoProbeReaches) {
  change_model("return torch.tanh(x)", "return torch.tanh(x)[:, :50]");
  wrap();
  const auto info = script_info(script_);
  // The second batch knows a row of the first.
  const auto first = right_padded(info, {60, 9}, 1);
  auto second = right_padded(info, {60, 9, 33}, 2);
  second.ids()[1].copy_(first.ids()[1]);
  for (const auto& request : {first, second, first}) {
    EXPECT_TRUE(same_bits(cache_->forward(request.inputs), run_plain(*plain_, request.inputs)));
    const auto got = keeping_->forward(request.inputs).toTensor();
    const auto want = run_plain(*plain_, request.inputs).toTensor();
    ASSERT_EQ(got.sizes(), want.sizes());
    EXPECT_TRUE(at::allclose(got, want, 1e-4, 1e-4));
  }
}

TEST_F(Generality, TokensCountedUpToALimit) {
  // As experts of limited capacity do: what comes first is served first. No probe comes near the limit.
  add_to_layer("first = (torch.cumsum((x[:, :, :1] > 0.0).to(x.dtype), 1) <= 60.0).to(x.dtype)\n    x = x * first");
  wrap();
  EXPECT_EQ(profile().granularity, Granularity::kWholeLayers) << profile().to_string();
  EXPECT_THAT(profile().notes, ::testing::Contains(HasSubstr("cumsum")));
  expect_right_everywhere();
  const auto request = right_padded(script_info(script_), {100, 90, 95}, 7);
  EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
}

TEST_F(Generality, RowsThatMeetOnlyInSomeBatches) {
  for (const char* line : {
           "x = x * (1.0 + 2.0 / (attention_mask.sum(1).max().to(x.dtype) + 1.0))",  // the longest row
           "x = x * (0.5 + attention_mask.to(x.dtype).mean())",                      // how much is padding
           "x = x * (1.0 - 0.5 * (attention_mask == 0).any().to(x.dtype))",          // whether some is
           "if bool((attention_mask == 0).any()):\n        x = x * 0.5",             // the same, as a branch
           "if x.size(0) > 4:\n        x = x * 0.5",                                 // the number of rows
           "if bool((input_ids == 211).any()):\n        x = x * 0.5",                // an id that no probe has
           "if bool((x > 4.0).any()):\n        x = x * 0.5",                         // a value that few rows have
           "x = x * (1.0 + (torch.argsort(torch.flatten(input_ids), 0, True).view(x.size(0), -1, 1) < 50).to(x.dtype))",
       }) {
    SCOPED_TRACE(line);
    script_ = {};
    change_model("    bias = ", std::string("    ") + line + "\n    bias = ");
    wrap();
    EXPECT_FALSE(profile().rows_independent) << profile().to_string();
    const auto info = script_info(script_);
    auto row = right_padded(info, {6, 6}, 1, 12);
    row.ids()[0][0].fill_(30);
    for (const std::vector<std::int64_t>& others :
         std::vector<std::vector<std::int64_t>>{{6}, {12}, {3, 9}, {12, 12, 12, 12, 12, 2}, {6}}) {
      auto lengths = others;
      lengths.insert(lengths.begin(), 6);
      auto request = right_padded(info, lengths, others.size(), 12);
      if (others.size() == 2) request.ids()[2][0].fill_(211);
      request.ids()[0].copy_(row.ids()[0]);
      const auto want = run_plain(*plain_, request.inputs);
      EXPECT_TRUE(same_bits(cache_->forward(request.inputs), want));
      EXPECT_TRUE(same_bits(keeping_->forward(request.inputs), want));
    }
  }
}

TEST_F(Generality, NoAttentionAtAll) {
  change_layer("    mixed = torch.scaled_dot_product_attention(q, k, v, bias)", "    mixed = q * k * v");
  wrap();
  EXPECT_THAT(profile().notes, ::testing::Contains(HasSubstr("no attention")));
  expect_right_everywhere();
}

TEST_F(Generality, HiddenStatesChangedInPlace) {
  change_layer("    x = x + torch.matmul(mixed, self.wo)", "    x.add_(torch.matmul(mixed, self.wo))");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, ListsOfHiddenStatesAsOutput) {
  change_model("-> Tensor:", "-> Tuple[Tensor, List[Tensor]]:");
  change_model("    x = self.l1.", "    one = x\n    x = self.l1.");
  change_model("return torch.tanh(x)", "return torch.tanh(x), [one, x]");
  wrap();
  EXPECT_TRUE(profile().per_row_output);
  expect_right_everywhere();
}

TEST_F(Generality, StatesCollectedInAListThatGrows) {
  change_model("    x = self.l0.", "    states: List[Tensor] = []\n    x = self.l0.");
  change_model("    x = self.l1.", "    states.append(x)\n    x = self.l1.");
  change_model("return torch.tanh(x)", "states.append(x)\n    return torch.tanh(torch.mean(torch.stack(states), [0]))");
  wrap();
  EXPECT_NE(profile().granularity, Granularity::kWholeLayers) << profile().to_string();
  expect_right_everywhere();
}

TEST_F(Generality, DictionariesAsOutput) {
  change_model("-> Tensor:", "-> Dict[str, Tensor]:");
  change_model("return torch.tanh(x)", "return {'states': torch.tanh(x), 'first': x[:, 0]}");
  wrap();
  expect_right_everywhere();
}

TEST_F(Generality, OutputWithoutABatchDimension) {
  change_model("-> Tensor:", "-> Tuple[Tensor, Tensor]:");
  change_model("return torch.tanh(x)", "return torch.tanh(x), torch.sum(x * attention_mask.unsqueeze(2))");
  wrap();
  EXPECT_FALSE(profile().per_row_output);
  const auto request = right_padded(script_info(script_), {8, 8}, 1);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(same_bits(keeping_->forward(request.inputs), run_plain(*plain_, request.inputs)));
  }
  EXPECT_EQ(keeping_->stats().entries, 0U);
}

TEST_F(Generality, OutputThatIsNoTensor) {
  change_model("-> Tensor:", "-> Tuple[Tensor, int]:");
  change_model("return torch.tanh(x)", "return torch.tanh(x), input_ids.size(1)");
  wrap();
  const auto info = script_info(script_);
  for (const std::int64_t length : {8, 5}) {
    const auto got = keeping_->forward(right_padded(info, {length}, 1).inputs);
    EXPECT_EQ(got.toTupleRef().elements().at(1).toInt(), length);
  }
  EXPECT_EQ(keeping_->stats().entries, 0U);
}

TEST_F(Generality, TokensBeforeBatchInTheOutput) {
  change_model("return torch.tanh(x)", "return torch.tanh(x).transpose(0, 1)");
  wrap();
  const auto info = script_info(script_);
  for (const auto& request : {right_padded(info, {8, 8, 8}, 1), right_padded(info, {5, 9}, 2)}) {
    const auto want = run_plain(*plain_, request.inputs).toTensor().transpose(0, 1);
    for (int turn = 0; turn < 2; ++turn) {
      const auto got = keeping_->forward(request.inputs).toTensor();
      EXPECT_TRUE(close_on_real(got.transpose(0, 1), want, request, 1e-4));
    }
  }
}

TEST_F(Generality, AttentionMapsAsOutput) {
  change_layer("-> Tensor:", "-> Tuple[Tensor, Tensor]:");
  change_layer("    mixed = torch.scaled_dot_product_attention(q, k, v, bias)",
               "    weights = torch.softmax(torch.matmul(q, k.transpose(1, 2)) * 0.1 + bias, -1)\n"
               "    mixed = torch.matmul(weights, v)");
  change_layer("self.down)", "self.down), weights");
  for (const char* name : {"self.l0", "self.l1", "self.l2"})
    change_model(std::string("x = ") + name, std::string("x, w = ") + name);
  change_model("-> Tensor:", "-> Tuple[Tensor, Tensor]:");
  change_model("return torch.tanh(x)", "return torch.tanh(x), w");
  wrap();
  const auto request = right_padded(script_info(script_), {5, 9, 2}, 1);
  EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
}

TEST_F(Generality, TheLastRealTokenAsOutput) {
  change_model("return torch.tanh(x)",
               "return x[torch.arange(x.size(0)), torch.clamp(torch.sum(attention_mask, 1) - 1, 0)]");
  wrap();
  EXPECT_FALSE(profile().head_tokenwise);
  expect_right_everywhere();
}

TEST_F(Generality, OptionalMask) {
  change_model("attention_mask: Tensor)", "attention_mask: Optional[Tensor] = None)");
  change_model("    bias = (1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9", R"(
    bias = torch.zeros([1, 1, 1])
    if attention_mask is not None:
        bias = (1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9)");
  wrap();
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  expect_right_everywhere();
  const auto request = right_padded(script_info(script_), {8, 8}, 99);
  const auto want = run_plain(*plain_, {request.ids()});
  for (const Inputs& inputs : {Inputs{request.ids()}, Inputs{request.ids(), c10::IValue()}}) {
    for (int turn = 0; turn < 2; ++turn) EXPECT_TRUE(same_bits(keeping_->forward(inputs), want));
  }
}

TEST_F(Generality, MaskWhereOneMeansPadding) {
  change_model("(1.0 - attention_mask.unsqueeze(1).to(x.dtype))", "attention_mask.unsqueeze(1).to(x.dtype)");
  wrap();
  auto request = right_padded(script_info(script_), {5, 9, 2}, 1);
  request.inputs[1] = 1 - request.mask();
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(close_on_real(keeping_->forward(request.inputs), run_plain(*plain_, request.inputs), request, 1e-4));
  }
}

TEST_F(Generality, RandomNumbersAreRefused) {
  add_to_layer("x = x + 0.1 * torch.rand_like(x)");
  expect_refused("differently each time");
}

TEST_F(Generality, ActiveDropoutIsRefused) {
  add_to_layer("x = torch.dropout(x, 0.5, True)");
  expect_refused("dropout");
}

TEST_F(Generality, WritingItsOwnWeightsIsRefused) {
  add_to_layer("self.up.add_(0.01)");
  expect_refused("");
}

TEST_F(Generality, IntegerHiddenStatesAreRefused) {
  script_.layer = "def forward(self, x: Tensor, bias: Tensor) -> Tensor:\n    return x * 2 + 1\n";
  change_model("    bias = ", "    x = (x * 10.0).to(4)\n    bias = ");  // int64
  change_model("x.dtype", "6");                                          // float32
  change_model("torch.tanh(x)", "x");
  expect_refused("hidden state");
}

TEST_F(Generality, UnsupportedTypesAreRefused) {
  script_.layer = R"(
def forward(self, x: Tensor, bias: Tensor) -> Tensor:
    return (torch.tanh(torch.matmul(x.to(6), self.up)) * 3.0).to(23)
)";
  change_model("    bias = ", "    x = x.to(23)\n    bias = ");  // an 8-bit type
  change_model("x.dtype", "6");                                  // float32
  change_model("torch.tanh(x)", "x.to(6)");
  expect_refused("Float8_e5m2");
}

TEST_F(Generality, OtherArgumentsAreRefused) {
  change_model("attention_mask: Tensor)", "attention_mask: Tensor, scale: float)");
  expect_refused("scale");
}

TEST_F(Generality, WithoutAnEmbeddingItIsRefused) {
  change_model("torch.embedding(self.table, input_ids) + torch.embedding(self.places, places)",
               "input_ids.unsqueeze(2).to(6) * self.table[0]");
  expect_refused("embedding");
}

TEST_F(Generality, FixedLengthIsRefused) {
  change_model("torch.arange(input_ids.size(1))", "torch.arange(12)");
  expect_refused("dynamic");
}

}  // namespace
}  // namespace llmcache::test
