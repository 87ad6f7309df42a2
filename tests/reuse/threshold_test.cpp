// Fidelity::kThreshold: what is served, from where, and what is kept, aged and watched.
#include <cmath>
#include <limits>
#include <random>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;

/// Every request is served by any entry: what comes out shows what was done with it.
Options any_entry() {
  Options options{.fidelity = Fidelity::kThreshold};
  options.threshold.tau = -1;
  options.threshold.fingerprint = {.kind = FingerprintKind::kRaw, .centring = Centring::kOff};
  return options;
}

/// Raw cosine without centring, at least `tau`.
Options at_least(double tau) {
  Options options = any_entry();
  options.threshold.tau = tau;
  return options;
}

double cosine(const std::vector<float>& a, const std::vector<float>& b) {
  double product = 0;
  double aa = 0;
  double bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    product += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  return product / std::sqrt(aa * bb);
}

/// `result`, of a batch of one row of `from` tokens, as it is documented to be served for `to` tokens.
at::Tensor served_as(const c10::IValue& result, bool causal, std::int64_t from, std::int64_t to) {
  const auto tensor = leaves(result).at(0);
  const std::int64_t shift = causal ? from - to : 0;
  std::vector<at::Tensor> rows;
  for (std::int64_t t = 0; t < to; ++t) {
    rows.push_back(tensor.select(1, std::clamp<std::int64_t>(t + shift, 0, from - 1)));
  }
  return at::stack(rows, 1);
}

// --- differential: every architecture, every layer that a sequence may go on from ---------------------

class ThresholdModels : public ModelTest {};

TEST_P(ThresholdModels, AnEntryTakesThePlaceOfARequestAtEveryLayer) {
  if (refused()) return;
  if (profile().granularity != Granularity::kTokens) {
    EXPECT_THAT([&] { LayerCache<Module> cache = cache_of(info().name, any_entry()); },
                ThrowsError(ErrorCode::kNotAvailable, "threshold"));
    return;
  }
  const auto filled = right_padded(info(), {9}, 1);
  const auto asked = right_padded(info(), {9}, 2);
  const auto shorter = right_padded(info(), {5}, 3);
  const auto longer = right_padded(info(), {14}, 4);
  const auto want = plain(filled.inputs);
  const double tolerance = tolerance_of(info());
  for (std::int64_t layer = 0; layer < profile().layers; ++layer) {
    SCOPED_TRACE(layer);
    auto options = any_entry();
    options.threshold.cache_layers = {layer};
    LayerCache<Module> cache = cache_of(info().name, options);
    EXPECT_TRUE(close_on_real(cache.forward(filled.inputs), want, filled, tolerance));
    EXPECT_EQ(cache.last_report().sequences[0].source, Source::kComputed);
    EXPECT_TRUE(close_on_real(cache.forward(asked.inputs), want, asked, tolerance));
    const auto told = cache.last_report().sequences[0];
    EXPECT_EQ(told.source, Source::kSimilar);
    EXPECT_EQ(told.resumed_layer, layer + 1);
    EXPECT_EQ(told.entry, 0);
    EXPECT_EQ(told.number, 1U);
    for (std::int64_t l = 0; l < profile().layers; ++l) {
      EXPECT_EQ(told.layers[static_cast<std::size_t>(l)].computed, l > layer ? 9 : 0) << l;
    }
    if (leaves(want)[0].dim() < 3) continue;  // one answer a sequence: nothing to align
    for (const auto* request : {&shorter, &longer}) {
      const auto expected = served_as(want, profile().causal, 9, request->padded_length);
      EXPECT_TRUE(close_on_real(leaves(cache.forward(request->inputs))[0], expected, *request, tolerance));
    }
    EXPECT_EQ(cache.stats().similar_hits, 3U);
    EXPECT_EQ(cache.stats().layers.at(0).hits, 3U);
  }
}

TEST_P(ThresholdModels, ARaggedBatchIsServedRowByRow) {
  if (refused() || profile().granularity != Granularity::kTokens) return;
  LayerCache<Module> cache = cache_of(info().name, at_least(0.9999));
  const double tolerance = tolerance_of(info());
  const auto first = right_padded(info(), {9, 4, 12}, 1);
  EXPECT_TRUE(close_on_real(cache.forward(first.inputs), plain(first.inputs), first, tolerance));
  // Row 1 is known from a narrower batch; the others are new.
  auto second = right_padded(info(), {7, 4, 15}, 2);
  for (std::size_t i = 0; i < second.inputs.size(); ++i) {
    second.inputs[i].toTensor()[1].narrow(0, 0, 4).copy_(first.inputs[i].toTensor()[1].narrow(0, 0, 4));
  }
  EXPECT_TRUE(close_on_real(cache.forward(second.inputs), plain(second.inputs), second, tolerance));
  const auto report = cache.last_report();
  EXPECT_EQ(report.sequences[0].source, Source::kComputed);
  EXPECT_EQ(report.sequences[1].source, Source::kSimilar);
  EXPECT_EQ(report.sequences[1].entry, 1);
  EXPECT_NEAR(report.sequences[1].similarity, 1, 1e-3);
  EXPECT_EQ(report.sequences[2].source, Source::kComputed);
  // All rows known: no layer runs.
  EXPECT_TRUE(close_on_real(cache.forward(second.inputs), plain(second.inputs), second, tolerance));
  EXPECT_EQ(cache.last_report().computed_fraction(), 0);
  EXPECT_EQ(cache.stats().similar_hits, 4U);
}

