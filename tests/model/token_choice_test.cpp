// Heads that read one token a row, found by comparing ids: classifiers made of decoders.
#include <filesystem>
#include <memory>
#include <optional>
#include <random>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kClose = 1e-4;

std::vector<std::string> classifiers() {
  auto names = model_names({"classify-"});
  for (const std::string& name : program_names({"classify-"})) names.push_back(name);
  return names;
}

/// The id that a model takes for padding.
std::int64_t padding_of(const std::string& name) { return name.starts_with("classify-qwen2") ? 2 : 0; }

class Classifier : public ::testing::TestWithParam<std::string> {
 protected:
  Classifier() : subject_(subject(GetParam())), padding_(padding_of(GetParam())), keeping_(cache_of(GetParam())) {}

  [[nodiscard]] const ModelInfo& info() const { return subject_.info; }
  [[nodiscard]] const ModelProfile& profile() const { return subject_.cache.profile(); }

  /// With the id of padding at padding.
  [[nodiscard]] Request padded_by(Request request, std::int64_t id) const {
    request.inputs[0] = request.ids().masked_fill(request.mask().eq(0), id);
    return request;
  }
  [[nodiscard]] Request right(const std::vector<std::int64_t>& lengths, std::uint64_t seed) const {
    return padded_by(right_padded(info(), lengths, seed), padding_);
  }

  /// By a cache that keeps nothing, and by one that keeps everything.
  void expect_right(const Request& request) {
    const auto want = run_plain(subject_.plain, request.inputs);
    for (LayerCache<Module>* cache : {&subject_.cache, &keeping_}) {
      const auto got = cache->forward(request.inputs);
      const bool bits = cache == &subject_.cache && cache->last_report().execution != Execution::kPacked;
      EXPECT_TRUE(bits ? same_bits(got, want) : close_on_real(got, want, request, kClose))
          << request.ids() << request.mask() << cache->last_report().to_string();
      EXPECT_FALSE(cache->last_report().replaced);
    }
  }

  Subject& subject_;
  const std::int64_t padding_;
  LayerCache<Module> keeping_;
};

TEST_P(Classifier, RunsTokenByToken) {
  EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
  EXPECT_TRUE(profile().head_chooses);
  EXPECT_TRUE(profile().prefix_reuse) << profile().to_string();
  EXPECT_TRUE(profile().left_padding) << profile().to_string();
  EXPECT_EQ(profile().row_obstacle, "");
  EXPECT_THAT(profile().notes, Not(Contains(HasSubstr("the head is not token-wise"))));
}

TEST_P(Classifier, PacksRaggedBatches) {
  std::uint64_t seed = 0;
  for (const std::vector<std::int64_t>& lengths :
       std::vector<std::vector<std::int64_t>>{{1}, {12}, {7, 7}, {9, 4, 12, 1}, {33, 17, 40, 5}, {90, 3}}) {
    const auto request = right(lengths, ++seed);
    expect_right(request);
    const bool ragged = *std::min_element(lengths.begin(), lengths.end()) < request.padded_length;
    (void)subject_.cache.forward(request.inputs);
    EXPECT_EQ(subject_.cache.last_report().execution, ragged ? Execution::kPacked : Execution::kDense);
    const auto left = padded_by(left_padded(info(), lengths, ++seed), padding_);
    expect_right(left);
    (void)subject_.cache.forward(left.inputs);
    EXPECT_EQ(subject_.cache.last_report().execution, ragged ? Execution::kPacked : Execution::kDense);
  }
}

TEST_P(Classifier, ReadsWhereTheIdsSay) {
  // Texts that hold the id of padding: in the middle, at their end, and nothing else.
  auto request = right({10, 8, 6, 9}, 40);
  request.ids()[0][4].fill_(padding_);
  request.ids()[1].narrow(0, 5, 3).fill_(padding_);
  request.ids()[2].fill_(padding_);
  const auto other = run_plain(subject_.plain, right({10, 8, 6, 9}, 40).inputs);
  EXPECT_GT(real_difference(run_plain(subject_.plain, request.inputs), other, request), 1e-2);
  expect_right(request);
  expect_right(request);
  for (std::size_t row = 0; row < 4; ++row) expect_right(request.alone(row));
  // The same on the left: of a text of padding alone, position 0 is read, where nothing real stands.
  auto left = padded_by(left_padded(info(), {10, 8, 6}, 41), padding_);
  left.ids()[0].narrow(0, 7, 3).fill_(padding_);
  expect_right(left);
  left.ids()[2].fill_(padding_);
  expect_right(left);
  (void)subject_.cache.forward(left.inputs);
  EXPECT_EQ(subject_.cache.last_report().execution, Execution::kDense);
}

