// Prefix reuse: causal models compute what follows the longest known prefix, and answer as the plain model does.
#include <algorithm>
#include <map>
#include <random>

#include "execute/wrap.h"
#include "llmcache/model/torchscript.h"
#include "model/attention.h"
#include "model/probe.h"
#include "reuse/prefix/prefix_reuse.h"
#include "support.h"

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;

/// Rows of these tokens, padded to the longest on the right or on the left.
Request request_of(const ModelInfo& info, const std::vector<Tokens>& rows, bool left = false) {
  std::size_t width = 0;
  for (const Tokens& row : rows) width = std::max(width, row.size());
  std::vector<Span> spans;
  for (const Tokens& row : rows) {
    const auto n = static_cast<std::int64_t>(row.size());
    spans.push_back({left ? static_cast<std::int64_t>(width) - n : 0, n});
  }
  Request request = make_request(info, spans, static_cast<std::int64_t>(width), 1);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    auto row = request.ids()[static_cast<std::int64_t>(r)];
    row.narrow(0, spans[r].first, spans[r].tokens).copy_(at::tensor(rows[r], row.options()));
    for (std::size_t i = 2; i < request.inputs.size(); ++i) {  // further inputs follow from the ids
      request.inputs[i].toTensor()[static_cast<std::int64_t>(r)].copy_(row.remainder(2));
    }
  }
  return request;
}

/// What a request for some tokens' results must return, made from the result for all.
std::vector<at::Tensor> selected(const c10::IValue& all, const Request& request, const ForwardReport& report,
                                 Output output) {
  std::vector<at::Tensor> cut;
  for (const at::Tensor& leaf : leaves(all)) {
    std::int64_t width = output == Output::kLastToken ? 1 : 0;
    std::vector<std::int64_t> counts;
    for (std::size_t r = 0; r < request.spans.size(); ++r) {
      const auto tokens = request.spans[r].tokens;
      counts.push_back(output == Output::kLastToken ? std::min<std::int64_t>(1, tokens)
                                                    : tokens - report.sequences[r].reused_tokens);
      width = std::max(width, counts.back());
    }
    auto shape = leaf.sizes().vec();
    shape[1] = width;
    auto want = at::zeros(shape, leaf.options());
    for (std::size_t r = 0; r < request.spans.size(); ++r) {
      const auto row = static_cast<std::int64_t>(r);
      const auto end = request.spans[r].first + request.spans[r].tokens;
      want[row].narrow(0, 0, counts[r]).copy_(leaf[row].narrow(0, end - counts[r], counts[r]));
    }
    cut.push_back(want);
  }
  return cut;
}

double difference(const at::Tensor& got, const at::Tensor& want) {
  if (got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type()) return 1e30;
  if (got.numel() == 0) return 0;
  const auto scale = std::max(want.to(at::kDouble).abs().max().item<double>(), 1e-3);
  return (got.to(at::kDouble) - want.to(at::kDouble)).abs().max().item<double>() / scale;
}

/// A model twice: as it is, and wrapped with a cache that keeps prefixes.
struct Pair {
  explicit Pair(const std::string& name, Options options = {})
      : info(model_info(name)), plain(load_plain(name)), cache(cache_of(name, options)) {}

  /// Empty if forward() returns what the plain model does.
  std::string wrong(const Request& request, const RequestOptions& options) {
    const auto got = cache.forward(request.inputs, options);
    const auto all = run_plain(plain, request.inputs);
    report = cache.last_report();
    const double tolerance = tolerance_of(info);
    if (options.output == Output::kAll) {
      const double off = real_difference(got, all, request);
      return off <= tolerance ? "" : "kAll differs by " + std::to_string(off) + "\n" + report.to_string();
    }
    const auto want = selected(all, request, report, options.output);
    const auto have = leaves(got);
    if (have.size() != want.size()) return "another number of tensors";
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double off = difference(have[i], want[i]);
      if (off > tolerance) {
        return std::string("output ") + to_string(options.output) + " differs by " + std::to_string(off) + "\n" +
               report.to_string();
      }
    }
    return "";
  }

  ModelInfo info;
  Module plain;
  LayerCache<Module> cache;
  ForwardReport report;
};

Tokens random_tokens(std::mt19937_64& random, const ModelInfo& info, std::size_t count) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) {
    tokens.push_back(10 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(info.vocab - 10)));
  }
  return tokens;
}