INSTANTIATE_TEST_SUITE_P(Tiny, ThresholdModels,
                         ::testing::ValuesIn(wrappable_names({"tiny-bert", "tiny-distilbert", "tiny-gpt2", "tiny-llama",
                                                              "tiny-scripted"})),
                         test_name);

// --- one small model ----------------------------------------------------------------------------------

class Threshold : public ::testing::Test {
 protected:
  Threshold() : model_(subject("tiny-bert-sdpa")) {}

  LayerCache<Module> cache(const Options& options) { return cache_of(model_.info.name, options); }
  [[nodiscard]] Request request(std::int64_t tokens, std::uint64_t seed) const {
    return right_padded(model_.info, {tokens}, seed);
  }
  c10::IValue plain(const Request& request) { return run_plain(model_.plain, request.inputs); }
  /// A copy of a request with one token changed.
  static Request changed(const Request& request, std::int64_t position, std::int64_t id) {
    Request other = request;
    other.inputs = copy_of(request.inputs);
    other.ids()[0][position].fill_(id);
    return other;
  }
  static Source source(const LayerCacheBase& cache) { return cache.last_report().sequences.at(0).source; }

  Subject& model_;
};

TEST_F(Threshold, SimilarityIsThatOfTheStatesAndTauDecides) {
  auto one = cache(at_least(-1));
  const auto a = request(10, 1);
  const auto b = changed(a, 3, 77);
  const double similarity = cosine(one.pooled_state(a.inputs)[0], one.pooled_state(b.inputs)[0]);
  ASSERT_LT(similarity, 0.999);
  one.forward(a.inputs);
  one.forward(b.inputs);
  EXPECT_NEAR(one.last_report().sequences[0].similarity, similarity, 1e-5);
  auto below = cache(at_least(similarity - 1e-4));
  below.forward(a.inputs);
  EXPECT_TRUE(close_on_real(below.forward(b.inputs), plain(a), a, 1e-4));
  EXPECT_EQ(source(below), Source::kSimilar);
  auto above = cache(at_least(similarity + 1e-4));
  above.forward(a.inputs);
  EXPECT_TRUE(close_on_real(above.forward(b.inputs), plain(b), b, 1e-4));
  EXPECT_EQ(source(above), Source::kComputed);
}

TEST_F(Threshold, TheMostSimilarEntryIsTaken) {
  auto one = cache(at_least(0.999));
  std::vector<Request> requests;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) requests.push_back(request(8, seed));
  for (const Request& r : requests) one.forward(r.inputs);
  auto all = cache(any_entry());
  // Filled at once: otherwise the first entry serves the second request.
  Request batch = right_padded(model_.info, {8, 8, 8, 8, 8, 8}, 9);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    for (std::size_t k = 0; k < batch.inputs.size(); ++k) {
      batch.inputs[k].toTensor()[static_cast<std::int64_t>(i)].copy_(requests[i].inputs[k].toTensor()[0]);
    }
  }
  all.forward(batch.inputs);
  const auto near = changed(requests[4], 2, 33);
  EXPECT_TRUE(close_on_real(all.forward(near.inputs), plain(requests[4]), near, 1e-4));
  EXPECT_EQ(all.last_report().sequences[0].entry, 4);
}

TEST_F(Threshold, APooledOutputIsTheEntrysWhateverItsLength) {
  Subject& pooled = subject("tiny-bert-pooled");
  LayerCache<Module> one = cache_of("tiny-bert-pooled", any_entry());
  const auto filled = right_padded(pooled.info, {11}, 1);
  const auto want = leaves(run_plain(pooled.plain, filled.inputs))[0];
  one.forward(filled.inputs);
  for (const std::int64_t tokens : {3, 11, 20}) {
    const auto asked = right_padded(pooled.info, {tokens}, 2);
    EXPECT_TRUE(at::allclose(leaves(one.forward(asked.inputs))[0], want, 1e-4, 1e-5)) << tokens;
  }
}

