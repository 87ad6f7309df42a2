// Several mechanisms under one budget: short queries that leave early and edited documents whose states are reused, in
// one stream.
#include <cmath>
#include <filesystem>
#include <functional>

#include "budget_support.h"

namespace llmcache::test {
namespace {

constexpr std::int64_t kLong = 120;

/// Documents of 120 tokens, each of which differs from an earlier one in `edits` tokens, now and then a new one; in
/// front of each three batches of four short queries.
std::vector<Request> mixed(int documents, std::uint64_t seed, int edits = 1) {
  Traffic traffic(seed);
  const auto info = model_info(kModel);
  std::vector<Request> all;
  auto current = right_padded(info, {kLong}, 1000 * seed);
  for (int i = 0; i < documents; ++i) {
    for (int k = 0; k < 3; ++k) all.push_back(traffic.next());
    if (i % 12 == 0) current = right_padded(info, {kLong}, 1000 * seed + static_cast<std::uint64_t>(i));
    Request next = current;
    next.inputs = copy_of(current.inputs);
    for (int k = 0; k < edits; ++k) next.ids()[0][5 + (i + 2 * k) % 100] = 10 + (i * 7 + k) % 200;
    all.push_back(next);
  }
  return all;
}

Options budget_options(double epsilon) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, epsilon, 0.1};
  options.budget.scores = classes;
  options.budget.exit_layers = {0, 1, 2};  // by themselves they are chosen by time, which varies
  return options;
}

struct MixedServed {
  std::int64_t sequences = 0, left = 0, partial = 0, wrong = 0;
  std::int64_t computed = 0;  ///< token-layers
};

/// Serves requests and compares what was reused with the plain module. `both`: short sequences leave early, long ones
/// reuse states.
MixedServed serve_mixed(LayerCacheBase& cache, Module& plain, const std::vector<Request>& requests, bool both = true) {
  MixedServed served;
  for (const Request& request : requests) {
    const auto got = leaves(cache.forward(request.inputs))[0];
    const auto want = leaves(run_plain(plain, request.inputs))[0];
    const auto decided = classes(got).argmax(1);
    const auto right = classes(want).argmax(1);
    const auto report = cache.last_report();
    for (std::size_t row = 0; row < report.sequences.size(); ++row) {
      const auto& sequence = report.sequences[row];
      const auto i = static_cast<std::int64_t>(row);
      ++served.sequences;
      served.left += sequence.source == Source::kEarlyExit ? 1 : 0;
      served.partial += sequence.source == Source::kPartial ? 1 : 0;
      served.wrong += decided[i].equal(right[i]) ? 0 : 1;
      for (const LayerTokens& layer : sequence.layers) served.computed += layer.computed;
      if (both) {
        EXPECT_NE(sequence.source, sequence.tokens < kLong ? Source::kPartial : Source::kEarlyExit);
      }
      if (sequence.source == Source::kComputed) {
        EXPECT_TRUE(at::allclose(got[i], want[i], 1e-3, 1e-3)) << "row " << row;
      }
    }
  }
  return served;
}

TEST(BudgetOfTwo, ServesEachSequenceByTheMechanismThatIsItsOwn) {
  const double epsilon = 0.15;
  LayerCache<Module> cache = cache_of(kModel, budget_options(epsilon));
  Module plain = load_model(kModel);
  const auto profile = cache.calibrate(inputs_of(mixed(250, 1)));
  ASSERT_TRUE(profile.exit) << profile.to_string();
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  // The budget is spent once.
  EXPECT_DOUBLE_EQ(profile.exit_epsilon() + profile.reuse->epsilon, epsilon);
  EXPECT_LE(profile.error_bound, epsilon);
  EXPECT_GE(profile.reuse->least_tokens, 12);
  EXPECT_LE(profile.reuse->least_tokens, kLong);

  const auto served = serve_mixed(cache, plain, mixed(80, 2));
  EXPECT_GT(served.left, 50) << profile.to_string();
  EXPECT_GT(served.partial, 30) << profile.to_string();
  const auto sequences = static_cast<double>(served.sequences);
  EXPECT_LE(static_cast<double>(served.wrong), epsilon * sequences + 3 * std::sqrt(epsilon * sequences));
  const auto stats = *cache.stats().budget;
  EXPECT_EQ(stats.early_exits, static_cast<std::uint64_t>(served.left));
  EXPECT_EQ(stats.token_reuses, static_cast<std::uint64_t>(served.partial));
  EXPECT_LT(stats.threshold_index, stats.thresholds) << "something is open";
  EXPECT_LE(cache.stats().peak_bytes, cache.options().capacity_bytes);

  // It computes less than each mechanism would with the whole budget.
  for (const bool exits : {true, false}) {
    auto alone = budget_options(epsilon);
    alone.budget.token_reuse = !exits;
    if (!exits) alone.budget.early_exit = EarlyExit::kOff;
    LayerCache<Module> one = cache_of(kModel, alone);
    one.calibrate(inputs_of(mixed(250, 1)));
    EXPECT_LT(served.computed, serve_mixed(one, plain, mixed(80, 2), false).computed)
        << (exits ? "early exit" : "token reuse");
  }
}