// --- exported models ---------------------------------------------------------------------------------

class Prefix : public ::testing::TestWithParam<std::string> {};

TEST(PrefixModels, ReuseIsAvailableWhereItMustBe) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-gpt2-eager", "tiny-gpt2-eager-bf16", "tiny-llama-sdpa",
                           "tiny-llama-eager", "tiny-llama-sdpa-bf16", "zoo-gptj"}) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(subject(name).cache.profile().prefix_reuse) << subject(name).cache.profile().to_string();
  }
  for (const char* name : {"tiny-bert-sdpa", "tiny-bert-eager", "tiny-distilbert-sdpa", "zoo-qwen3moe"}) {
    SCOPED_TRACE(name);
    EXPECT_FALSE(subject(name).cache.profile().prefix_reuse);
  }
}

// Random interleavings: growth, truncation, edits, repeats, shared prefixes within and across requests, paddings,
// tenants, outputs, evictions forced by a small capacity.
TEST_P(Prefix, AnswersAsThePlainModelDoes) {
  ASSERT_TRUE(subject(GetParam()).cache.profile().prefix_reuse);
  for (const std::size_t capacity : {std::size_t{64} << 20, std::size_t{220} << 10}) {
    SCOPED_TRACE(capacity);
    Pair pair(GetParam(), {.capacity_bytes = capacity});
    const bool left_too = pair.cache.profile().left_padding;
    std::mt19937_64 random(capacity);
    std::vector<Tokens> pool{random_tokens(random, pair.info, 12)};
    for (int step = 0; step < 100; ++step) {
      std::vector<Tokens> rows;
      const std::size_t count = random() % 3 == 0 ? 1 + random() % 4 : 1;
      for (std::size_t r = 0; r < count; ++r) {
        Tokens tokens = pool[random() % pool.size()];
        switch (random() % 7) {
          case 0:
            tokens = random_tokens(random, pair.info, 1 + random() % 24);
            break;
          case 1:
          case 2: {  // growth
            const auto more = random_tokens(random, pair.info, 1 + random() % 5);
            tokens.insert(tokens.end(), more.begin(), more.end());
            break;
          }
          case 3:
            tokens.resize(1 + random() % tokens.size());
            break;
          case 4:
            tokens[random() % tokens.size()] = 10 + static_cast<std::int64_t>(random() % 90);
            break;
          default:
            break;
        }
        if (tokens.size() > 48) tokens.resize(48);
        rows.push_back(tokens);
      }
      const auto output = static_cast<Output>(random() % 3);
      const std::string tenant = random() % 4 == 0 ? "other" : "";
      const bool left = left_too && random() % 4 == 0;
      const auto request = request_of(pair.info, rows, left);
      const auto wrong = pair.wrong(request, {.output = output, .tenant = tenant});
      ASSERT_TRUE(wrong.empty()) << "step " << step << ": " << wrong;
      const Stats stats = pair.cache.stats();
      ASSERT_LE(stats.bytes, capacity) << "step " << step;
      ASSERT_LE(stats.peak_bytes, capacity) << "step " << step;
      pool.push_back(rows.back());
      if (pool.size() > 12) pool.erase(pool.begin() + static_cast<std::ptrdiff_t>(random() % pool.size()));
    }
    const Stats stats = pair.cache.stats();
    EXPECT_GT(stats.prefix_hits, 0u);
    EXPECT_GT(stats.tokens_reused, 0u);
    EXPECT_LT(stats.tokens_computed, stats.tokens);
  }
}

TEST_P(Prefix, AGrowingSequenceComputesItsNewTokensOnly) {
  ASSERT_TRUE(subject(GetParam()).cache.profile().prefix_reuse);
  Pair pair(GetParam());
  std::mt19937_64 random(3);
  Tokens tokens = random_tokens(random, pair.info, 5);
  for (int step = 0; step < 40; ++step) {
    const auto request = request_of(pair.info, {tokens});
    const auto wrong = pair.wrong(request, {.output = Output::kLastToken});
    ASSERT_TRUE(wrong.empty()) << wrong;
    const auto& sequence = pair.report.sequences.at(0);
    ASSERT_EQ(sequence.reused_tokens, step == 0 ? 0 : static_cast<std::int64_t>(tokens.size()) - 1);
    for (const LayerTokens& layer : sequence.layers) ASSERT_EQ(layer.computed, step == 0 ? 5 : 1);
    ASSERT_EQ(sequence.source, step == 0 ? Source::kComputed : Source::kPrefix);
    tokens.push_back(10 + static_cast<std::int64_t>(random() % 90));
  }
  EXPECT_LE(pair.cache.stats().entries, 3u) << "growth in place makes no entry for each token";
}

