// Approximate reuse where the head reads one token a row, found by comparing ids: classifiers made of decoders.
#include <cmath>
#include <random>

#include "budget_support.h"
#include "passages.h"

namespace llmcache::test {
namespace {

using ::testing::IsEmpty;

constexpr double kClose = 1e-4;

std::vector<std::string> classifiers() { return model_names({"classify-"}); }

/// The id that a model takes for padding.
std::int64_t padding_of(const std::string& name) { return name.starts_with("classify-qwen2") ? 2 : 0; }

/// The same with the id of padding at padding.
Request padded(Request request, std::int64_t id) {
  request.inputs[0] = request.ids().masked_fill(request.mask().eq(0), id);
  return request;
}

/// What a budget was kept by.
struct Kept {
  double error = 0;  ///< mean of all rows
  std::int64_t rows = 0, exits = 0, partial = 0;
};

class ChoosingHeads : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] const ModelInfo& info() const { return subject(GetParam()).info; }
  [[nodiscard]] std::int64_t padding() const { return padding_of(GetParam()); }
  [[nodiscard]] at::Tensor plain(const Request& request) const {
    return leaves(run_plain(subject(GetParam()).plain, request.inputs))[0];
  }

  /// Rows that were computed must be right, the others near enough in the mean.
  void serve(LayerCache<Module>& cache, const Request& request, double typical, Kept& kept) const {
    const auto got = leaves(cache.forward(request.inputs))[0];
    const auto want = plain(request);
    const auto report = cache.last_report();
    for (std::int64_t row = 0; row < request.rows(); ++row) {
      const Source source = report.sequences[static_cast<std::size_t>(row)].source;
      kept.exits += source == Source::kEarlyExit;
      kept.partial += source == Source::kPartial;
      const double error = (got[row] - want[row]).norm().item<double>() / typical;
      if (source == Source::kComputed || source == Source::kPrefix) {
        EXPECT_LT(error, kClose) << report.to_string();
      }
      kept.error += std::min(1.0, error);
      ++kept.rows;
    }
  }

  static void expect_within(const Kept& kept, double epsilon) {
    const auto rows = static_cast<double>(kept.rows);
    EXPECT_LE(kept.error / rows, epsilon + 3 * std::sqrt(epsilon * (1 - epsilon) / rows));
  }
};

TEST_P(ChoosingHeads, LeaveEarlyWithinTheBudget) {
  Options options{.fidelity = Fidelity::kBudget};
  const double epsilon = 0.3;
  options.budget.budget = {BudgetMetric::kRelativeError, epsilon, 0.1};
  options.budget.audit_rate = 0;
  options.budget.segment_reuse = false;
  options.budget.exit_layers = {0, 1};  // a tiny model's layers take no longer than looking for an answer
  LayerCache<Module> cache(load_model(GetParam()), options);
  // Texts of the traffic hold ids of padding, and end in them.
  const auto next = [&](Traffic& traffic) { return padded(traffic.next(), padding()); };
  Traffic for_sample(1);
  std::vector<Inputs> sample;
  for (int i = 0; i < 150; ++i) sample.push_back(next(for_sample).inputs);
  const auto profile = cache.calibrate(sample);
  ASSERT_TRUE(profile.exit) << profile.to_string();
  Traffic traffic(2);
  Kept kept;
  for (int i = 0; i < 60; ++i) serve(cache, next(traffic), profile.typical_distance, kept);
  expect_within(kept, epsilon);
  EXPECT_GT(kept.exits, 10) << profile.to_string();
  EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
}

TEST_P(ChoosingHeads, ReusePassagesWithinTheBudget) {
  Options options = passage_budget();
  options.budget.budget = {BudgetMetric::kRelativeError, 0.4, 0.2};
  options.budget.early_exit = EarlyExit::kOff;
  LayerCache<Module> cache(load_model(GetParam()), options);
  PassagePrompts prompts(info());
  const auto profile = cache.calibrate(prompts.sample(150));
  Kept kept;
  std::mt19937 random(3);
  for (int i = 0; i < 40; ++i) {
    auto inputs = prompts();
    // In every other one the head reads within a passage: padding stands behind that.
    if (i % 2 == 1)
      inputs[0].toTensor()[0].narrow(0, 100 - static_cast<std::int64_t>(random() % 40), 1).fill_(padding());
    if (i % 4 == 3) inputs[0].toTensor()[0].narrow(0, 110, 24).fill_(padding());
    const Request request{inputs, {{0, 134}}, 134};
    serve(cache, request, std::max(profile.typical_distance, 1e-3), kept);
  }
  expect_within(kept, 0.4);
  // Passages of Llama can be moved.
  if (GetParam() == "classify-llama") {
    EXPECT_TRUE(profile.reuse) << profile.to_string();
  }
  EXPECT_EQ(kept.partial > 0, profile.reuses()) << profile.to_string();
  if (!profile.reuses()) {
    EXPECT_NE(profile.reason, "");
  }
  EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
}