TEST_P(Classifier, PaddingByOtherIdsIsRead) {
  // The model takes them for text, so that it reads what stands at the last position.
  const auto own = right({9, 5, 12}, 50);
  for (const std::int64_t id : {std::int64_t{7}, info().vocab - 1, padding_ == 0 ? std::int64_t{2} : std::int64_t{0}}) {
    const auto other = padded_by(own, id);
    expect_right(own);
    expect_right(other);
    (void)subject_.cache.forward(other.inputs);
    EXPECT_EQ(subject_.cache.last_report().execution, Execution::kDense);
    expect_right(own);
  }
}

TEST_P(Classifier, RowsWithoutARealTokenRunPlainly) {
  const auto request = right({4, 0, 9}, 60);
  const auto want = run_plain(subject_.plain, request.inputs);
  EXPECT_TRUE(same_bits(keeping_.forward(request.inputs), want));
  EXPECT_THAT(keeping_.last_report().fallback, HasSubstr("no real token"));
}

TEST_P(Classifier, GrowingTextsComputeWhatIsNew) {
  auto whole = right({40}, 70);
  whole.ids()[0][11].fill_(padding_);  // the text up to here ends in it
  std::int64_t known = 0;
  for (const std::int64_t tokens : {5, 12, 13, 29, 40}) {
    const auto text = Request{
        {whole.ids().narrow(1, 0, tokens).clone(), whole.mask().narrow(1, 0, tokens).clone()}, {{0, tokens}}, tokens};
    const auto want = run_plain(subject_.plain, text.inputs);
    EXPECT_TRUE(close_on_real(keeping_.forward(text.inputs), want, text, kClose)) << tokens;
    const auto report = keeping_.last_report();
    EXPECT_EQ(report.sequences[0].reused_tokens, known);
    EXPECT_EQ(report.sequences[0].layers[0].computed, tokens - known);
    known = tokens;
  }
  // Another text with the same beginning, in a batch with a known one.
  auto request = right({30, 40, 6}, 71);
  request.ids()[0].narrow(0, 0, 20).copy_(whole.ids()[0].narrow(0, 0, 20));
  request.ids()[1].copy_(whole.ids()[0]);
  EXPECT_TRUE(
      close_on_real(keeping_.forward(request.inputs), run_plain(subject_.plain, request.inputs), request, kClose));
  EXPECT_EQ(keeping_.last_report().sequences[0].reused_tokens, 20);
  EXPECT_EQ(keeping_.last_report().sequences[1].source, Source::kIdentical);
}

TEST_P(Classifier, WholeRequestsAreFoundAgain) {
  const auto request = right({9, 5, 12}, 80);
  const auto want = run_plain(subject_.plain, request.inputs);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(close_on_real(keeping_.forward(request.inputs), want, request, kClose));
  }
  for (const auto& sequence : keeping_.last_report().sequences) EXPECT_EQ(sequence.source, Source::kIdentical);
  for (std::size_t row = 0; row < 3; ++row) {
    const auto alone = request.alone(row);
    EXPECT_TRUE(close_on_real(keeping_.forward(alone.inputs), run_plain(subject_.plain, alone.inputs), alone, kClose));
    EXPECT_EQ(keeping_.last_report().sequences[0].source, Source::kIdentical);
  }
}