TEST_F(Threshold, DeeperFingerprintsAreAskedAsThePassReachesThem) {
  // A pair that is more alike behind two layers than before the first one.
  auto probe = cache(at_least(-1));
  Request a = request(8, 1);
  Request b = a;
  double before = 0;
  double behind = 0;
  bool found = false;
  for (std::int64_t id = 20; id < 290 && !found; ++id) {
    b = changed(a, 4, id);
    before = cosine(probe.pooled_state(a.inputs, 0)[0], probe.pooled_state(b.inputs, 0)[0]);
    behind = cosine(probe.pooled_state(a.inputs, 2)[0], probe.pooled_state(b.inputs, 2)[0]);
    found = behind > before + 0.002;
  }
  ASSERT_TRUE(found);
  auto options = at_least((before + behind) / 2);
  options.threshold.fingerprint_layers = {0, 2};
  auto two = cache(options);
  two.forward(a.inputs);
  EXPECT_TRUE(close_on_real(two.forward(b.inputs), plain(a), b, 1e-4));
  const auto told = two.last_report().sequences[0];
  EXPECT_EQ(told.source, Source::kSimilar);
  EXPECT_NEAR(told.similarity, behind, 1e-4);
  EXPECT_EQ(told.resumed_layer, 3);
  EXPECT_EQ(told.layers[0].computed, 8);
  EXPECT_EQ(told.layers[1].computed, 8);
  EXPECT_EQ(told.layers[2].computed, 0);
  EXPECT_EQ(told.layers[2].reused, 8);
  options.threshold.fingerprint_layers = {0};
  auto one = cache(options);
  one.forward(a.inputs);
  one.forward(b.inputs);
  EXPECT_EQ(source(one), Source::kComputed);
}

TEST_F(Threshold, TheDeepestMatchingLayerDecides) {
  const auto a = request(8, 1);
  const auto b = changed(a, 2, 40);
  auto options = at_least(0.5);
  options.threshold.layer_taus = {0.5, 0.5, 1.0};  // the deepest layer asks for the same fingerprint
  auto strict = cache(options);
  strict.forward(a.inputs);
  EXPECT_TRUE(close_on_real(strict.forward(b.inputs), plain(a), b, 1e-4));
  EXPECT_EQ(strict.last_report().sequences[0].resumed_layer, 2);
  const auto stats = strict.stats();
  EXPECT_EQ(stats.layers.at(0).hits, 0U);
  EXPECT_EQ(stats.layers.at(1).hits, 1U);
  EXPECT_EQ(stats.layers.at(2).hits, 0U);
  EXPECT_EQ(stats.layers.at(2).tau, 1.0);
}

TEST_F(Threshold, ABankThatLostItsEntryIsPassedOver) {
  // The deep bank has room for a few entries of 15 KiB, the shallow one for all.
  auto options = at_least(0.99999);
  options.capacity_bytes = 1 << 20;
  options.threshold.capacity_share = 1;
  options.threshold.cache_layers = {0, 2};
  options.threshold.capacity_split = {9, 1};
  auto one = cache(options);
  const auto a = request(60, 1);
  one.forward(a.inputs);
  for (std::uint64_t seed = 2; seed <= 12; ++seed) one.forward(request(60, seed).inputs);
  const auto stats = one.stats();
  ASSERT_EQ(stats.layers.at(0).entries, 12U);
  ASSERT_THAT(stats.layers.at(1).entries, AllOf(Ge(1U), Le(6U)));
  EXPECT_TRUE(close_on_real(one.forward(a.inputs), plain(a), a, 1e-4));
  EXPECT_EQ(one.last_report().sequences[0].resumed_layer, 1);
}

TEST_F(Threshold, EveryKindOfFingerprintFindsTheSameRequestAndNoOther) {
  const auto known = request(12, 1);
  const auto other = request(12, 2);
  PcaModel pca = [&] {
    auto probe = cache(any_entry());
    std::vector<float> rows;
    for (std::uint64_t seed = 10; seed < 50; ++seed) {
      const auto state = probe.pooled_state(request(12, seed).inputs)[0];
      rows.insert(rows.end(), state.begin(), state.end());
    }
    return PcaModel::fit(rows, model_.info.hidden, 8);
  }();
  for (const auto kind : {FingerprintKind::kRaw, FingerprintKind::kPca, FingerprintKind::kSimHash64,
                          FingerprintKind::kSimHash128, FingerprintKind::kSimHash256, FingerprintKind::kJaccard}) {
    SCOPED_TRACE(to_string(kind));
    auto options = at_least(0.98);
    options.threshold.fingerprint = {.kind = kind, .centring = Centring::kRunning};
    if (kind == FingerprintKind::kPca) options.threshold.fingerprint.pca = std::make_shared<const PcaModel>(pca);
    auto one = cache(options);
    one.forward(known.inputs);
    EXPECT_TRUE(close_on_real(one.forward(other.inputs), plain(other), other, 1e-4));
    EXPECT_EQ(source(one), Source::kComputed);
    EXPECT_TRUE(close_on_real(one.forward(known.inputs), plain(known), known, 1e-4));
    EXPECT_EQ(source(one), Source::kSimilar);
  }
}