TEST_P(ChoosingHeads, WhatIsReadAtPaddingIsComputedInFull) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.exit_layers = {0, 1};
  options.budget.segment_reuse = false;
  LayerCache<Module> cache(load_model(GetParam()), options);
  Traffic for_sample(1);
  std::vector<Inputs> sample;
  for (int i = 0; i < 150; ++i) sample.push_back(padded(for_sample.next(), padding()).inputs);
  (void)cache.calibrate(sample);
  // Padding that the model takes for text.
  Traffic traffic(2);
  for (int i = 0; i < 5; ++i) {
    const auto request = padded(traffic.batch({4, 9, 12}), 7);
    EXPECT_TRUE(at::allclose(leaves(cache.forward(request.inputs))[0], plain(request), kClose, kClose));
    for (const auto& sequence : cache.last_report().sequences) EXPECT_EQ(sequence.source, Source::kComputed);
    EXPECT_EQ(cache.last_report().execution, Execution::kDense);
  }
}

/// Fidelity::kThreshold, by the cosine of raw states.
Options similar(double tau, std::vector<std::int64_t> layers = {0}) {
  Options options{.fidelity = Fidelity::kThreshold};
  options.threshold.tau = tau;
  options.threshold.fingerprint = {.kind = FingerprintKind::kRaw, .centring = Centring::kOff};
  options.threshold.cache_layers = std::move(layers);
  return options;
}

TEST_P(ChoosingHeads, AnEntryTakesThePlaceOfARequestAtEveryLayer) {
  auto filled = right_padded(info(), {9}, 1);
  filled.ids()[0].narrow(0, 7, 2).fill_(padding());  // it is read in front of these
  const auto want = plain(filled);
  for (std::int64_t layer = 0; layer < subject(GetParam()).cache.profile().layers; ++layer) {
    SCOPED_TRACE(layer);
    LayerCache<Module> cache(load_model(GetParam()), similar(-1, {layer}));
    EXPECT_TRUE(at::allclose(leaves(cache.forward(filled.inputs))[0], want, kClose, kClose));
    for (const std::int64_t tokens : {9, 5, 14}) {
      const auto asked = right_padded(info(), {tokens}, static_cast<std::uint64_t>(20 + tokens));
      EXPECT_TRUE(at::allclose(leaves(cache.forward(asked.inputs))[0], want, kClose, kClose));
      EXPECT_EQ(cache.last_report().sequences[0].source, Source::kSimilar);
    }
    EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
  }
}

TEST_P(ChoosingHeads, EntriesOfUnlikeLengthsServeOneBatch) {
  LayerCache<Module> cache(load_model(GetParam()), similar(0.9999));
  auto request = padded(right_padded(info(), {9, 4, 12, 4}, 1), padding());
  request.ids()[2].narrow(0, 10, 2).fill_(padding());
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(at::allclose(leaves(cache.forward(request.inputs))[0], plain(request), kClose, kClose));
  }
  EXPECT_EQ(cache.stats().similar_hits, 4U);
  EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(All, ChoosingHeads, ::testing::ValuesIn(classifiers()), test_name);

/// An encoder that reads its last token that is not 0.
TEST(ChoosingEncoder, ReusesTokensWithinTheBudget) {
  Script script;
  script.forward = Script::with(script.forward, "    return torch.tanh(x)",
                                "    at = torch.argmax((input_ids != 0).to(input_ids.dtype) * "
                                "torch.arange(input_ids.size(1)), 1)\n"
                                "    x = torch.tanh(x)\n"
                                "    return x[torch.arange(input_ids.size(0)), at]");
  Module plain = make_module(script);
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.5, 0.2};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0;
  LayerCache<Module> cache(make_module(script), options);
  ASSERT_TRUE(cache.profile().head_chooses && !cache.profile().causal) << cache.profile().to_string();
  const auto info = script_info(script);
  // Some of the texts end in ids that the head passes over.
  const auto texts = [&](int requests, std::uint64_t seed) {
    auto all = documents(info, requests, seed);
    for (std::size_t i = 0; i < all.size(); i += 3) all[i].ids()[0].narrow(0, 36, 4).fill_(0);
    return all;
  };
  const auto profile = cache.calibrate(inputs_of(texts(120, 100)));
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  double error = 0;
  int reused = 0;
  for (const Request& request : texts(36, 9000)) {
    const auto got = leaves(cache.forward(request.inputs))[0];
    const auto want = leaves(run_plain(plain, request.inputs))[0];
    error += std::min(1.0, (got - want).norm().item<double>() / profile.typical_distance);
    reused += cache.last_report().sequences[0].source == Source::kPartial ? 1 : 0;
  }
  EXPECT_LE(error / 36, 0.5);
  EXPECT_GT(reused, 6);
  EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
}

}  // namespace
}  // namespace llmcache::test