TEST_P(Classifier, RandomInterleavings) {
  std::mt19937 random(7);
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto texts = right({48, 48, 48}, 90);
  for (std::int64_t text = 0; text < 3; ++text) {
    texts.ids()[text].narrow(0, 0, 16).copy_(texts.ids()[0].narrow(0, 0, 16));
    for (int k = 0; k < 6; ++k) texts.ids()[text][pick(0, 47)].fill_(padding_);
  }
  for (int call = 0; call < 25; ++call) {
    SCOPED_TRACE(call);
    const auto rows = pick(1, 4);
    const auto width = pick(20, 48);
    std::vector<Span> spans;
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto tokens = pick(1, width);
      spans.push_back({pick(0, 2) == 0 ? width - tokens : 0, tokens});
    }
    auto request = padded_by(make_request(info(), spans, width, 0), pick(0, 5) == 0 ? pick(0, 9) : padding_);
    for (std::int64_t row = 0; row < rows; ++row) {
      const Span& span = spans[static_cast<std::size_t>(row)];
      request.ids()[row].narrow(0, span.first, span.tokens).copy_(texts.ids()[pick(0, 2)].narrow(0, 0, span.tokens));
    }
    expect_right(request);
  }
  EXPECT_GT(keeping_.stats().tokens_reused, 0U);
}

TEST_P(Classifier, PlansRunSomeTokens) {
  const auto request = right({14, 9}, 100);
  const auto want = run_plain(subject_.plain, request.inputs);
  auto& cache = subject_.cache;
  Donors donors;
  EXPECT_TRUE(close_on_real(cache.forward_plan(request.inputs, cache.full_plan(request.inputs), {}, &donors), want,
                            request, kClose));
  const auto layers = static_cast<std::int32_t>(profile().layers);
  for (std::size_t row = 0; row < 2; ++row) {
    ASSERT_EQ(donors.at(row)->hidden.back().size(1), request.spans[row].tokens) << "all final states are captured";
  }
  // Computed is what is read, something else, or nothing.
  for (const auto& [first, second] : std::vector<std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>>{
           {{13}, {2, 8}}, {{0, 5}, {1}}, {{}, {}}}) {
    const Plan plan{
        2, 14, layers, {compute_some(0, 0, 14, layers, first, 0), compute_some(1, 0, 9, layers, second, 1)}};
    EXPECT_TRUE(close_on_real(cache.forward_plan(request.inputs, plan, donors), want, request, kClose));
  }
  const auto other = padded_by(request, 7);
  EXPECT_THAT([&] { cache.forward_plan(other.inputs, cache.full_plan(other.inputs)); },
              ThrowsError(ErrorCode::kNotAvailable, "read at its padding"));
}

/// Counts what it sees.
class CountingHook final : public LayerHook {
 public:
  HookAction at_layer(LayerStates& /*states*/) override {
    ++calls;
    return HookAction::kGoOn;
  }
  int calls = 0;
};

TEST_P(Classifier, HooksSeeAllTokens) {
  const auto request = right({9, 5}, 110);
  RequestOptions options;
  const auto hook = std::make_shared<CountingHook>();
  options.hook = hook;
  const auto got = subject_.cache.forward(request.inputs, options);
  EXPECT_TRUE(close_on_real(got, run_plain(subject_.plain, request.inputs), request, kClose));
  EXPECT_GT(hook->calls, 0);
}

TEST_P(Classifier, OutputsOfTokensAreWhole) {
  const auto request = right({9, 5}, 120);
  const auto want = run_plain(subject_.plain, request.inputs);
  for (const Output output : {Output::kLastToken, Output::kNewTokens}) {
    for (int turn = 0; turn < 2; ++turn) {
      EXPECT_TRUE(close_on_real(keeping_.forward(request.inputs, {.output = output}), want, request, kClose));
    }
  }
}

TEST_P(Classifier, WithPackedWeightsAndASavedProfile) {
  const auto path =
      std::filesystem::temp_directory_path() / ("llmcache-choice-" + test_name({GetParam(), 0}) + ".json");
  std::filesystem::remove(path);
  const auto request = right({9, 5, 12}, 130);
  const auto want = run_plain(subject_.plain, request.inputs);
  for (const bool known : {false, true}) {
    LayerCache<Module> cache(load_model(GetParam()), {.weights = Weights::kPackedFp32, .profile_path = path.string()});
    EXPECT_EQ(cache.profile().from_file, known) << cache.profile().file_note;
    EXPECT_TRUE(cache.profile().head_chooses);
    EXPECT_TRUE(cache.profile().prefix_reuse);
    for (int turn = 0; turn < 2; ++turn) {
      EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, kClose));
    }
  }
  std::filesystem::remove(path);
}