TEST_F(Threshold, EntriesAreStillFoundAfterTheCentreHasMoved) {
  Options options{.fidelity = Fidelity::kThreshold, .capacity_bytes = 8 << 20};
  options.threshold.tau = 0.999;
  auto one = cache(options);
  std::vector<Request> requests;
  for (std::uint64_t seed = 0; seed < 70; ++seed) requests.push_back(request(6, seed));
  for (const Request& r : requests) one.forward(r.inputs);  // the centre moves at 16, 32 and 64 states
  const auto hits = one.stats().similar_hits;
  for (const Request& r : requests) {
    one.forward(r.inputs);
    EXPECT_EQ(source(one), Source::kSimilar);
  }
  EXPECT_EQ(one.stats().similar_hits, hits + requests.size());
}

TEST_F(Threshold, ClearingForgetsTheCentre) {
  Options options{.fidelity = Fidelity::kThreshold, .capacity_bytes = 8 << 20};
  options.threshold.tau = {0.5};
  auto used = cache(options);
  auto fresh = cache(options);
  for (std::uint64_t seed = 100; seed < 140; ++seed) used.forward(request(6, seed).inputs);
  used.clear();
  for (std::uint64_t seed = 0; seed < 70; ++seed) {  // both do the same, before the centre has moved and after
    const auto asked = request(6, seed % 50);
    used.forward(asked.inputs);
    fresh.forward(asked.inputs);
    EXPECT_EQ(source(used), source(fresh)) << seed;
    EXPECT_EQ(used.last_report().sequences[0].similarity, fresh.last_report().sequences[0].similarity) << seed;
  }
  EXPECT_EQ(used.stats().entries, fresh.stats().entries);
}

TEST_F(Threshold, AttentionStatisticsArePartOfTheFingerprint) {
  auto options = at_least(0.9999);
  options.threshold.fingerprint_layers = {1};
  options.threshold.fingerprint.attention = true;
  auto with = cache(options);
  const auto a = request(9, 1);
  with.forward(a.inputs);
  EXPECT_TRUE(close_on_real(with.forward(a.inputs), plain(a), a, 1e-4));
  EXPECT_EQ(source(with), Source::kSimilar);
  const auto b = changed(a, 4, 99);
  options.threshold.tau = -1;
  auto loose = cache(options);
  loose.forward(a.inputs);
  loose.forward(b.inputs);
  const double similarity = loose.last_report().sequences[0].similarity;
  EXPECT_GT(std::abs(similarity - cosine(loose.pooled_state(a.inputs, 1)[0], loose.pooled_state(b.inputs, 1)[0])),
            1e-6);
  options.threshold.fingerprint_layers = {0};
  EXPECT_THAT([&] { cache(options); }, ThrowsError(ErrorCode::kInvalidOptions, "attention"));
  options.threshold.fingerprint_layers = {1};
  EXPECT_THAT([&] { LayerCache<Module> eager = cache_of("tiny-bert-eager", options); },
              ThrowsError(ErrorCode::kNotAvailable, "attention statistics"));
}

TEST_F(Threshold, TheSameRequestIsKeptOnce) {
  auto one = cache(at_least(1));  // rounding keeps even the same request below 1 at times
  const auto a = request(9, 1);
  for (int i = 0; i < 5; ++i) one.forward(a.inputs);
  Request twice = right_padded(model_.info, {9, 9}, 1);
  for (auto& input : twice.inputs) input.toTensor()[1].copy_(input.toTensor()[0]);
  one.forward(twice.inputs, {.look_up = false});
  EXPECT_EQ(one.stats().layers.at(0).entries, 1U);
  one.forward(a.inputs, {.tenant = "other", .look_up = false});
  EXPECT_EQ(one.stats().layers.at(0).entries, 2U);
  one.clear();
  one.forward(a.inputs, {.look_up = false});
  EXPECT_EQ(one.stats().layers.at(0).entries, 1U);
}

TEST_F(Threshold, WithoutLookUpEverythingIsComputedAndKept) {
  auto layers = cache(any_entry());
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const auto given = request(9, seed);
    EXPECT_TRUE(close_on_real(layers.forward(given.inputs, {.look_up = false}), plain(given), given, 1e-4));
    EXPECT_EQ(layers.last_report().sequences[0].source, Source::kComputed);
    EXPECT_EQ(layers.stats().layers.at(0).entries, seed);
  }
  layers.forward(request(9, 4).inputs);
  EXPECT_EQ(layers.last_report().sequences[0].source, Source::kSimilar);
  EXPECT_EQ(layers.stats().similar_hits, 1U);
}

TEST_F(Threshold, TenantsAndInputsOfOtherTypesNeverMeet) {
  auto one = cache(any_entry());
  const auto a = request(9, 1);
  const auto b = request(9, 2);
  one.forward(a.inputs, {.tenant = "acme"});
  EXPECT_TRUE(close_on_real(one.forward(b.inputs, {.tenant = "other"}), plain(b), b, 1e-4));
  EXPECT_EQ(source(one), Source::kComputed);
  EXPECT_TRUE(close_on_real(one.forward(b.inputs, {.tenant = "acme"}), plain(a), b, 1e-4));
  auto narrow = b;
  narrow.inputs = copy_of(b.inputs);
  narrow.inputs[1] = narrow.inputs[1].toTensor().to(at::kInt);
  one.forward(narrow.inputs, {.tenant = "acme"});
  EXPECT_EQ(source(one), Source::kComputed);
}