TEST(BudgetOfTwo, AProfileHasBoth) {
  LayerCache<Module> cache = cache_of(kModel, budget_options(0.15));
  const auto profile = cache.calibrate(inputs_of(mixed(250, 1)));
  ASSERT_TRUE(profile.exit && profile.reuse) << profile.to_string();
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-budget-of-two.json";
  profile.save(path);
  const auto loaded = CalibrationProfile::load(path);
  EXPECT_EQ(loaded.to_string(), profile.to_string());
  EXPECT_EQ(loaded.exit_epsilon(), profile.exit_epsilon());
  LayerCache<Module> other = cache_of(kModel, budget_options(0.15));
  Module plain = load_model(kModel);
  other.use_calibration(loaded);
  const auto served = serve_mixed(other, plain, mixed(50, 3));
  EXPECT_GT(served.left, 0);
  EXPECT_GT(served.partial, 0);
}

/// Traffic of one kind has nothing to share: the mechanism that serves it has all of the budget.
TEST(BudgetOfTwo, LeavesTheWholeBudgetToTheOneThatPays) {
  LayerCache<Module> cache = cache_of(kModel, budget_options(0.15));
  const auto queries = cache.calibrate(Traffic(1).sample(400));
  ASSERT_TRUE(queries.exit) << queries.to_string();
  EXPECT_FALSE(queries.reuse);
  EXPECT_EQ(queries.exit_epsilon(), 0.15);
}

/// A mechanism that is left alone serves what it was certified for. The other sequences are nobody's: they run in full.
TEST(BudgetOfTwo, EachServesOnlyWhatItWasCertifiedFor) {
  LayerCache<Module> cache = cache_of(kModel, budget_options(0.15));
  const auto both = cache.calibrate(inputs_of(mixed(250, 1)));
  ASSERT_TRUE(both.exit && both.reuse) << both.to_string();
  EXPECT_EQ(both.exit_below, both.reuse->least_tokens);
  Module plain = load_model(kModel);
  for (const bool exits : {true, false}) {
    SCOPED_TRACE(exits ? "early exit" : "token reuse");
    auto one = both;
    if (exits) one.reuse.reset();
    if (!exits) one.exit = nullptr;
    const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-budget-of-one.json";
    one.save(path);
    cache.use_calibration(CalibrationProfile::load(path));
    cache.clear();
    const auto served = serve_mixed(cache, plain, mixed(50, exits ? 4 : 5));
    EXPECT_EQ(served.left > 0, exits);
    EXPECT_EQ(served.partial > 0, !exits);
    // Both kinds in one batch: rows of one mechanism beside rows that run in full.
    auto request = right_padded(model_info(kModel), {8, kLong, 6, kLong}, exits ? 77 : 78);
    const auto want = leaves(run_plain(plain, request.inputs))[0];
    const auto got = leaves(cache.forward(request.inputs))[0];
    const auto report = cache.last_report();
    for (const std::size_t row : exits ? std::vector<std::size_t>{1, 3} : std::vector<std::size_t>{0, 2}) {
      EXPECT_EQ(report.sequences[row].source, Source::kComputed);
      const auto i = static_cast<std::int64_t>(row);
      EXPECT_TRUE(at::allclose(got[i], want[i], 1e-3, 1e-3)) << "row " << row;
    }
  }
}

/// What supervises a mechanism compares its error with its part of the budget over all sequences, as it was certified.
TEST(BudgetOfTwo, SupervisionCountsTheSequencesOfTheOtherMechanism) {
  auto options = budget_options(0.15);
  options.budget.audit_rate = 1;
  LayerCache<Module> cache = cache_of(kModel, options);
  auto profile = cache.calibrate(inputs_of(mixed(250, 1)));
  ASSERT_TRUE(profile.exit && profile.reuse) << profile.to_string();
  profile.reuse->setting = "0 samples, 0 full layers";
  profile.reuse->match_threshold = 1;
  cache.use_calibration(profile);
  double documents = 0, errors = 0, sequences = 0;
  for (const Request& request : mixed(100, 6, 30)) {
    cache.forward(request.inputs);
    for (const auto& sequence : cache.last_report().sequences) {
      ++sequences;
      if (sequence.tokens < kLong || !sequence.audited) continue;
      ++documents;
      errors += sequence.error;
    }
  }
  ASSERT_GT(errors, 2 * profile.reuse->epsilon * documents) << "of its own sequences alone it would be far too much";
  ASSERT_LT(errors, profile.reuse->epsilon * sequences);
  EXPECT_EQ(cache.stats().budget->closings, 0U);
}

TEST(BudgetOfTwo, ProfilesThatShareNothingOutAreRefused) {
  LayerCache<Module> cache = cache_of(kModel, budget_options(0.15));
  const auto good = cache.calibrate(inputs_of(mixed(250, 1)));
  ASSERT_TRUE(good.exit && good.reuse) << good.to_string();
  const auto refused = [&](const char* part, const std::function<void(CalibrationProfile&)>& spoil) {
    auto bad = good;
    spoil(bad);
    EXPECT_THAT([&] { cache.use_calibration(bad); }, ThrowsError(ErrorCode::kInvalidOptions, part));
    EXPECT_EQ(cache.calibration()->to_string(), good.to_string()) << "what was in force stays";
  };
  refused("same number", [](auto& p) { p.exit_below = 0; });
  refused("same number", [](auto& p) { p.reuse->least_tokens = 0; });
  refused("same number", [](auto& p) { ++p.exit_below; });
  refused("exit_below", [](auto& p) { p.exit_below = -1; });
  refused("reuse.epsilon", [](auto& p) { p.reuse->epsilon = 0; });
  refused("reuse.epsilon", [](auto& p) { p.reuse->epsilon = p.budget.epsilon; });
  refused("reuse.epsilon", [](auto& p) { p.reuse->epsilon = std::nan(""); });
}

}  // namespace
}  // namespace llmcache::test