INSTANTIATE_TEST_SUITE_P(All, Prefix, ::testing::ValuesIn(token_level_decoders()), test_name);
INSTANTIATE_TEST_SUITE_P(Exported, Prefix, ::testing::Values("tiny-llama-sdpa.pt2", "zoo-mistral.pt2"), test_name);

// --- one model ----------------------------------------------------------------------------------------

class PrefixOfLlama : public ::testing::Test {
 protected:
  PrefixOfLlama() : pair_("tiny-llama-sdpa"), random_(7) {}
  Tokens tokens(std::size_t count) { return random_tokens(random_, pair_.info, count); }
  static Tokens joined(Tokens a, const Tokens& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  }
  void expect_right(const std::vector<Tokens>& rows, const RequestOptions& options = {}, bool left = false) {
    const auto wrong = pair_.wrong(request_of(pair_.info, rows, left), options);
    EXPECT_TRUE(wrong.empty()) << wrong;
  }

  Pair pair_;
  std::mt19937_64 random_;
};

TEST_F(PrefixOfLlama, RowsOfOneBatchComputeANewCommonPrefixOnce) {
  const auto common = tokens(20);
  const std::vector<Tokens> rows{joined(common, tokens(3)), joined(common, tokens(5)), joined(common, {}),
                                 joined(common, tokens(1)), tokens(6)};
  expect_right(rows, {.output = Output::kNewTokens});
  const auto& sequences = pair_.report.sequences;
  const std::vector<std::int64_t> computed{23, 5, 0, 1, 6};
  for (std::size_t r = 0; r < rows.size(); ++r) {
    EXPECT_EQ(sequences[r].reused_tokens, 0) << r;
    EXPECT_EQ(sequences[r].layers.at(0).computed, computed[r]) << r;
    EXPECT_EQ(sequences[r].shared_tokens, static_cast<std::int64_t>(rows[r].size()) - computed[r]) << r;
  }
  // The second time all of it is known, and the common part is held once.
  expect_right(rows);
  for (std::size_t r = 0; r < rows.size(); ++r) EXPECT_EQ(pair_.report.sequences[r].layers.at(0).computed, 0) << r;
}

TEST_F(PrefixOfLlama, ContinuationsThatPartDoNotSeeEachOther) {
  const auto common = tokens(9);
  expect_right({common});
  const auto one = tokens(4);
  const auto other = tokens(4);
  for (std::size_t n = 1; n <= 4; ++n) {
    expect_right({joined(common, {one.begin(), one.begin() + static_cast<std::ptrdiff_t>(n)})});
    EXPECT_EQ(pair_.report.sequences[0].reused_tokens, static_cast<std::int64_t>(9 + n - 1));
    expect_right({joined(common, {other.begin(), other.begin() + static_cast<std::ptrdiff_t>(n)})});
    EXPECT_EQ(pair_.report.sequences[0].reused_tokens, static_cast<std::int64_t>(9 + n - 1));
  }
}

TEST_F(PrefixOfLlama, TenantsAreApart) {
  const auto text = tokens(10);
  const auto reused = [&](const std::string& tenant) {
    expect_right({text}, {.output = Output::kLastToken, .tenant = tenant});
    return pair_.report.sequences[0].reused_tokens;
  };
  EXPECT_EQ(reused("acme"), 0);
  EXPECT_EQ(reused("acme"), 10);
  EXPECT_EQ(reused("bolt"), 0);
  EXPECT_EQ(reused(""), 0);
  EXPECT_EQ(reused("bolt"), 10);
}