TEST_F(Threshold, BelowThresholdNothingIsServedOnAFingerprint) {
  // 64 bits of the mean of few tokens: the order of the tokens makes no difference to them.
  auto options = any_entry();
  options.threshold.fingerprint = {.kind = FingerprintKind::kSimHash64, .centring = Centring::kOff};
  options.threshold.tau = 1;
  auto one = cache(options);
  const auto a = request(6, 1);
  auto forged = a;
  forged.inputs = copy_of(a.inputs);
  std::int64_t tried = 0;
  for (std::int64_t id = 10; id < 299; ++id, ++tried) {  // one changed token that changes no bit
    forged = changed(a, 2, id);
    if (forged.ids().equal(a.ids())) continue;
    auto fresh = cache(options);
    fresh.forward(a.inputs);
    fresh.forward(forged.inputs);
    if (source(fresh) == Source::kSimilar) break;
    if (tried > 60) break;
  }
  one.forward(a.inputs);
  for (const auto fidelity : {Fidelity::kLossless, Fidelity::kIdentical}) {
    EXPECT_TRUE(close_on_real(one.forward(forged.inputs, {.fidelity = fidelity}), plain(forged), forged, 1e-4));
    EXPECT_EQ(source(one), Source::kComputed);
    EXPECT_TRUE(same_bits(one.forward(a.inputs, {.fidelity = fidelity}), plain(a)));
    one.clear();
    one.forward(a.inputs);
  }
}

TEST_F(Threshold, WhatCannotBePackedIsComputedAsIs) {
  auto one = cache(any_entry());
  auto holes = right_padded(model_.info, {9, 7}, 1);
  holes.mask()[0][3].fill_(0);
  EXPECT_TRUE(same_bits(one.forward(holes.inputs), run_plain(model_.plain, holes.inputs)));
  auto nothing = right_padded(model_.info, {3}, 1);
  nothing.mask().zero_();
  EXPECT_TRUE(same_bits(one.forward(nothing.inputs), run_plain(model_.plain, nothing.inputs)));
  EXPECT_EQ(one.stats().layers.at(0).entries, 0U);
  // A row that is all padding beside real ones.
  const auto partly = right_padded(model_.info, {5, 0, 3}, 1);
  EXPECT_TRUE(close_on_real(one.forward(partly.inputs), run_plain(model_.plain, partly.inputs), partly, 1e-4));
  EXPECT_EQ(one.stats().layers.at(0).entries, 2U);
}

TEST_F(Threshold, StatesThatAreNotFiniteAreCountedAndNeverKept) {
  LayerCache<Module> one = cache_of("tiny-nan", any_entry());
  const auto a = right_padded(model_info("tiny-nan"), {9}, 1);
  const auto want = run_plain(subject("tiny-nan").plain, a.inputs);
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(close_on_real(one.forward(a.inputs), want, a, 1e-4));
    EXPECT_EQ(source(one), Source::kComputed);
  }
  EXPECT_EQ(one.stats().unusable_states, 2U);
  EXPECT_EQ(one.stats().entries, 0U);
}

TEST_F(Threshold, AFailedCallLeavesTheBanksAsTheyWere) {
  auto one = cache(any_entry());
  one.forward(request(9, 1).inputs);
  const auto before = counters_of(one);
  const auto bank = one.stats().to_string();
  auto bad = right_padded(model_.info, {9, 9}, 2);
  bad.ids()[1][4].fill_(100000);
  EXPECT_THAT([&] { one.forward(bad.inputs); }, ::testing::Throws<Error>());
  EXPECT_EQ(counters_of(one), before);
  EXPECT_EQ(one.stats().to_string(), bank);
}

TEST_F(Threshold, PooledStates) {
  auto one = cache({.capacity_bytes = 0});
  const auto ragged = right_padded(model_.info, {9, 0, 4}, 1);
  const auto states = one.pooled_state(ragged.inputs, 3);
  ASSERT_THAT(states, SizeIs(3));
  EXPECT_THAT(states[1], IsEmpty());
  const auto want = leaves(run_plain(model_.plain, ragged.inputs))[0];
  for (const std::size_t row : {std::size_t{0}, std::size_t{2}}) {
    ASSERT_THAT(states[row], SizeIs(static_cast<std::size_t>(model_.info.hidden)));
    const auto mean = want[static_cast<std::int64_t>(row)].narrow(0, 0, ragged.spans[row].tokens).mean(0);
    EXPECT_TRUE(at::allclose(at::tensor(states[row]), mean, 1e-4, 1e-5));
  }
  EXPECT_THAT([&] { return one.pooled_state(ragged.inputs, 4); }, ThrowsError(ErrorCode::kInvalidOptions, "layer 4"));
  EXPECT_THAT([&] { return one.pooled_state(ragged.inputs, -1); }, ThrowsError(ErrorCode::kInvalidOptions, "layer -1"));
  auto holes = right_padded(model_.info, {9}, 1);
  holes.mask()[0][3].fill_(0);
  EXPECT_THAT([&] { return one.pooled_state(holes.inputs); }, ThrowsError(ErrorCode::kInvalidInput, "holes"));
}

