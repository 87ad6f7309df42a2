// Reuse of segments in causal models: which models' keys can be moved, and what comes out.
#include "reuse/segment_reuse/segment_reuse.h"

#include <algorithm>
#include <map>
#include <random>
#include <thread>

#include "execute/wrap.h"
#include "llmcache/model/torchscript.h"
#include "support.h"

namespace llmcache::test {
namespace {

using Tokens = std::vector<std::int64_t>;

Tokens concatenated(std::initializer_list<Tokens> parts) {
  Tokens all;
  for (const Tokens& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// --- models -------------------------------------------------------------------------------------------

struct Rig {
  explicit Rig(const std::string& name, std::size_t capacity = std::size_t{64} << 20)
      : Rig(name, load_model(name), capacity) {}
  Rig(const std::string& name, Module module, std::size_t capacity = std::size_t{64} << 20)
      : info(model_info(name)), plain(std::move(module)), wrapped(wrap(ModelTraits<Module>::wrap(plain, {}), {})) {
    reuse = std::make_unique<SegmentReuse>(wrapped, SegmentOptions{}, capacity);
  }

  Request request(const std::vector<Tokens>& rows) const {
    std::vector<std::int64_t> lengths;
    for (const Tokens& row : rows) lengths.push_back(static_cast<std::int64_t>(row.size()));
    Request made = right_padded(info, lengths, 1);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      auto row = made.ids()[static_cast<std::int64_t>(r)];
      row.narrow(0, 0, lengths[r]).copy_(at::tensor(rows[r], row.options()));
    }
    return made;
  }
  Batch batch(const Request& request) const {
    return check_batch(request.inputs, wrapped.inputs, wrapped.profile, wrapped.model->device());
  }
  void keep(const std::vector<Tokens>& rows, const std::string& tenant = "") {
    ForwardReport ignored;
    reuse->keep(batch(request(rows)), tenant, ignored);
  }
  c10::IValue run(const Request& given, const SegmentSettings& settings, Output which = Output::kAll,
                  const std::string& tenant = "") {
    const c10::NoGradGuard no_grad;
    const Batch checked = batch(given);
    report = {};
    return reuse->run(checked, tenant, reuse->find(checked, tenant, settings), settings, which, report);
  }
  Tokens random(std::uint64_t seed, std::size_t count) const {
    std::mt19937_64 generator(seed);
    Tokens tokens;
    for (std::size_t i = 0; i < count; ++i) {
      tokens.push_back(10 + static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(info.vocab - 10)));
    }
    return tokens;
  }

  ModelInfo info;
  Module plain;
  WrappedModel wrapped;
  std::unique_ptr<SegmentReuse> reuse;
  ForwardReport report;
};

struct Expectation {
  std::string name;
  bool movable;
  std::size_t rotations;
};

void PrintTo(const Expectation& expectation, std::ostream* out) { *out << expectation.name; }

class KeyPositionsOf : public ::testing::TestWithParam<Expectation> {};

TEST_P(KeyPositionsOf, AreFoundOrRefused) {
  const c10::NoGradGuard no_grad;
  const auto& expected = GetParam();
  const auto model = ModelTraits<Module>::wrap(load_model(expected.name), {});
  const auto found = find_key_positions(*model, model->input_spec());
  EXPECT_EQ(found.movable, expected.movable) << found.why;
  EXPECT_EQ(found.why.empty(), expected.movable) << found.why;
  EXPECT_EQ(found.rotations.size(), expected.rotations) << found.why;
  EXPECT_GE(found.positions, 80);
}

INSTANTIATE_TEST_SUITE_P(
    Models, KeyPositionsOf,
    ::testing::Values(Expectation{"tiny-llama-sdpa", true, 1}, Expectation{"tiny-llama-eager", true, 1},
                      Expectation{"tiny-llama-sdpa-bf16", true, 1}, Expectation{"zoo-qwen2", true, 1},
                      Expectation{"zoo-mistral", true, 1}, Expectation{"zoo-gptneox", true, 1},
                      Expectation{"zoo-gptj", true, 1}, Expectation{"zoo-phi", true, 1},
                      Expectation{"zoo-falcon", true, 1}, Expectation{"zoo-gemma2", true, 1},
                      Expectation{"zoo-bloom", true, 0}, Expectation{"tiny-gpt2-sdpa", false, 0},
                      Expectation{"tiny-gpt2-eager", false, 0}, Expectation{"zoo-opt", false, 0},
                      Expectation{"zoo-gptneo", false, 0}, Expectation{"tiny-llama-sdpa.pt2", true, 1},
                      Expectation{"zoo-gptneox.pt2", true, 1}, Expectation{"tiny-gpt2-sdpa.pt2", false, 0}),
    [](const auto& param) {
      return test_name({param.param.name, 0});
    });

// --- what comes out ------------------------------------------------------------------------------------

/// Largest difference of two results at the last token, relative to the largest magnitude.
double last_difference(const Rig& rig, const c10::IValue& got, const Request& request, const c10::IValue& plain) {
  double worst = 0;
  for (std::size_t r = 0; r < request.spans.size(); ++r) {
    const auto row = static_cast<std::int64_t>(r);
    const auto want = leaves(plain)[0][row].select(0, request.spans[r].tokens - 1).to(at::kDouble);
    const auto have = leaves(got)[0][row].select(0, 0).to(at::kDouble);
    worst = std::max(worst, (have - want).abs().max().item<double>() / want.abs().max().item<double>());
  }
  EXPECT_EQ(leaves(got)[0].size(1), 1) << rig.info.name;
  return worst;
}

class Segments : public ::testing::TestWithParam<std::string> {
 protected:
  /// With an empty bank. Made once: wrapping takes longer than the tests.
  static Rig& rig() {
    static std::map<std::string, std::unique_ptr<Rig>> rigs;
    auto& found = rigs[GetParam()];
    if (!found) found = std::make_unique<Rig>(GetParam());
    found->reuse->clear();
    return *found;
  }
};

// All tokens recomputed, and an exact prefix: as the plain model, whatever is known.
TEST_P(Segments, LosslessWhereItMustBe) {
  Rig& rig = Segments::rig();
  const auto head = rig.random(1, 20);
  const auto a = rig.random(2, 50);
  const auto b = rig.random(3, 40);
  rig.keep({concatenated({head, a}), concatenated({head, b})});
  EXPECT_EQ(rig.reuse->counters().entries, 2u);
  SegmentSettings all;
  all.recompute_share = 1;
  all.keep = false;
  const auto moved =
      rig.request({concatenated({head, b, a, rig.random(4, 7)}), concatenated({head, a, rig.random(5, 3)})});
  EXPECT_TRUE(close_on_real(rig.run(moved, all), run_plain(rig.plain, moved.inputs), moved, tolerance_of(rig.info)))
      << rig.report.to_string();
  EXPECT_EQ(rig.report.sequences[0].reused_tokens, 60);
  EXPECT_EQ(rig.report.sequences[1].reused_tokens, 70);
  EXPECT_EQ(rig.report.sequences[0].source, Source::kPrefix);
  // Behind an exact prefix a share of 0 recomputes everything too, where nothing else is known.
  SegmentSettings none;
  none.recompute_share = 0;
  const auto longer = rig.request({concatenated({head, a, rig.random(6, 30)})});
  EXPECT_TRUE(
      close_on_real(rig.run(longer, none), run_plain(rig.plain, longer.inputs), longer, tolerance_of(rig.info)));
  EXPECT_EQ(rig.report.sequences[0].source, Source::kPrefix);
  // That was kept; all of it is known now, to the last token.
  EXPECT_TRUE(
      close_on_real(rig.run(longer, none), run_plain(rig.plain, longer.inputs), longer, tolerance_of(rig.info)));
  EXPECT_EQ(rig.report.sequences[0].reused_tokens, 100);
}

// Passages in another order, and an edit: near the plain model, even if its weights are random and its tokens too. What
// is reused stays out of every layer, what is not exact is not kept.
TEST_P(Segments, MovedAndEditedComeNear) {
  Rig& rig = Segments::rig();
  const auto head = rig.random(1, 20);
  const auto a = rig.random(2, 50);
  const auto b = rig.random(3, 60);
  const auto question = rig.random(4, 8);
  rig.keep({concatenated({head, a}), concatenated({head, b})});
  const auto moved = rig.request({concatenated({head, b, a, question})});
  const auto edited = rig.request({concatenated({head, rig.random(9, 6), Tokens(a.begin() + 6, a.end()), question})});
  for (const bool edit : {true, false}) {
    const Request& request = edit ? edited : moved;
    const bool reusable = edit || rig.reuse->positions().movable;
    const auto plain = run_plain(rig.plain, request.inputs);
    for (const double share : {0.0, 0.3}) {
      if (share > 0 && !rig.wrapped.model->token_level()->self_contained()) continue;
      SegmentSettings settings;
      settings.recompute_share = share;
      settings.keep = share == 0;
      const auto kept = rig.reuse->counters().insertions;
      const auto got = rig.run(request, settings, Output::kLastToken);
      EXPECT_LE(last_difference(rig, got, request, plain), 0.5) << share << rig.report.to_string();
      const auto& sequence = rig.report.sequences[0];
      if (!reusable) {
        EXPECT_EQ(rig.reuse->counters().insertions, kept + (share == 0 ? 1 : 0));
        EXPECT_EQ(sequence.source, Source::kPrefix);
        continue;
      }
      EXPECT_EQ(rig.reuse->counters().insertions, kept);
      EXPECT_EQ(sequence.source, Source::kPartial);
      EXPECT_EQ(sequence.reused_tokens, edit ? 20 : 80);
      EXPECT_LT(sequence.layers.back().computed, share == 0 ? 22 : 36);
      EXPECT_EQ(sequence.layers.back().computed + sequence.layers.back().reused, sequence.tokens);
    }
  }
}

TEST_P(Segments, TenantsDoNotMeet) {
  Rig& rig = Segments::rig();
  const auto tokens = rig.random(1, 60);
  rig.keep({tokens}, "one");
  const auto batch = rig.batch(rig.request({tokens}));
  EXPECT_TRUE(rig.reuse->find(batch, "one", {})[0]);
  EXPECT_FALSE(rig.reuse->find(batch, "two", {})[0]);
  rig.reuse->clear();
  EXPECT_FALSE(rig.reuse->find(batch, "one", {})[0]);
  EXPECT_EQ(rig.reuse->counters().bytes, 0u);
}

TEST(SegmentModels, ThoseThatRunWholeLayersAreRefused) {
  EXPECT_THAT([] { Rig rig("zoo-qwen3moe"); }, ThrowsError(ErrorCode::kNotAvailable, "any subset of tokens"));
}

// Where attention changes nothing but in the last layer, the states of a token are the same behind any text: reused
// keys, once they are turned to their places, and values must be the request's own.
TEST(SegmentModels, MovedKeysAreTheRequestsOwn) {
  for (const char* name : {"tiny-llama-sdpa", "tiny-llama-eager", "tiny-llama-sdpa-bf16", "zoo-qwen2", "zoo-mistral",
                           "zoo-gptneox", "zoo-gptj", "zoo-phi", "zoo-falcon", "zoo-gemma2"}) {
    SCOPED_TRACE(name);
    const c10::NoGradGuard no_grad;
    Module module = load_model(name);
    const auto info = model_info(name);
    const std::string last = "." + std::to_string(info.layers - 1) + ".";
    int silenced = 0;
    for (const auto& parameter : module.named_parameters()) {
      const bool output =
          std::ranges::any_of(std::vector<std::string>{"o_proj", "out_proj", "attention.dense", "self_attn.dense"},
                              [&](const std::string& part) { return parameter.name.find(part) != std::string::npos; });
      if (!output || parameter.name.find(last) != std::string::npos) continue;
      parameter.value.zero_();
      ++silenced;
    }
    ASSERT_GE(silenced, info.layers - 1);
    Rig rig(name, module);
    const auto head = rig.random(1, 20);
    const auto a = rig.random(2, 50);
    const auto b = rig.random(3, 60);
    rig.keep({concatenated({head, a}), concatenated({head, b})});
    const auto request = rig.request({concatenated({head, b, rig.random(4, 9), a, rig.random(5, 8)})});
    SegmentSettings settings;
    settings.recompute_share = 0;
    settings.head_tokens = 0;
    const auto got = rig.run(request, settings, Output::kLastToken);
    EXPECT_EQ(rig.report.sequences[0].layers.back().computed, 17);
    EXPECT_LE(last_difference(rig, got, request, run_plain(rig.plain, request.inputs)), 2 * tolerance_of(rig.info));
  }
}

INSTANTIATE_TEST_SUITE_P(All, Segments, ::testing::ValuesIn(token_level_decoders()), test_name);

TEST(SegmentReuseTest, BatchesMixRowsOfEveryKind) {
  Rig rig("tiny-llama-sdpa");
  const auto head = rig.random(1, 20);
  const auto a = rig.random(2, 50);
  const auto b = rig.random(3, 60);
  rig.keep({concatenated({head, a}), concatenated({head, b})});
  const std::vector<Tokens> rows{concatenated({head, b, a, rig.random(4, 5)}), rig.random(5, 33),
                                 concatenated({head, a}), concatenated({head, rig.random(6, 9), b}), rig.random(7, 4)};
  const auto request = rig.request(rows);
  SegmentSettings settings;
  settings.keep = false;
  for (const double share : {0.0, 0.2, 1.0}) {
    settings.recompute_share = share;
    const auto together = rig.run(request, settings, Output::kLastToken);
    const std::vector<Source> sources{share == 1 ? Source::kPrefix : Source::kPartial, Source::kComputed,
                                      Source::kPrefix, share == 1 ? Source::kPrefix : Source::kPartial,
                                      Source::kComputed};
    for (std::size_t r = 0; r < rows.size(); ++r) EXPECT_EQ(rig.report.sequences[r].source, sources[r]) << r;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const auto alone = rig.run(rig.request({rows[r]}), settings, Output::kLastToken);
      const auto row = leaves(together)[0][static_cast<std::int64_t>(r)];
      EXPECT_TRUE(at::allclose(row, leaves(alone)[0][0], 1e-4, 1e-4)) << share << " " << r;
    }
  }
}

TEST(SegmentReuseTest, OutputsCoverTheTokensAskedFor) {
  Rig rig("tiny-llama-sdpa");
  const auto head = rig.random(1, 20);
  const auto a = rig.random(2, 50);
  rig.keep({concatenated({head, a})});
  const auto request = rig.request({concatenated({head, rig.random(6, 9), a, rig.random(7, 5)})});
  SegmentSettings settings;
  const auto all = leaves(rig.run(request, settings, Output::kAll))[0];
  const auto fresh = leaves(rig.run(request, settings, Output::kNewTokens))[0];
  const auto last = leaves(rig.run(request, settings, Output::kLastToken))[0];
  EXPECT_EQ(all.size(1), 84);
  ASSERT_EQ(fresh.size(1), 64);
  EXPECT_TRUE(at::allclose(fresh, all.narrow(1, 20, 64), 1e-5, 1e-5));
  EXPECT_TRUE(at::allclose(last, all.narrow(1, 83, 1), 1e-5, 1e-5));
}

// Below the layer by which tokens are chosen all of them run, from it on those chosen and those that are not known.
TEST(SegmentReuseTest, TokensAreChosenAtTheLayerThatIsAskedFor) {
  Rig rig("tiny-llama-sdpa");
  const auto head = rig.random(1, 20);
  const auto a = rig.random(2, 60);
  rig.keep({concatenated({head, a})});
  const auto request = rig.request({concatenated({head, rig.random(6, 9), a, rig.random(7, 5)})});
  for (const std::int32_t layer : {1, 3}) {
    SegmentSettings settings;
    settings.recompute_share = 0.25;
    settings.choosing_layer = layer;
    const auto found = rig.reuse->find(rig.batch(request), "", settings);
    ASSERT_TRUE(found[0]);
    const auto got = rig.run(request, settings);
    for (std::int32_t l = 0; l < 4; ++l) {
      const auto& counts = rig.report.sequences[0].layers[static_cast<std::size_t>(l)];
      EXPECT_EQ(counts.computed, l < layer ? 74 : 9 + 4 + 14 + 5) << layer << " " << l;
    }
    EXPECT_NEAR(found[0]->computed_fraction, rig.report.computed_fraction(), 1e-9);
    // Layers below see the true text, so that the more of them run the nearer it comes.
    EXPECT_LE(last_difference(rig, rig.run(request, settings, Output::kLastToken), request,
                              run_plain(rig.plain, request.inputs)),
              layer == 1 ? 0.5 : 0.35);
  }
}

TEST(SegmentReuseTest, PassagesOfSeveralSequencesAreKeptAsTheirMean) {
  const c10::NoGradGuard no_grad;
  Rig rig("tiny-llama-sdpa");
  const auto head = rig.random(1, 20);
  const auto passage = rig.random(2, 60);
  const auto first = concatenated({head, rig.random(3, 30), passage});
  const auto second = concatenated({head, rig.random(4, 17), passage});
  rig.keep({first});
  EXPECT_EQ(rig.reuse->counters().means, 0u);
  rig.keep({second});
  EXPECT_EQ(rig.reuse->counters().means, 1u);
  const auto hits = [&](const Tokens& tokens) {
    return rig.reuse->find(rig.batch(rig.request({tokens})), "", {})[0]->segments;
  };
  const auto found = hits(concatenated({head, rig.random(5, 9), passage, rig.random(6, 5)}));
  ASSERT_EQ(found.size(), 2u);
  EXPECT_TRUE(found[0].exact);
  const SegmentHit& mean = found[1];
  ASSERT_TRUE(mean.donor->is_mean());
  EXPECT_EQ(mean.donor->origin().averaged, 2);
  EXPECT_EQ(mean.begin, 29);
  EXPECT_EQ(mean.tokens, 60);
  EXPECT_EQ(mean.move(), 29 - 50);  // keys stand as in the first of the two
  const auto of_first = hits(first);
  const auto of_second = hits(second);
  ASSERT_TRUE(of_first.size() == 1 && of_first[0].exact && of_second.size() == 1 && of_second[0].exact);
  const auto& positions = rig.reuse->positions();
  std::size_t turned = 0;
  for (std::size_t i = 0; i < positions.rotation_of[0][0].size(); ++i) {
    auto own = of_second[0].donor->state(i, 37, 60).clone();
    const auto& dims = rig.wrapped.model->token_level()->key_dims(0, 0);
    if (const int number = positions.rotation_of[0][0][i]; number >= 0) {
      const auto& rotation = positions.rotations[static_cast<std::size_t>(number)];
      rotate_(own, dims[i], rotation, angles_of(rotation, std::vector<std::int64_t>(60, 50 - 37), own.device()));
      ++turned;
    }
    const auto wanted = (own + of_first[0].donor->state(i, 50, 60)) / 2;
    EXPECT_TRUE(at::allclose(mean.donor->state(i, mean.donor_begin, 60), wanted, 1e-4, 1e-5)) << i;
  }
  EXPECT_EQ(turned, 1u);

  // One more sequence, one more in the mean; the tokens' own states win where their surroundings are the same too.
  rig.keep({concatenated({head, rig.random(7, 11), passage})});
  EXPECT_EQ(rig.reuse->counters().means, 1u);
  const auto again = hits(concatenated({head, rig.random(5, 9), passage, rig.random(6, 5)}));
  ASSERT_EQ(again.size(), 2u);
  EXPECT_EQ(again[1].donor->origin().averaged, 3);
  // One token of the passage is another: what is left of it there leaves the mean as it is.
  auto edited = passage;
  edited[10] = edited[10] == 10 ? 11 : 10;
  rig.keep({concatenated({head, rig.random(9, 13), edited})});
  EXPECT_EQ(hits(concatenated({head, rig.random(5, 9), passage, rig.random(6, 5)}))[1].donor->origin().averaged, 3);
  const auto around = hits(concatenated({rig.random(8, 25), rig.random(3, 30), passage}));
  ASSERT_EQ(around.size(), 1u);
  EXPECT_FALSE(around[0].donor->is_mean());
  EXPECT_EQ(around[0].tokens, 90);
  rig.reuse->clear();
  EXPECT_EQ(rig.reuse->counters().means, 0u);
}

TEST(SegmentReuseTest, WhatIsNotFiniteReachesNoOtherSequence) {
  const c10::NoGradGuard no_grad;
  constexpr std::int64_t kBad = 5;
  Rig rig("tiny-llama-sdpa");
  for (const auto& parameter : rig.plain.parameters()) {
    if (parameter.size(0) == rig.info.vocab) parameter.select(0, kBad).fill_(std::nanf(""));
  }
  const Tokens passage = rig.random(1, 60);
  const auto behind = [&](const Tokens& head) { return concatenated({head, passage, rig.random(2, 5)}); };
  const auto others = [&](const c10::IValue& result) {  // logits of all but the bad token, which may share its weights
    const auto logits = leaves(result)[0];
    return at::cat({logits.narrow(2, 0, kBad), logits.narrow(2, kBad + 1, rig.info.vocab - kBad - 1)}, 2);
  };
  SegmentSettings settings;
  settings.recompute_share = 0;
  const auto bad = rig.run(rig.request({behind({kBad})}), settings);
  EXPECT_FALSE(others(bad).isfinite().any().item<bool>());
  EXPECT_EQ(rig.reuse->counters().entries, 0u);
  EXPECT_EQ(rig.reuse->counters().bytes, 0u);
  // Beside one that is kept, and again beside what is known of the passage by then.
  rig.keep({behind({kBad, kBad}), behind(rig.random(3, 20))});
  rig.keep({behind({kBad, kBad, kBad})});
  EXPECT_EQ(rig.reuse->counters().entries, 1u);
  EXPECT_EQ(rig.reuse->counters().means, 0u);
  const auto good = rig.run(rig.request({behind(rig.random(4, 30))}), settings);
  EXPECT_EQ(rig.report.sequences[0].source, Source::kPartial);
  EXPECT_TRUE(others(good).isfinite().all().item<bool>());
}

TEST(SegmentReuseTest, SettingsAreChecked) {
  Rig rig("tiny-llama-sdpa");
  const auto batch = rig.batch(rig.request({rig.random(1, 40)}));
  const auto with = [&](auto change) {
    SegmentSettings settings;
    change(settings);
    return [&rig, &batch, settings] { (void)rig.reuse->find(batch, "", settings); };
  };
  EXPECT_THAT(with([](auto& s) { s.recompute_share = 1.5; }),
              ThrowsError(ErrorCode::kInvalidOptions, "recompute_share is 1.5"));
  EXPECT_THAT(with([](auto& s) { s.head_tokens = -1; }), ThrowsError(ErrorCode::kInvalidOptions, "head_tokens"));
  EXPECT_THAT(with([](auto& s) { s.least_segment = 0; }), ThrowsError(ErrorCode::kInvalidOptions, "least_segment"));
  for (const std::int32_t layer : {0, 4}) {
    EXPECT_THAT(with([layer](auto& s) { s.choosing_layer = layer; }),
                ThrowsError(ErrorCode::kInvalidOptions, "choosing_layer"));
  }
  ForwardReport report;
  EXPECT_THAT([&] { rig.reuse->run(batch, "", {}, {}, Output::kAll, report); },
              ThrowsError(ErrorCode::kInvalidOptions, "0 matches"));
  EXPECT_THAT([] { Rig encoder("tiny-bert-sdpa"); }, ThrowsError(ErrorCode::kNotAvailable, "causal"));
}

TEST(SegmentReuseTest, ThreadsShareOneBankWithinItsCapacity) {
  static constexpr std::size_t kCapacity = std::size_t{600} << 10;
  Rig rig("tiny-llama-sdpa", kCapacity);
  const auto work = [&rig](std::uint64_t seed) {
    const c10::NoGradGuard no_grad;
    std::mt19937_64 random(seed);
    for (int i = 0; i < 25; ++i) {
      const auto request = rig.request({concatenated(
          {rig.random(1, 20), rig.random(random() % 12, 50), rig.random(random() % 12, 50), rig.random(random(), 5)})});
      const auto batch = rig.batch(request);
      SegmentSettings settings;
      settings.recompute_share = static_cast<double>(i % 3) / 2;
      ForwardReport report;
      const auto got =
          rig.reuse->run(batch, "", rig.reuse->find(batch, "", settings), settings, Output::kLastToken, report);
      ASSERT_TRUE(at::isfinite(leaves(got)[0]).all().item<bool>());
      ASSERT_LE(rig.reuse->counters().peak_bytes, kCapacity);
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t) threads.emplace_back(work, t);
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(rig.reuse->counters().insertions, 0u);
  EXPECT_GT(rig.reuse->counters().evictions, 0u);
  rig.reuse->clear();
  EXPECT_EQ(rig.reuse->counters().bytes, 0u);
}

}  // namespace
}  // namespace llmcache::test