TEST_F(PrefixOfLlama, KnownRequestsHaveNoNewTokens) {
  const auto text = tokens(8);
  expect_right({text}, {.output = Output::kNewTokens});
  expect_right({text}, {.output = Output::kNewTokens});
  EXPECT_EQ(pair_.report.sequences[0].source, Source::kIdentical);
  const auto got = pair_.cache.forward(request_of(pair_.info, {text, text}).inputs, {.output = Output::kNewTokens});
  EXPECT_EQ(got.toTensor().sizes(), (std::vector<std::int64_t>{2, 0, pair_.info.vocab}));
  // Beside one that has some, and beside a row of padding alone.
  expect_right({text, joined(text, tokens(2)), {}}, {.output = Output::kNewTokens});
  expect_right({text, {}}, {.output = Output::kLastToken});
}

TEST_F(PrefixOfLlama, LeftPaddedGrowthIsFoundAtTheSamePosition) {
  std::vector<Tokens> rows{tokens(5), tokens(9)};
  expect_right(rows, {}, true);
  for (int step = 0; step < 4; ++step) {
    for (Tokens& row : rows) row.push_back(20 + step);
    expect_right(rows, {.output = Output::kLastToken}, true);
    for (const auto& sequence : pair_.report.sequences) EXPECT_EQ(sequence.layers.at(0).computed, 1);
  }
}

TEST_F(PrefixOfLlama, OtherFidelitiesDoNotUsePrefixes) {
  const auto text = tokens(10);
  expect_right({text});
  expect_right({joined(text, {20})}, {.fidelity = Fidelity::kIdentical});
  EXPECT_EQ(pair_.report.sequences[0].reused_tokens, 0);
  EXPECT_EQ(pair_.report.execution, Execution::kDense);
}

TEST_F(PrefixOfLlama, ClearForgets) {
  const auto text = tokens(10);
  expect_right({text});
  pair_.cache.clear();
  EXPECT_EQ(pair_.cache.stats().entries, 0u);
  expect_right({text}, {.output = Output::kLastToken});
  EXPECT_EQ(pair_.report.sequences[0].reused_tokens, 0);
}

TEST_F(PrefixOfLlama, NothingReturnedIsAViewOfTheCache) {
  const auto text = tokens(10);
  auto first = pair_.cache.forward(request_of(pair_.info, {text}).inputs).toTensor();
  first.fill_(7);
  expect_right({text});
  expect_right({joined(text, {21})});
}

TEST(PrefixLayers, APrefixResumesAboveTheHighestLayerThatIsNotKept) {
  struct ResumeCase {
    std::vector<std::int64_t> kept;
    std::int64_t resumed;
  };
  for (const ResumeCase& c :
       {ResumeCase{{0, 1, 2}, 0}, ResumeCase{{1, 2}, 1}, ResumeCase{{0, 2}, 2}, ResumeCase{{0, 1}, 3}}) {
    SCOPED_TRACE(::testing::PrintToString(c.kept));
    Pair pair("tiny-gpt2-sdpa", {.prefix = {.layers = c.kept}});
    std::mt19937_64 random(5);
    Tokens text = random_tokens(random, pair.info, 12);
    for (int step = 0; step < 3; ++step) {
      const auto wrong = pair.wrong(request_of(pair.info, {text}), {.output = Output::kNewTokens});
      ASSERT_TRUE(wrong.empty()) << wrong;
      const auto& sequence = pair.report.sequences[0];
      EXPECT_EQ(sequence.resumed_layer, step == 0 ? -1 : c.resumed);
      for (std::size_t l = 0; l < sequence.layers.size(); ++l) {
        const bool all = step == 0 || static_cast<std::int64_t>(l) < c.resumed;
        EXPECT_EQ(sequence.layers[l].computed, all ? static_cast<std::int32_t>(text.size()) : 2) << "layer " << l;
      }
      text.push_back(30 + step);
      text.push_back(31 + step);
    }
  }
}

TEST(PrefixOptionsTest, WrongOnesAreRefused) {
  const auto refused = [](const PrefixOptions& prefix, const std::string& part) {
    EXPECT_THAT([&] { LayerCache<Module>(load_model("tiny-gpt2-sdpa"), {.prefix = prefix}); },
                ThrowsError(ErrorCode::kInvalidOptions, part));
  };
  refused({.capacity_share = 1.5}, "capacity_share is 1.5");
  refused({.layers = {2, 1}}, "layers has 1 behind 2");
  refused({.layers = {3}}, "layers names layer 3");
  Pair pair("tiny-gpt2-sdpa");
  const auto request = request_of(pair.info, {{20, 21}});
  EXPECT_THAT([&] { pair.cache.forward(request.inputs, {.output = static_cast<Output>(9)}); },
              ThrowsError(ErrorCode::kInvalidOptions, "output is 9"));
}