TEST_F(Threshold, Polarity) {
  // "please enable contactless payments on my card", and the same with "disable", for MiniLM's tokenizer. What
  // kThreshold does with them is documented in docs/paper-mode.md: below their similarity one answers the other.
  const std::vector<std::int64_t> enable{101, 3531, 9585, 3967, 3238, 10504, 2006, 2026, 4003, 102};
  const std::vector<std::int64_t> disable{101, 3531, 4487, 19150, 3967, 3238, 10504, 2006, 2026, 4003, 102};
  const auto inputs = [](const std::vector<std::int64_t>& ids) {
    const auto row = at::tensor(ids, at::kLong).unsqueeze(0);
    return Inputs{row, at::ones_like(row)};
  };
  auto options = at_least(0.85);  // inside the paper's "best" 0.82-0.88
  options.threshold.cache_layers = {5};
  LayerCache<Module> one = cache_of("minilm", options);
  const double similarity = cosine(one.pooled_state(inputs(enable))[0], one.pooled_state(inputs(disable))[0]);
  EXPECT_NEAR(similarity, 0.897, 0.001);
  const auto enabled = leaves(one.forward(inputs(enable)))[0].clone();
  const auto served = leaves(one.forward(inputs(disable)))[0];
  EXPECT_EQ(source(one), Source::kSimilar);
  EXPECT_TRUE(at::allclose(served.narrow(1, 0, 10), enabled, 1e-3, 1e-4));
  one.forward(inputs(disable), {.fidelity = Fidelity::kLossless});
  EXPECT_EQ(source(one), Source::kComputed);
}

// --- capacity, age ------------------------------------------------------------------------------------

TEST_F(Threshold, NoCapacityKeepsNothing) {
  auto options = any_entry();
  options.capacity_bytes = 0;
  auto one = cache(options);
  const auto a = request(9, 1);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(close_on_real(one.forward(a.inputs), plain(a), a, 1e-4));
  const auto stats = one.stats();
  EXPECT_EQ(stats.bytes, 0U);
  EXPECT_EQ(stats.peak_bytes, 0U);
  EXPECT_EQ(stats.rejected, 6U);
}

TEST_F(Threshold, MemoryIsNeverAboveTheCapacityWhateverThePolicy) {
  std::mt19937_64 random(7);
  for (const auto policy : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    for (const auto kind : {FingerprintKind::kRaw, FingerprintKind::kSimHash128, FingerprintKind::kJaccard}) {
      SCOPED_TRACE(to_string(policy));
      SCOPED_TRACE(to_string(kind));
      auto options = at_least(0.98);
      options.capacity_bytes = 60'000 + random() % 200'000;
      options.threshold.eviction.policy = policy;
      options.threshold.fingerprint.kind = kind;
      options.threshold.capacity_split = {1, 2, 0.5};
      auto one = cache(options);
      for (int i = 0; i < 120; ++i) {
        const auto r = request(1 + static_cast<std::int64_t>(random() % 30), random() % 60);
        const std::string tenant(1, static_cast<char>('a' + random() % 3));
        const auto got = one.forward(r.inputs, {.tenant = tenant});
        const auto stats = one.stats();
        ASSERT_LE(stats.bytes, options.capacity_bytes);
        ASSERT_LE(stats.peak_bytes, options.capacity_bytes);
        std::size_t limit = 0;
        for (const LayerStats& layer : stats.layers) limit += layer.peak_bytes;
        ASSERT_LE(limit, options.capacity_bytes * 9 / 10);
        if (source(one) == Source::kComputed) {
          ASSERT_TRUE(close_on_real(got, plain(r), r, 1e-4));
        }
        if (random() % 40 == 0) one.clear();
      }
      EXPECT_GT(one.stats().insertions, 0U);
      EXPECT_GT(one.stats().evictions, 0U);
      one.clear();
      EXPECT_EQ(one.stats().bytes, 0U);
      EXPECT_EQ(one.stats().entries, 0U);
    }
  }
}

class ThresholdAge : public Threshold {
 protected:
  Options aged() {
    auto options = at_least(0.9999);
    options.refresh.clock = [this] { return now_; };
    return options;
  }
  double now_ = 1000;
};

TEST_F(ThresholdAge, TimeToLive) {
  auto options = aged();
  options.threshold.ttl_seconds = 60;
  auto one = cache(options);
  const auto a = request(9, 1);
  one.forward(a.inputs);
  now_ += 59;
  one.forward(a.inputs);
  EXPECT_EQ(source(one), Source::kSimilar);
  now_ += 1;
  one.forward(a.inputs);
  EXPECT_EQ(source(one), Source::kComputed);
  EXPECT_EQ(one.stats().layers.at(0).expired, 1U);
}