INSTANTIATE_TEST_SUITE_P(All, Classifier, ::testing::ValuesIn(classifiers()), test_name);

TEST(ClassifierModels, TheExpectedOnesAreThere) {
  EXPECT_THAT(classifiers(),
              ::testing::IsSupersetOf({"classify-gpt2", "classify-llama", "classify-qwen2", "classify-gpt2.pt2",
                                       "classify-llama.pt2", "classify-qwen2.pt2"}));
}

/// Scripted models with heads that choose, and with some that only look so.
class ChoosingHead : public ::testing::Test {
 protected:
  /// `line` makes `at`; `result` is what the model returns.
  void wrap(const std::string& line, const std::string& result, bool causal = true) {
    script_ = {};
    script_.forward = Script::with(script_.forward, "    return torch.tanh(x)",
                                   "    rows = torch.arange(input_ids.size(0))\n    " + line +
                                       "\n    x = torch.tanh(x)\n" + "    return " + result);
    if (causal) {
      script_.forward = Script::with(
          script_.forward, "    bias = (1.0 - attention_mask.unsqueeze(1).to(x.dtype)) * -1.0e9",
          "    later = (places.unsqueeze(0) > places.unsqueeze(1)).to(x.dtype)\n"
          "    bias = torch.clamp(later + (1.0 - attention_mask.unsqueeze(1).to(x.dtype)), 0.0, 1.0) * -1.0e9");
    }
    plain_.emplace(make_module(script_));
    cache_ = std::make_unique<LayerCache<Module>>(make_module(script_));
  }
  [[nodiscard]] const ModelProfile& profile() const { return cache_->profile(); }

  /// Beginnings of a few texts in batches of all kinds, so that what is known of one meets another.
  void expect_right() {
    const auto info = script_info(script_);
    const auto texts = right_padded(info, {30, 30}, 1);
    texts.ids()[1].narrow(0, 0, 9).copy_(texts.ids()[0].narrow(0, 0, 9));
    for (const std::int64_t token : {6, 14, 15, 29}) texts.ids()[0][token].fill_(0);
    std::uint64_t seed = 0;
    for (int round = 0; round < 2; ++round) {
      for (const std::vector<std::int64_t>& lengths :
           std::vector<std::vector<std::int64_t>>{{7}, {9, 4}, {16, 7, 30}, {30, 30}, {12, 1, 5, 16}}) {
        for (const bool left : {false, true}) {
          auto request = left ? left_padded(info, lengths, ++seed) : right_padded(info, lengths, ++seed);
          for (std::size_t row = 0; row < lengths.size(); ++row) {
            const Span& span = request.spans[row];
            request.ids()[static_cast<std::int64_t>(row)]
                .narrow(0, span.first, span.tokens)
                .copy_(texts.ids()[static_cast<std::int64_t>(row % 2)].narrow(0, 0, span.tokens));
          }
          const auto want = run_plain(*plain_, request.inputs);
          EXPECT_TRUE(close_on_real(cache_->forward(request.inputs), want, request, kClose))
              << ::testing::PrintToString(lengths) << (left ? ", left\n" : "\n") << cache_->last_report().to_string();
          EXPECT_FALSE(cache_->last_report().replaced);
          expect_rows_right(request);
        }
      }
    }
  }

  /// Each by itself, after the batch, so that what is known of one would answer the other.
  void expect_rows_right(const Request& request) {
    for (std::size_t row = 0; row < request.spans.size(); ++row) {
      const auto alone = request.alone(row);
      EXPECT_TRUE(close_on_real(cache_->forward(alone.inputs), run_plain(*plain_, alone.inputs), alone, kClose))
          << row << "\n"
          << cache_->last_report().to_string();
    }
  }

  Script script_;
  std::optional<Module> plain_;
  std::unique_ptr<LayerCache<Module>> cache_;
};

constexpr const char* kLastOther =
    "at = torch.argmax((input_ids != 0).to(input_ids.dtype) * torch.arange(input_ids.size(1)), 1)";