TEST(PrefixOptionsTest, ShareOfNothingSwitchesReuseOff) {
  for (const Options& options : {Options{.prefix = {.capacity_share = 0}}, Options{.capacity_bytes = 0}}) {
    Pair pair("tiny-gpt2-sdpa", options);
    for (int round = 0; round < 2; ++round) {
      const auto wrong = pair.wrong(request_of(pair.info, {{20, 21, 22}}), {.output = Output::kLastToken});
      EXPECT_TRUE(wrong.empty()) << wrong;
      EXPECT_EQ(pair.report.sequences[0].source,
                options.capacity_bytes > 0 && round > 0 ? Source::kIdentical : Source::kComputed);
    }
  }
}

TEST(PrefixOutputs, OfEncodersToo) {
  for (const char* name : {"tiny-bert-sdpa", "tiny-distilbert-eager"}) {
    for (const auto fidelity : {Fidelity::kIdentical, Fidelity::kLossless}) {
      Pair pair(name);
      const auto request = request_of(pair.info, {{20, 21, 22, 23}, {30, 31}, {40, 41, 42}});
      for (int round = 0; round < 2; ++round) {
        for (const auto output : {Output::kLastToken, Output::kNewTokens, Output::kAll}) {
          const auto wrong = pair.wrong(request, {.fidelity = fidelity, .output = output});
          EXPECT_TRUE(wrong.empty()) << name << " " << wrong;
        }
      }
    }
  }
}

// The probe decides whether a model is causal. Were it wrong, the check of prefix reuse would notice.
TEST(PrefixVerification, AModelThatIsWronglyTakenForCausalIsCaught) {
  for (const char* name : {"tiny-bert-sdpa", "tiny-bert-eager", "tiny-gpt2-sdpa", "tiny-llama-sdpa"}) {
    SCOPED_TRACE(name);
    const c10::InferenceMode no_grad;
    const Options options;
    WrappedModel wrapped = wrap(wrap_torchscript(load_model(name), options), options);
    const bool causal = wrapped.profile.causal;
    EXPECT_EQ(causal, model_info(name).family == "decoder");
    wrapped.profile.causal = true;
    const Verification none(0);
    std::string why;
    PrefixReuse reuse(wrapped, none, {}, std::size_t{16} << 20);
    EXPECT_EQ(reuse.verify(why, false), causal);
    EXPECT_THAT(why, ::testing::HasSubstr(causal ? "" : "comes out otherwise"));
    EXPECT_EQ(reuse.counters().entries, 0u);
  }
}

// An exception in the middle of a pass: nothing of it is kept, not in the layers before either.
TEST(PrefixFaults, APassThatRaisesLeavesNothing) {
  Script script;
  script.layer = Script::with(script.layer, "    x = x + torch.matmul(mixed, self.wo)\n",
                              "    x = x + torch.matmul(mixed, self.wo)\n"
                              "    far = (x.abs().amax(-1) > 1.0e4).long() * 1000000\n"
                              "    x = x + 0.0 * torch.embedding(self.up, far)\n");
  script.forward = Script::with(script.forward, "* -1.0e9",
                                "* -1.0e9 + torch.triu(torch.full([input_ids.size(1), input_ids.size(1)], -1.0e9), 1)");
  Module plain = make_module(script);
  {
    const c10::NoGradGuard no_grad;
    plain.attr("table").toTensor()[20].fill_(1e6);  // none that is probed
  }
  LayerCache<Module> cache(plain);
  ASSERT_TRUE(cache.profile().prefix_reuse) << cache.profile().to_string();
  const auto info = script_info(script);
  const auto good = request_of(info, {{40, 41, 42, 43}});
  cache.forward(good.inputs);
  const auto before = cache.stats();
  for (int round = 0; round < 3; ++round) {
    const auto bad = request_of(info, {{40, 41, 42, 43, 44, 45}, {40, 41, 20}});
    EXPECT_THAT([&] { cache.forward(bad.inputs); }, ThrowsError(ErrorCode::kModelFailed));
  }
  EXPECT_EQ(cache.stats().entries, before.entries);
  EXPECT_EQ(cache.stats().bytes, before.bytes);
  const auto longer = request_of(info, {{40, 41, 42, 43, 44, 45, 46}});
  EXPECT_TRUE(close_on_real(cache.forward(longer.inputs), run_plain(plain, longer.inputs), longer, 5e-5));
  EXPECT_EQ(cache.last_report().sequences[0].reused_tokens, 4);
}