TEST_F(ThresholdAge, AClockThatGoesBackStandsStill) {
  auto options = aged();
  options.threshold.ttl_seconds = 60;
  auto one = cache(options);
  const auto a = request(9, 1);
  one.forward(a.inputs);
  now_ = -1e9;
  one.forward(a.inputs);
  EXPECT_EQ(source(one), Source::kSimilar);
  now_ = std::numeric_limits<double>::quiet_NaN();
  one.forward(a.inputs);
  EXPECT_EQ(source(one), Source::kSimilar);
  now_ = 1060;
  one.forward(a.inputs);
  EXPECT_EQ(source(one), Source::kComputed);
}

TEST_F(ThresholdAge, TemporalDecayFlush) {
  auto options = aged();
  options.refresh.flush_below = 0.4;
  EXPECT_THAT([&] { cache(options); }, ThrowsError(ErrorCode::kInvalidOptions, "flush_below"));
  options.threshold.eviction.policy = Eviction::kDecay;
  options.threshold.eviction.decay.half_life_s = 100;
  auto one = cache(options);
  const auto used = request(9, 1);
  const auto unused = request(9, 2);
  one.forward(used.inputs);
  one.forward(unused.inputs);
  now_ += 50;
  one.forward(used.inputs);  // its score is 1.7 now, the other's 0.7
  now_ += 100;
  one.forward(used.inputs);
  EXPECT_EQ(source(one), Source::kSimilar);
  EXPECT_EQ(one.stats().layers.at(2).decayed, 1U);
  one.forward(unused.inputs);
  EXPECT_EQ(source(one), Source::kComputed);
}

// --- divergence monitor -------------------------------------------------------------------------------

class ThresholdAudit : public Threshold {
 protected:
  static Options audited(double rate) {
    auto options = any_entry();
    options.threshold.tau = 0.2;
    options.threshold.cache_layers = {2};
    options.refresh.audit_rate = rate;
    options.refresh.tolerance.relative = 0.05;
    return options;
  }
};

TEST_F(ThresholdAudit, ACheckedHitIsAnsweredInFullAndAWrongEntryDropped) {
  auto one = cache(audited(1));
  const auto a = request(9, 1);
  const auto b = changed(a, 3, 55);
  one.forward(a.inputs);
  EXPECT_TRUE(close_on_real(one.forward(b.inputs), plain(b), b, 1e-4));
  const auto told = one.last_report().sequences[0];
  EXPECT_EQ(told.source, Source::kComputed);
  EXPECT_TRUE(told.audited);
  const auto want = leaves(plain(b))[0];
  const double error = (leaves(plain(a))[0] - want).norm().item<double>() / want.norm().item<double>();
  EXPECT_NEAR(told.error, error, 1e-3);
  const auto stats = one.stats();
  EXPECT_EQ(stats.similar_hits, 0U);
  const LayerStats& layer = stats.layers.at(0);
  EXPECT_EQ(layer.audits, 1U);
  EXPECT_NEAR(layer.relative_error_mean, error, 1e-3);
  EXPECT_GT(layer.cosine_error_max, 0);
  ASSERT_GT(error, 0.05);  // the tolerance
  EXPECT_EQ(layer.dropped, 1U);
  EXPECT_EQ(layer.entries, 1U);  // what was computed instead
  EXPECT_NEAR(layer.tau, 0.2 + 0.25 * 0.8, 1e-12);
}

TEST_F(ThresholdAudit, TauComesBackWhileChecksAreClean) {
  auto options = audited(1);
  options.refresh.clean_audits = 3;
  auto one = cache(options);
  const auto a = request(9, 1);
  one.forward(a.inputs);
  one.forward(changed(a, 3, 55).inputs);
  const double raised = one.stats().layers.at(0).tau;
  ASSERT_GT(raised, 0.2);
  const auto b = changed(a, 3, 55);
  for (int i = 0; i < 3; ++i) {
    one.forward(b.inputs);
    EXPECT_NEAR(one.last_report().sequences[0].error, 0, 1e-4);
  }
  const auto layer = one.stats().layers.at(0);
  EXPECT_NEAR(layer.tau, raised - 0.1 * (raised - 0.2), 1e-12);
  EXPECT_EQ(layer.audits, 4U);
  EXPECT_EQ(layer.audited_entries, 1U);
  for (int i = 0; i < 300; ++i) one.forward(b.inputs);
  EXPECT_GE(one.stats().layers.at(0).tau, 0.2);
  EXPECT_NEAR(one.stats().layers.at(0).tau, 0.2, 0.01);
}

