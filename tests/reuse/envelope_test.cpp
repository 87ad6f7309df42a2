// Models whose results depend on what no short probe holds: lengths, rows, ids and masks of other kinds. Each is right
// on random traffic, whatever is reused.
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <thread>

#include "support.h"

namespace llmcache::test {
namespace {

/// A small causal model with one thing changed, and what is to be found out about it.
struct Case {
  std::string name;
  std::string places = "torch.arange(input_ids.size(1)).unsqueeze(0)";  ///< of the position embedding
  std::string change = "";  ///< lines in front of the layers; x, bias, causal
  bool expects_prefix = false;
  bool causal = true;
  bool types = false;  ///< token_type_ids are a third input
};

std::ostream& operator<<(std::ostream& out, const Case& one) { return out << one.name; }

std::string forward_of(const Case& one) {
  std::string text = R"(
def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    tokens = torch.arange(input_ids.size(1))
    causal = tokens.unsqueeze(1) >= tokens.unsqueeze(0)
    shown = causal.unsqueeze(0)
    places = PLACES
    x = torch.embedding(self.table, input_ids) + torch.embedding(self.places, places)
CHANGE
    bias = (1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9 + torch.logical_not(shown).to(x.dtype) * -1.0e9
    x = self.l0.forward(x, bias)
    x = self.l1.forward(x, bias)
    x = self.l2.forward(x, bias)
    return torch.tanh(x)
)";
  if (!one.causal)
    text = Script::with(text, "shown = causal.unsqueeze(0)", "shown = torch.ones_like(causal).unsqueeze(0)");
  if (one.types) text = Script::with(text, "attention_mask: Tensor", "attention_mask: Tensor, token_type_ids: Tensor");
  text = Script::with(text, "PLACES", one.places);
  return Script::with(text, "CHANGE", one.change);
}

// Numbers that change beyond a length.
const std::vector<Case> kLengthCases{
    {"where_on_the_last_place", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * torch.where(places.max() + 1 > 64, 0.5, 1.0)"},
    {"largest_of_one_and_a_ratio", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * max(1.0, float(input_ids.size(1)) / 64.0)"},
    {"clamped_interpolation", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * torch.clamp(torch.tensor(70.0 / float(input_ids.size(1))), max=1.0)"},
    {"branch_on_the_mask", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    if bool(attention_mask.sum() > 90):\n        x = x * 0.7"},
    {"per_row_by_its_mask", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = torch.where((attention_mask.sum(1) > 80).unsqueeze(1).unsqueeze(2), x * 0.6, x)"},
    {"steps_of_sixty_four", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * (1.0 + 0.3 * float(input_ids.size(1) // 64))"},
    {"saturating", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * (1.0 + torch.sigmoid(torch.tensor(float(input_ids.size(1)) * 4.0 - 400.0)))"},
    {"bias_by_length", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x + torch.relu((tokens.max() - 63).to(x.dtype)) * 0.01"},
};

// The same within branches, where shapes are not known.
const std::vector<Case> kBranches{
    {.name = "largest_place_in_a_branch",
     .change = "    if attention_mask.dim() == 2:\n        far = torch.max(places, 1)[0]\n"
               "        x = x * torch.where(far > 64, 0.5, 1.0).unsqueeze(1).unsqueeze(2)"},
    {.name = "counts_in_a_branch",
     .change = "    if attention_mask.dim() == 2:\n"
               "        seen = torch.matmul(attention_mask.to(x.dtype), torch.ones_like(tokens).to(x.dtype))\n"
               "        x = x * torch.where(seen > 64, 0.5, 1.0).unsqueeze(1).unsqueeze(2)"},
    {.name = "rows_in_a_branch",
     .change =
         "    if attention_mask.dim() == 2:\n        x = x * torch.where(attention_mask.sum(0).max() > 9, 0.5, 1.0)"},
};

// Attention that is opened by what tokens are.
const std::vector<Case> kSeparators{
    {"before_a_separator", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    inside = torch.logical_and(tokens.unsqueeze(0) < (input_ids == 2).to(input_ids.dtype).argmax(1, True), "
     "(input_ids == 2).any(1, True))\n"
     "    shown = torch.logical_or(shown, torch.logical_and(inside.unsqueeze(1), inside.unsqueeze(2)))"},
    {"among_marked_ids", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    marked = input_ids == 7\n"
     "    shown = torch.logical_or(shown, torch.logical_and(marked.unsqueeze(1), marked.unsqueeze(2)))"},
    {"to_marked_ids", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    shown = torch.logical_or(shown, (input_ids == 9).unsqueeze(1))"},
    {"while_no_separator_was_seen", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    open = (input_ids == 3).to(input_ids.dtype).cumsum(1) == 0\n"
     "    shown = torch.logical_or(shown, torch.logical_and(open.unsqueeze(1), open.unsqueeze(2)))"},
    {"range_of_ids", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    image = torch.logical_and(input_ids >= 4, input_ids < 9)\n"
     "    shown = torch.logical_or(shown, torch.logical_and(image.unsqueeze(1), image.unsqueeze(2)))"},
};

// Attention that is opened by what the types of tokens are.
const std::vector<Case> kTypes{
    {.name = "among_type_0",
     .change = "    first = token_type_ids == 0\n"
               "    shown = torch.logical_or(shown, torch.logical_and(first.unsqueeze(1), first.unsqueeze(2)))",
     .types = true},
    {.name = "to_type_1",
     .change = "    shown = torch.logical_or(shown, (token_type_ids == 1).unsqueeze(1))",
     .types = true},
    {.name = "within_runs_of_type_1",
     .change = "    run = (torch.cumsum(1 - token_type_ids, 1) + 1) * token_type_ids\n"
               "    same = torch.logical_and(run.unsqueeze(1) == run.unsqueeze(2), (run > 0).unsqueeze(1))\n"
               "    shown = torch.logical_or(shown, same)",
     .types = true},
    {.name = "by_the_number_of_types",
     .change = "    x = x * (1.0 + 0.5 * (token_type_ids.sum(1) > 70).to(x.dtype)).unsqueeze(1).unsqueeze(2)",
     .types = true},
};

// Positions that follow from a count over the row.
const std::vector<Case> kCounts{
    {"shifted_by_the_padding_id",
     "torch.clamp(tokens.unsqueeze(0) - (input_ids == 0).to(input_ids.dtype).sum(1, True), min=0)"},
    {"shifted_by_another_id", "tokens.unsqueeze(0) + (input_ids == 6).to(input_ids.dtype).sum(1, True)"},
    {"from_the_end", "torch.clamp(200 - tokens.max() + tokens, min=0).unsqueeze(0)"},
    {"by_the_last_id", "tokens.unsqueeze(0) + (input_ids.select(1, -1) == 2).to(input_ids.dtype).unsqueeze(1)"},
};

// The number of rows, or what other rows hold.
const std::vector<Case> kRowCases{
    {"more_than_nine_rows", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * (0.5 if input_ids.size(0) > 9 else 1.0)"},
    {"where_on_the_rows", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = torch.where(torch.tensor(input_ids.size(0)) > 9, x * 0.5, x)"},
    {"statistics_of_a_large_batch", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x - torch.clamp(torch.tensor(float(input_ids.size(0)) - 9.0), 0.0, 1.0) * x.mean(0, True)"},
    {"later_rows", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x + (torch.arange(input_ids.size(0)) > 9).to(x.dtype).unsqueeze(1).unsqueeze(2)"},
    {"an_id_in_any_row", "torch.arange(input_ids.size(1)).unsqueeze(0)",
     "    x = x * (1.0 + (input_ids == 8).any().to(x.dtype))"},
};

/// Unchanged: reuse must go on.
const std::vector<Case> kPlain{
    {"plain", "torch.arange(input_ids.size(1)).unsqueeze(0)", "", true},
    {"scaled_by_a_constant", "torch.arange(input_ids.size(1)).unsqueeze(0)", "    x = x * 0.9", true},
    {"positions_from_the_mask", "torch.clamp(attention_mask.to(input_ids.dtype).cumsum(1) - 1, min=0)", "", true},
};

std::vector<Case> all_cases() {
  std::vector<Case> all;
  for (const auto* group : {&kLengthCases, &kBranches, &kSeparators, &kTypes, &kCounts, &kRowCases, &kPlain}) {
    all.insert(all.end(), group->begin(), group->end());
  }
  for (const auto* group : {&kLengthCases, &kCounts, &kRowCases}) {
    for (Case one : *group) {
      one.name += "_both_ways";
      one.causal = false;
      all.push_back(one);
    }
  }
  return all;
}

/// Random traffic over a few texts: new, repeated, growing, cut, edited, joined.
class Traffic {
 public:
  explicit Traffic(std::uint32_t seed) : random_(seed) {}

  std::vector<std::vector<std::int64_t>> batch() {
    const int kind = below(4);
    const int rows = kind == 0 ? 1 + below(13) : kind == 1 ? 1 + below(3) : 1;
    std::vector<std::vector<std::int64_t>> texts;
    for (int row = 0; row < rows; ++row) texts.push_back(text());
    return texts;
  }
  int below(int n) { return static_cast<int>(random_() % static_cast<std::uint32_t>(n)); }

 private:
  std::int64_t id() {
    // Special ones among ordinary ones.
    return below(6) == 0 ? below(10) : 10 + below(280);
  }
  std::vector<std::int64_t> fresh(int tokens) {
    std::vector<std::int64_t> made;
    for (int i = 0; i < tokens; ++i) made.push_back(id());
    return made;
  }
  std::vector<std::int64_t> text() {
    if (kept_.size() < 3 || below(6) == 0) {
      kept_.push_back(fresh(1 + below(below(3) == 0 ? 200 : 40)));
      return kept_.back();
    }
    auto& chosen = kept_[static_cast<std::size_t>(below(static_cast<int>(kept_.size())))];
    auto made = chosen;
    switch (below(6)) {
      case 0:
        break;  // again
      case 1:   // growing
      case 2: {
        const auto more = fresh(1 + below(30));
        made.insert(made.end(), more.begin(), more.end());
        break;
      }
      case 3:
        made.resize(1 + static_cast<std::size_t>(below(static_cast<int>(made.size()))));
        break;
      case 4:
        made[static_cast<std::size_t>(below(static_cast<int>(made.size())))] = id();
        break;
      default: {
        const auto& other = kept_[static_cast<std::size_t>(below(static_cast<int>(kept_.size())))];
        made.insert(made.end(), other.begin(), other.end());
      }
    }
    if (made.size() > 300) made.resize(300);
    chosen = made;
    return made;
  }

  std::mt19937 random_;
  std::vector<std::vector<std::int64_t>> kept_;
};

/// `types`: a third input, 1 for about every second run of tokens.
Request request_of(const std::vector<std::vector<std::int64_t>>& texts, bool types = false) {
  Request request;
  for (const auto& text : texts) {
    request.spans.push_back({0, static_cast<std::int64_t>(text.size())});
    request.padded_length = std::max(request.padded_length, static_cast<std::int64_t>(text.size()));
  }
  auto ids = at::zeros({request.rows(), request.padded_length}, at::kLong);
  auto mask = at::zeros({request.rows(), request.padded_length}, at::kLong);
  for (std::size_t row = 0; row < texts.size(); ++row) {
    for (std::size_t t = 0; t < texts[row].size(); ++t) {
      ids[static_cast<std::int64_t>(row)][static_cast<std::int64_t>(t)] = texts[row][t];
    }
    mask[static_cast<std::int64_t>(row)].narrow(0, 0, static_cast<std::int64_t>(texts[row].size())).fill_(1);
  }
  request.inputs = {ids, mask};
  if (types) request.inputs.emplace_back(ids.floor_divide(23).remainder(2) * mask);
  return request;
}

class Envelope : public ::testing::TestWithParam<Case> {
 protected:
  static Script script() {
    Script made;
    made.forward = forward_of(GetParam());
    return made;
  }
};

TEST_P(Envelope, RightOnRandomTraffic) {
  Module plain = make_module(script());
  LayerCache<Module> cache(make_module(script()));
  Traffic traffic(7);
  for (int step = 0; step < 120; ++step) {
    const Request request = request_of(traffic.batch(), GetParam().types);
    const auto want = run_plain(plain, request.inputs);
    const auto got = cache.forward(request.inputs);
    ASSERT_TRUE(close_on_real(got, want, request, 1e-4))
        << "step " << step << "\n"
        << cache.last_report().to_string() << cache.profile().to_string();
  }
  const auto stats = cache.stats();
  if (GetParam().expects_prefix) {
    EXPECT_TRUE(cache.profile().prefix_reuse) << cache.profile().to_string();
    EXPECT_GT(stats.prefix_hits, 20U);
    EXPECT_EQ(stats.verification.mismatches, 0U);
    EXPECT_TRUE(stats.fallbacks.empty());
  } else {
    EXPECT_FALSE(cache.profile().prefix_reuse) << "found out from the graph, before any request\n"
                                               << cache.profile().to_string();
    if (cache.profile().causal) {  // else probing found it out
      EXPECT_FALSE(cache.profile().prefix_obstacle.empty() && cache.profile().row_obstacle.empty());
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(All, Envelope, ::testing::ValuesIn(all_cases()), case_name);

// --- what the graph does not tell ---------------------------------------------------------------------------------

/// A model of the user's own, in C++: its graph is not seen. Beyond 20 tokens, or 10 rows, it answers otherwise.
struct SizeDependent {
  std::int64_t long_from = 1000, many_from = 1000;
  at::Tensor table = at::linspace(-1, 1, 300 * 4).view({300, 4});

  [[nodiscard]] Activations embed(const Inputs& inputs) const {
    const auto& ids = inputs.at(0).toTensor();
    auto hidden = table.index_select(0, ids.reshape({-1})).view({ids.size(0), ids.size(1), 4});
    if (ids.size(1) > long_from || ids.size(0) >= many_from) hidden = hidden * 0.5;
    return {hidden, nullptr};
  }
  [[nodiscard]] std::int64_t layers() const { return 2; }
  void layer(std::int64_t, Activations& activations) const { activations.hidden = at::tanh(activations.hidden * 2); }
  [[nodiscard]] c10::IValue head(Activations& activations) const { return activations.hidden; }
  [[nodiscard]] at::Device device() const { return at::kCPU; }
  [[nodiscard]] at::ScalarType dtype() const { return at::kFloat; }
  [[nodiscard]] std::string digest() const { return "hand-written"; }
};

at::Tensor ids_of(std::int64_t rows, std::int64_t tokens, std::int64_t first = 10) {
  return at::arange(first, first + rows * tokens, at::kLong).remainder(290).view({rows, tokens});
}

TEST(Verification, RowOfAnotherBatchIsComparedAtItsFirstUseAndClosed) {
  const SizeDependent model{.long_from = 1000, .many_from = 12};
  LayerCache<SizeDependent> cache(model);
  const auto many = ids_of(14, 5);
  cache.forward({many});
  // Known from a batch of fourteen rows, where it is another one than alone.
  const auto alone = many.narrow(0, 3, 1).contiguous();
  LayerCache<SizeDependent> fresh(model, Options{.capacity_bytes = 0});
  const auto want = fresh.forward({alone});
  const auto got = cache.forward({alone});
  EXPECT_TRUE(same_bits(got, want));
  EXPECT_TRUE(cache.last_report().verified);
  EXPECT_FALSE(cache.last_report().fallback.empty());
  const auto stats = cache.stats();
  EXPECT_EQ(stats.verification.mismatches, 1U);
  ASSERT_EQ(stats.verification.closed.size(), 1U);
  EXPECT_THAT(stats.verification.closed[0], ::testing::HasSubstr("exact match"));
  EXPECT_EQ(stats.entries, 0U) << "what was kept is dropped";
  cache.forward({many});
  EXPECT_TRUE(same_bits(cache.forward({alone}), want));
  EXPECT_EQ(cache.stats().identical_hits, 0U)
      << "what was replaced is no hit, and what it came from is closed for good";

  auto further = cache.with_options({.verify_rate = 0});
  further.forward({many});
  EXPECT_TRUE(same_bits(further.forward({alone}), want));
  EXPECT_EQ(further.stats().identical_hits, 0U) << "closed in further caches around the model too";
  EXPECT_EQ(further.stats().verification.closed, stats.verification.closed);
}

TEST(Verification, AgreeingSizesAreComparedOnce) {
  LayerCache<SizeDependent> cache(SizeDependent{});
  const auto many = ids_of(14, 5);
  cache.forward({many});
  const auto before = cache.stats().verification.checks;
  for (std::int64_t row = 0; row < 14; ++row) cache.forward({many.narrow(0, row, 1).contiguous()});
  const auto stats = cache.stats();
  EXPECT_EQ(stats.verification.mismatches, 0U);
  EXPECT_EQ(stats.verification.checks, before + 1);
  EXPECT_EQ(stats.verification.first_uses, stats.verification.checks);
  EXPECT_EQ(stats.identical_hits, 14U);
  EXPECT_TRUE(stats.verification.closed.empty());
}

TEST(Verification, RateZeroSwitchesItOff) {
  const SizeDependent model{.long_from = 1000, .many_from = 12};
  LayerCache<SizeDependent> cache(model, Options{.verify_rate = 0});
  const auto many = ids_of(14, 5);
  cache.forward({many});
  cache.forward({many.narrow(0, 3, 1).contiguous()});
  EXPECT_EQ(cache.stats().verification.checks, 0U);
  EXPECT_EQ(cache.stats().identical_hits, 1U);
  EXPECT_THAT([] { Options{.verify_rate = 1.5}.validate(); }, ThrowsError(ErrorCode::kInvalidOptions, "verify_rate"));
}

TEST(Verification, SamplesGoOnForGood) {
  // The first use of each size is right: the model turns to another answer later, at a length within a known size.
  LayerCache<SizeDependent> cache(SizeDependent{.long_from = 1000, .many_from = 12}, Options{.verify_rate = 1});
  const auto many = ids_of(9, 5);
  const auto ask = [&] {
    for (std::int64_t row = 0; row < 9; ++row) cache.forward({many.narrow(0, row, 1).contiguous()});
  };
  cache.forward({many});
  ask();
  const auto before = cache.stats().verification;
  ask();
  const auto after = cache.stats().verification;
  EXPECT_EQ(after.checks, before.checks + 9) << "each answer that was made with reuse";
  EXPECT_EQ(after.first_uses, before.first_uses);
  EXPECT_EQ(after.mismatches, 0U);
}

TEST(Verification, InTheBackground) {
  const SizeDependent model{.long_from = 1000, .many_from = 12};
  LayerCache<SizeDependent> cache(model, Options{.verify_in_background = true});
  const auto many = ids_of(14, 5);
  cache.forward({many});
  const auto alone = many.narrow(0, 3, 1).contiguous();
  cache.forward({alone});
  for (int turn = 0; turn < 2000 && cache.stats().verification.checks < 2 && cache.stats().verification.closed.empty();
       ++turn) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const auto stats = cache.stats();
  EXPECT_EQ(stats.verification.mismatches, 1U);
  EXPECT_EQ(stats.verification.closed.size(), 1U);
  LayerCache<SizeDependent> fresh(model, Options{.capacity_bytes = 0});
  EXPECT_TRUE(same_bits(cache.forward({alone}), fresh.forward({alone})));
}

// --- values that no probe holds ------------------------------------------------------------------------------------

class Values : public ::testing::Test {
 protected:
  void wrap(const std::string& bias = "") {
    Script script;
    if (!bias.empty()) {
      script.forward = Script::with(script.forward, "(1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9", bias);
    }
    info_ = script_info(script);
    plain_.emplace(make_module(script));
    cache_ = std::make_unique<LayerCache<Module>>(make_module(script));
  }
  void expect_plain(const Request& request, const std::string& reason) {
    for (int turn = 0; turn < 2; ++turn) {
      EXPECT_TRUE(same_bits(cache_->forward(request.inputs), run_plain(*plain_, request.inputs)));
      EXPECT_THAT(cache_->last_report().fallback, ::testing::HasSubstr(reason));
    }
    EXPECT_EQ(cache_->stats().identical_hits, 0U);
    EXPECT_EQ(cache_->stats().fallbacks.size(), 1U);
  }
  ModelInfo info_;
  std::optional<Module> plain_;
  std::unique_ptr<LayerCache<Module>> cache_;
};

TEST_F(Values, MasksOfOtherNumbersRunPlainly) {
  const std::vector<std::string> biases = {
      "", "(attention_mask.unsqueeze(1) == 0).to(x.dtype) * -1.0e9",
      "(attention_mask.unsqueeze(1) != attention_mask.unsqueeze(2)).to(x.dtype) * -1.0e9"};
  for (const std::int64_t number : {2, 3, -1, 1000}) {
    const std::string& bias = biases[static_cast<std::size_t>(std::abs(number)) % biases.size()];
    SCOPED_TRACE(std::to_string(number) + " " + bias);
    wrap(bias);
    auto request = right_padded(info_, {9, 5, 7}, 3);
    cache_->forward(right_padded(info_, {9, 5, 7}, 3).inputs);
    request.mask()[1].narrow(0, 2, 3).fill_(number);
    const auto hits = cache_->stats().identical_hits;
    EXPECT_EQ(hits, 0U);
    expect_plain(request, "the mask");
  }
}

TEST_F(Values, IdsOutsideTheVocabularyInPadding) {
  wrap();
  const auto known = right_padded(info_, {9, 5}, 3);
  cache_->forward(known.inputs);
  for (const std::int64_t id : {300, 5000, -1}) {
    auto request = right_padded(info_, {9, 5}, 3);
    request.ids()[1][7] = id;
    EXPECT_ANY_THROW(run_plain(*plain_, request.inputs));
    EXPECT_THAT([&] { cache_->forward(request.inputs); }, ThrowsError(ErrorCode::kModelFailed)) << "known rows";
    auto fresh = right_padded(info_, {9, 5}, 4);
    fresh.ids()[1][7] = id;
    EXPECT_THAT([&] { cache_->forward(fresh.inputs); }, ThrowsError(ErrorCode::kModelFailed)) << "new rows";
  }
  EXPECT_EQ(cache_->stats().requests, 1U);
}

TEST_F(Values, TensorsThatCannotBeRead) {
  wrap();
  const auto ids = right_padded(info_, {9, 5}, 3).ids();
  const auto mask = at::ones_like(ids);
  EXPECT_THAT([&] { cache_->forward({ids.to_sparse(), mask}); }, ThrowsError(ErrorCode::kInvalidInput, "dense"));
  EXPECT_THAT([&] { cache_->forward({ids, mask.to_sparse()}); }, ThrowsError(ErrorCode::kInvalidInput, "dense"));
  EXPECT_EQ(cache_->stats().requests, 0U);
}

TEST_F(Values, OtherThreadStateRunsPlainly) {
  wrap();
  const auto request = right_padded(info_, {9, 2}, 3);
  const auto first = cache_->forward(request.inputs);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const auto plain_cast = run_plain(*plain_, request.inputs);
  const auto cast = cache_->forward(request.inputs);
  const auto fallback = cache_->last_report().fallback;
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(cast.toTensor().scalar_type(), plain_cast.toTensor().scalar_type());
  EXPECT_TRUE(same_bits(cast, plain_cast));
  EXPECT_THAT(fallback, ::testing::HasSubstr("autocast"));
  EXPECT_TRUE(same_bits(cache_->forward(request.inputs), first)) << "nothing of it was kept";

  at::globalContext().setDeterministicAlgorithms(true, false);
  cache_->forward(request.inputs);
  const auto deterministic = cache_->last_report().fallback;
  at::globalContext().setDeterministicAlgorithms(false, false);
  EXPECT_THAT(deterministic, ::testing::HasSubstr("deterministic"));
}

TEST(RowsWithoutTokens, TheSameWhateverTheBankHolds) {
  Module plain = load_model("tiny-bert-pooled");
  LayerCache<Module> cache = cache_of("tiny-bert-pooled");
  const auto info = model_info("tiny-bert-pooled");
  const auto request = right_padded(info, {7, 0, 4}, 5);
  const auto want = run_plain(plain, request.inputs);
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_TRUE(same_bits(cache.forward(request.inputs), want)) << "turn " << turn;
    cache.forward(right_padded(info, {7}, 5).inputs);
  }
}

}  // namespace
}  // namespace llmcache::test