TEST(PrefixNarrowEmbed, DecodersPrepareOnlyWhatIsNeeded) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-gpt2-eager", "tiny-llama-sdpa", "tiny-llama-eager"}) {
    const c10::InferenceMode no_grad;
    const auto model = wrap_torchscript(load_model(name), {});
    const auto inputs = probe_inputs(model->input_spec(), model->device(), 1, 12);
    const auto last = at::full({1}, 11, at::dtype(at::kLong).device(model->device()));
    PackedLayout layout{1, 12, 1, {{0, 0, 12, 0, 1, last}}, last, last};
    const auto run = model->token_level()->start_at(inputs, last, layout);
    ASSERT_NE(run, nullptr) << name;
    EXPECT_EQ(difference(run->hidden(), model->embed(inputs).hidden.narrow(1, 11, 1)), 0) << name;
  }
}

// --- attention over several tensors of keys -------------------------------------------------------------

class PrefixAttention : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(PrefixAttention, SegmentsGiveWhatOneTensorGives) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(11);
  const auto random = [&](at::IntArrayRef shape) {
    return at::randn(shape, generator, at::TensorOptions()).to(GetParam());
  };
  const double tolerance = GetParam() == at::kBFloat16 ? 3e-2 : 2e-6;
  for (const std::int64_t key_heads : {1, 2, 4}) {
    for (const std::int64_t active : {1, 2, 5}) {
      const std::int64_t heads = 4;
      const std::int64_t tokens = 19;
      const auto q = random({1, heads, active, 8});
      const auto k = random({1, key_heads, tokens, 8});
      const auto v = random({1, key_heads, tokens, 8});
      const auto positions = at::arange(tokens - active, tokens, at::kLong);
      const auto causal = at::arange(tokens, at::kLong).unsqueeze(0).le(positions.unsqueeze(1));
      const auto wide = [&](const at::Tensor& t) { return t.repeat_interleave(heads / key_heads, 1); };
      const std::vector<std::optional<at::Tensor>> masks{
          std::nullopt, causal, causal.view({1, 1, active, tokens}), random({1, heads, active, tokens}),
          at::zeros({1, 1, 1, tokens}, q.options()).masked_fill(at::arange(tokens).lt(6), -1e30),
          // The first segment is hidden from all.
          at::arange(tokens).ge(8).view({1, 1, 1, tokens}).expand({1, 1, active, tokens})};
      for (std::size_t m = 0; m < masks.size(); ++m) {
        SCOPED_TRACE(::testing::Message() << key_heads << " key heads, " << active << " queries, mask " << m);
        const auto want = at::scaled_dot_product_attention(q, wide(k), wide(v), masks[m], 0.0, false, 0.3);
        for (const std::vector<std::int64_t>& cuts :
             {std::vector<std::int64_t>{19}, {8, 11}, {7, 1, 11}, {18, 1}, {3, 3, 3, 10}}) {
          std::vector<KeySegment> segments;
          std::int64_t first = 0;
          for (const std::int64_t n : cuts) {
            segments.push_back({n, {k.narrow(2, first, n), v.narrow(2, first, n)}});
            first += n;
          }
          EXPECT_LT(difference(attend({false, 0.3}, q, segments, masks[m], positions), want), tolerance);
        }
      }
      const auto want = at::scaled_dot_product_attention(q, wide(k), wide(v), causal, 0.0, false, 0.3);
      const std::vector<KeySegment> two{{15, {k.narrow(2, 0, 15), v.narrow(2, 0, 15)}},
                                        {4, {k.narrow(2, 15, 4), v.narrow(2, 15, 4)}}};
      EXPECT_LT(difference(attend({true, 0.3}, q, two, {}, positions), want), tolerance);
      EXPECT_LT(difference(attend({true, 0.3}, q, {{19, {k, v}}}, {}, positions), want), tolerance);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, PrefixAttention, ::testing::Values(at::kFloat, at::kDouble, at::kBFloat16));

}  // namespace
}  // namespace llmcache::test