TEST_F(ThresholdAudit, AChangedDecisionIsOverTolerance) {
  auto options = audited(1);
  options.refresh.tolerance = {2, std::numeric_limits<double>::infinity()};
  std::int64_t calls = 0;
  options.refresh.decision = [&calls](const at::Tensor& output) {
    EXPECT_EQ(output.size(0), 1);
    EXPECT_EQ(output.size(1), 9);
    return ++calls;  // never the same twice
  };
  auto one = cache(options);
  const auto a = request(9, 1);
  one.forward(a.inputs);
  one.forward(changed(a, 3, 55).inputs);
  EXPECT_EQ(calls, 2);
  const auto layer = one.stats().layers.at(0);
  EXPECT_EQ(layer.decision_changes, 1U);
  EXPECT_EQ(layer.dropped, 1U);
}

TEST_F(ThresholdAudit, TheShareOfCheckedHitsIsTheRate) {
  auto one = cache(audited(0.25));
  const auto a = request(5, 1);
  one.forward(a.inputs);
  constexpr int kCalls = 400;
  for (int i = 0; i < kCalls; ++i) one.forward(a.inputs);
  const auto stats = one.stats();
  EXPECT_EQ(stats.layers.at(0).audits + stats.similar_hits, static_cast<std::uint64_t>(kCalls));
  EXPECT_THAT(static_cast<double>(stats.layers.at(0).audits) / kCalls, AllOf(Ge(0.17), Le(0.33)));
}

// --- refused ------------------------------------------------------------------------------------------

TEST_F(Threshold, RequestOnACacheThatKeepsNoStates) {
  LayerCache<Module> one = cache_of("tiny-bert-sdpa");
  EXPECT_THAT([&] { one.forward(request(5, 1).inputs, {.fidelity = Fidelity::kThreshold}); },
              ThrowsError(ErrorCode::kInvalidOptions, "keeps no states"));
}

TEST_F(Threshold, OptionsThatAreWrong) {
  const auto expect = [&](const std::function<void(Options&)>& change, const std::string& part) {
    auto options = any_entry();
    change(options);
    EXPECT_THAT([&] { cache(options); }, ThrowsError(ErrorCode::kInvalidOptions, part)) << part;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  using O = Options&;
  expect([](O o) { o.threshold.tau = 1.5; }, "tau has the value 1.5");
  expect([](O o) { o.threshold.tau = -1.01; }, "tau has the value -1.01");
  expect([nan](O o) { o.threshold.tau = nan; }, "tau has the value nan");
  expect([nan](O o) { o.threshold.layer_taus = {0.9, nan, 0.9}; }, "layer_taus has the value nan");
  expect([](O o) { o.threshold.layer_taus = {0.9, 0.9}; }, "layer_taus has 2 values");
  expect([](O o) { o.threshold.cache_layers = {3}; }, "names layer 3; the model has the layers 0 to 2");
  expect([](O o) { o.threshold.cache_layers = {-1}; }, "names layer -1");
  expect([](O o) { o.threshold.cache_layers = {1, 1}; }, "ascending");
  expect([](O o) { o.threshold.fingerprint_layers = {3}; }, "fingerprint_layers names layer 3");
  expect(
      [](O o) {
        o.threshold.fingerprint_layers = {2};
        o.threshold.cache_layers = {1};
      },
      "before the first fingerprint");
  expect([](O o) { o.threshold.capacity_split = {1, 2}; }, "capacity_split has 2 values");
  expect([](O o) { o.threshold.capacity_split = {1, 2, 0}; }, "share 0");
  expect([nan](O o) { o.threshold.capacity_split = {1, 2, nan}; }, "share nan");
  expect([](O o) { o.threshold.capacity_share = 1.1; }, "capacity_share is 1.1");
  expect([](O o) { o.threshold.ttl_seconds = 0; }, "ttl_seconds is 0");
  expect([nan](O o) { o.threshold.ttl_seconds = nan; }, "ttl_seconds is nan");
  expect([](O o) { o.threshold.fingerprint.kind = FingerprintKind::kPca; }, "pca");
  expect([](O o) { o.threshold.fingerprint.centring = Centring::kFitted; }, "mean");
  expect(
      [](O o) {
        o.threshold.fingerprint.centring = Centring::kFitted;
        o.threshold.fingerprint.mean.assign(5, 0.5F);
      },
      "FingerprintOptions.mean has 5 values");
  expect(
      [](O o) {
        o.threshold.fingerprint.kind = FingerprintKind::kJaccard;
        o.threshold.fingerprint_layers = {1};
      },
      "jaccard");
  expect([](O o) { o.refresh.audit_rate = -0.1; }, "audit_rate is -0.1");
  expect([nan](O o) { o.refresh.audit_rate = nan; }, "audit_rate is nan");
  expect([](O o) { o.refresh.tolerance.cosine = 3; }, "tolerance.cosine is 3");
  expect([](O o) { o.refresh.raise = 2; }, "raise is 2");
  expect([](O o) { o.refresh.lower = -1; }, "lower is -1");
  expect([](O o) { o.refresh.clean_audits = 0; }, "clean_audits is 0");
}

}  // namespace
}  // namespace llmcache::test