TEST_F(ChoosingHead, OfManyForms) {
  const std::string gathered = "torch.gather(x, 1, at.unsqueeze(1).unsqueeze(2).expand(-1, -1, x.size(2)))";
  const std::vector<std::pair<std::string, std::string>> heads{
      {kLastOther, "x[rows, at]"},
      {kLastOther, "torch.softmax(x[rows, at], -1) * attention_mask.sum(1, True)"},  // more is done row by row
      {kLastOther, gathered},
      {kLastOther, gathered + ".squeeze(1)"},
      {"at = attention_mask.sum(1) - 1", "x[rows, at]"},                              // the last that is not masked
      {"at = torch.argmax((input_ids == 0).to(input_ids.dtype), 1)", "x[rows, at]"},  // the first of a kind
      {"at = torch.argmax(input_ids, 1)", "x[rows, at]"},                             // the largest id
  };
  for (const auto& [line, result] : heads) {
    SCOPED_TRACE(line + "; " + result);
    wrap(line, result);
    EXPECT_TRUE(profile().head_chooses) << profile().to_string();
    EXPECT_EQ(profile().granularity, Granularity::kTokens) << profile().to_string();
    EXPECT_TRUE(profile().prefix_reuse) << profile().to_string();
    expect_right();
    EXPECT_GT(cache_->stats().tokens_reused, 0U);
  }
}

/// Which on a GPU takes a copy to the host.
TEST_F(ChoosingHead, ThePlaceIsReadOnceACall) {
  wrap(kLastOther, "x[rows, at]");
  LayerCache<Module> cache(make_module(script_), {.verify_rate = 0});
  const auto request = right_padded(script_info(script_), {9, 4, 12}, 3);
  (void)cache.forward(request.inputs);
  cache.clear();
  const int found = calls_of("aten::argmax", [&] { (void)cache.forward(request.inputs); });
  EXPECT_EQ(cache.last_report().execution, Execution::kPacked);
  EXPECT_EQ(found, 2) << "once to be read, and once among what is computed in front of the layers";
}

TEST_F(ChoosingHead, OfOneFixedPlace) {
  for (const char* result :
       {"x[:, 0]", "x[:, -1]", "x[:, 0:1].squeeze(1)", "torch.softmax(x[:, 0] + 0.5 * x[:, -1], -1)", "x[rows, 0]",
        "x[:, x.size(1) - 1]", "x[:, input_ids.size(1) // 2]"}) {
    SCOPED_TRACE(result);
    for (const bool causal : {true, false}) {
      SCOPED_TRACE(causal);
      wrap("at = rows", result, causal);
      // The last position is padding's in the batches by which packing is checked.
      const bool first = std::string_view(result) == "x[:, 0]";
      const bool last = std::string_view(result) == "x[:, -1]";
      if (first || last) {
        EXPECT_EQ(profile().granularity == Granularity::kWholeLayers, last) << profile().to_string();
      }
      expect_right();
    }
  }
}

TEST_F(ChoosingHead, LookAlikes) {
  const std::vector<std::pair<std::string, std::string>> heads{
      {"at = torch.tensor(-1)", "x[rows, at]"},                                 // at padding, if there is any
      {"at = torch.argmax(torch.sum(x, 2), 1)", "x[rows, at]"},                 // by hidden states
      {kLastOther, "x[input_ids.size(0) - 1 - rows, at]"},                      // of another row
      {std::string(kLastOther) + ".max()", "x[rows, at]"},                      // by what other rows hold
      {kLastOther, "x[rows, at] + torch.mean(x, [1])"},                         // all tokens go past it
      {kLastOther, "x[rows, at] - torch.mean(x[rows, at], [0], True)"},         // rows meet behind it
      {kLastOther, "x[rows, at] + x[rows, torch.argmax(input_ids, 1)]"},        // two of them
      {kLastOther, "x[rows, at] * (1.0 + 0.1 * at.unsqueeze(1).to(x.dtype))"},  // its place is a number, too
      {kLastOther, "torch.cumsum(x, 1)[rows, at]"},                             // tokens meet in front of it
  };
  for (const auto& [line, result] : heads) {
    SCOPED_TRACE(line + "; " + result);
    wrap(line, result);
    expect_right();
  }
}

}  // namespace
}  // namespace llmcache::test
