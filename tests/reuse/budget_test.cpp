// Fidelity::kBudget: calibration, early exits, the promise, its supervision, and profiles on disk.
#include <cmath>
#include <fstream>
#include <random>
#include <thread>

#include "budget_support.h"
#include "passages.h"
#include "refresh/exit_calibration.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

Options options_for(BudgetMetric metric, double epsilon) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {metric, epsilon, 0.1};
  options.budget.scores = classes;
  options.budget.audit_rate = 0;
  options.budget.exit_layers = {0, 1, 2};  // a tiny model's layers take no longer than looking for an answer
  return options;
}

/// Errors of served answers, each against the plain model.
double error_of(const at::Tensor& got, const at::Tensor& want, BudgetMetric metric, double typical) {
  if (metric == BudgetMetric::kDecision) {
    return classes(got).argmax(1).eq(classes(want).argmax(1)).all().item<bool>() ? 0 : 1;
  }
  return std::min(1.0, (got - want).norm().item<double>() / typical);
}

struct Served {
  double error = 0;  ///< mean
  std::int64_t exits = 0;
  std::int64_t sequences = 0;
};

Served serve(LayerCache<Module>& cache, Module& plain, Traffic& traffic, int batches, BudgetMetric metric,
             double typical) {
  Served served;
  for (int i = 0; i < batches; ++i) {
    const auto request = traffic.next();
    const auto got = cache.forward(request.inputs).toTensor();
    const auto want = run_plain(plain, request.inputs).toTensor();
    const auto report = cache.last_report();
    for (std::int64_t row = 0; row < request.rows(); ++row) {
      const auto& told = report.sequences[static_cast<std::size_t>(row)];
      const double error = error_of(got.narrow(0, row, 1), want.narrow(0, row, 1), metric, typical);
      ++served.sequences;
      served.error += error;
      if (told.source == Source::kEarlyExit) {
        ++served.exits;
        EXPECT_GE(told.resumed_layer, 0);
        EXPECT_EQ(told.layers.back().computed, 0);
        for (std::int64_t l = 0; l < cache.profile().layers; ++l) {
          EXPECT_EQ(told.layers[static_cast<std::size_t>(l)].computed > 0, l < told.resumed_layer);
        }
      } else {
        EXPECT_TRUE(at::allclose(got[row], want[row], 1e-4, 1e-4));
      }
    }
  }
  served.error /= static_cast<double>(served.sequences);
  return served;
}

class BudgetTest : public ::testing::Test {
 protected:
  BudgetTest() : plain_(load_model(kModel)) {}
  Module plain_;
};

TEST_F(BudgetTest, ReusesWithinTheBudgetOnFreshTraffic) {
  for (const auto metric : {BudgetMetric::kDecision, BudgetMetric::kRelativeError}) {
    for (const auto early_exit : {EarlyExit::kCachedNeighbour, EarlyExit::kCacheFree}) {
      SCOPED_TRACE(std::string(to_string(metric)) + " " + to_string(early_exit));
      const double epsilon = 0.1;
      auto options = options_for(metric, epsilon);
      options.budget.early_exit = early_exit;
      LayerCache<Module> cache = cache_of(kModel, options);
      const auto profile = cache.calibrate(Traffic(1).sample(500));
      ASSERT_TRUE(profile.reuses()) << profile.to_string();
      EXPECT_LE(profile.error_bound, epsilon);
      EXPECT_LE(profile.certified_error, profile.error_bound);
      EXPECT_GT(profile.fitted + profile.certified, 1500);
      Traffic traffic(2);
      const auto served = serve(cache, plain_, traffic, 250, metric, profile.typical_distance);
      // A share of errors of epsilon, and three standard errors of 1,000 draws.
      EXPECT_LE(served.error, epsilon + 3 * std::sqrt(epsilon * (1 - epsilon) / 1000)) << profile.to_string();
      EXPECT_GT(served.exits, 100) << profile.to_string();
      EXPECT_NEAR(static_cast<double>(served.exits) / 1000, profile.expected_share, 0.1);
      const auto stats = cache.stats();
      ASSERT_TRUE(stats.budget);
      EXPECT_EQ(stats.budget->early_exits, static_cast<std::uint64_t>(served.exits));
      EXPECT_LE(stats.bytes, options.capacity_bytes);
      EXPECT_EQ(stats.budget->bytes, profile.bytes);
      EXPECT_THAT(profile.to_string(), HasSubstr("certified: error"));
    }
  }
}

// As short as it can be: these two run on other devices too.
TEST_F(BudgetTest, ASmallSampleWillDoForALargeBudget) {
  const double epsilon = 0.3;
  auto options = options_for(BudgetMetric::kDecision, epsilon);
  options.budget.audit_rate = 0.2;
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto profile = cache.calibrate(Traffic(1).sample(100));
  ASSERT_TRUE(profile.exit) << profile.to_string();
  Traffic traffic(2);
  const auto served = serve(cache, plain_, traffic, 25, BudgetMetric::kDecision, 1);
  EXPECT_LE(served.error, epsilon + 3 * std::sqrt(epsilon * (1 - epsilon) / 100));
  EXPECT_GT(served.exits, 10);
  EXPECT_GT(cache.stats().budget->audits, 0U);
  EXPECT_THAT(cache.stats().fallbacks, ::testing::IsEmpty());
}

TEST_F(BudgetTest, TokenStatesInEightBitsOfASmallSample) {
  const auto info = model_info("tiny-bert-cls");
  Module plain = load_model(info.name);
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.5, 0.2};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0;
  options.budget.format = BankFormat::kInt8;
  LayerCache<Module> cache = cache_of(info.name, options);
  const auto profile = cache.calibrate(inputs_of(documents(info, 100, 100)));
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  double error = 0;
  int reused = 0;
  for (const Request& request : documents(info, 36, 9000)) {
    const auto got = leaves(cache.forward(request.inputs))[0];
    const auto want = leaves(run_plain(plain, request.inputs))[0];
    error += std::min(1.0, (got - want).norm(2, -1).mean().item<double>() / profile.typical_distance);
    reused += cache.last_report().sequences[0].source == Source::kPartial ? 1 : 0;
  }
  EXPECT_LE(error / 36, 0.5);
  EXPECT_GT(reused, 12);
  EXPECT_THAT(cache.stats().fallbacks, ::testing::IsEmpty());
}

TEST_F(BudgetTest, RowsOfABatchLeaveAsTheyWouldAlone) {
  LayerCache<Module> cache = cache_of(kModel, options_for(BudgetMetric::kDecision, 0.1));
  cache.calibrate(Traffic(1).sample(400));
  Traffic traffic(3);
  for (int i = 0; i < 20; ++i) {
    const auto request = traffic.next();
    const auto together = cache.forward(request.inputs).toTensor();
    const auto report = cache.last_report();
    for (std::size_t row = 0; row < request.spans.size(); ++row) {
      const auto one = request.alone(row);
      cache.clear();
      const auto alone = cache.forward(one.inputs).toTensor();
      EXPECT_EQ(cache.last_report().sequences[0].resumed_layer, report.sequences[row].resumed_layer);
      EXPECT_TRUE(at::allclose(alone[0], together[static_cast<std::int64_t>(row)], 1e-4, 1e-4));
    }
  }
}

TEST_F(BudgetTest, AnswersThatWereReusedAreNotKeptAsIdentical) {
  LayerCache<Module> cache = cache_of(kModel, options_for(BudgetMetric::kDecision, 0.2));
  cache.calibrate(Traffic(1).sample(400));
  Traffic traffic(4);
  int left = 0;
  for (int i = 0; i < 30; ++i) {
    const auto request = traffic.batch({7});
    cache.forward(request.inputs);
    const bool early = cache.last_report().sequences[0].source == Source::kEarlyExit;
    left += early ? 1 : 0;
    cache.forward(request.inputs);
    EXPECT_EQ(cache.last_report().sequences[0].source, early ? Source::kEarlyExit : Source::kIdentical);
    // Asked for without any error, it is computed.
    const auto exact = cache.forward(request.inputs, {.fidelity = Fidelity::kLossless}).toTensor();
    EXPECT_TRUE(at::allclose(exact, run_plain(plain_, request.inputs).toTensor(), 1e-4, 1e-4));
  }
  EXPECT_GT(left, 3);
}

TEST_F(BudgetTest, WithoutACalibrationItIsLosslessAndSaysSoOnce) {
  LayerCache<Module> cache = cache_of(kModel, options_for(BudgetMetric::kDecision, 0.1));
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  Traffic traffic(5);
  for (int i = 0; i < 5; ++i) {
    const auto request = traffic.next();
    EXPECT_TRUE(at::allclose(cache.forward(request.inputs).toTensor(), run_plain(plain_, request.inputs).toTensor(),
                             1e-4, 1e-4));
  }
  EXPECT_EQ(warnings.count, 1);
  EXPECT_FALSE(cache.calibration());
  EXPECT_FALSE(cache.stats().budget->calibrated);
}

TEST_F(BudgetTest, AnEpsilonThatNoSampleOfThisSizeProvesReusesNothing) {
  LayerCache<Module> cache = cache_of(kModel, options_for(BudgetMetric::kDecision, 1e-4));
  const auto profile = cache.calibrate(Traffic(1).sample(200));
  EXPECT_FALSE(profile.reuses());
  EXPECT_THAT(profile.to_string(), HasSubstr("nothing is reused beyond lossless"));
  const auto request = Traffic(6).next();
  EXPECT_TRUE(
      at::allclose(cache.forward(request.inputs).toTensor(), run_plain(plain_, request.inputs).toTensor(), 1e-4, 1e-4));
}

TEST_F(BudgetTest, SupervisionStopsReuseOfDriftedTraffic) {
  // Other topics, on which the regression was not fitted; the cached neighbours of other exits would mostly notice.
  const double epsilon = 0.05;
  auto options = options_for(BudgetMetric::kDecision, epsilon);
  options.budget.audit_rate = 0.1;
  options.budget.early_exit = EarlyExit::kCacheFree;
  LayerCache<Module> cache(load_model(kModel), options);  // weights_changed() wants a wrapped model of its own
  auto unwatched_options = options;
  unwatched_options.budget.audit_rate = 0;
  LayerCache<Module> unwatched = cache_of(kModel, unwatched_options);
  const auto profile = cache.calibrate(Traffic(1).sample(500));
  unwatched.use_calibration(profile);
  ASSERT_TRUE(profile.reuses());
  Traffic same(7);
  const auto before = serve(cache, plain_, same, 250, BudgetMetric::kDecision, 1);
  EXPECT_LE(before.error, epsilon);
  EXPECT_GT(cache.stats().budget->audits, 10U);
  EXPECT_EQ(cache.stats().budget->closings, 0U);
  Traffic drifted(8, 12, 7);
  Traffic drifted_too(8, 12, 7);
  const auto wild = serve(unwatched, plain_, drifted_too, 500, BudgetMetric::kDecision, 1);
  ASSERT_GT(wild.error, 1.5 * epsilon) << "this is no drift";
  const auto after = serve(cache, plain_, drifted, 500, BudgetMetric::kDecision, 1);
  EXPECT_LE(after.error, epsilon);
  EXPECT_GT(cache.stats().budget->closings, 0U);
  // What was counted stays counted, whatever is in force.
  const auto counted = *cache.stats().budget;
  const auto expect_no_less = [&] {
    const auto now = *cache.stats().budget;
    EXPECT_EQ(now.audits, counted.audits);
    EXPECT_EQ(now.audit_errors, counted.audit_errors);
    EXPECT_EQ(now.closings, counted.closings);
    EXPECT_EQ(now.reopenings, counted.reopenings);
  };
  cache.use_calibration(profile);
  expect_no_less();
  EXPECT_EQ(cache.stats().budget->threshold_index, 0U) << "a calibration comes into force as it was made";
  cache.use_calibration(profile);
  cache.weights_changed();
  expect_no_less();
  EXPECT_FALSE(cache.stats().budget->calibrated);
}

TEST_F(BudgetTest, BackgroundAuditsLeaveAnswersAsTheyAre) {
  auto options = options_for(BudgetMetric::kDecision, 0.1);
  options.budget.audit_rate = 0.5;
  options.budget.background_audit = true;
  LayerCache<Module> cache = cache_of(kModel, options);
  cache.calibrate(Traffic(1).sample(400));
  Traffic traffic(9);
  serve(cache, plain_, traffic, 50, BudgetMetric::kDecision, 1);
  for (int waited = 0; cache.stats().budget->audits_waiting > 0 && waited < 1000; ++waited) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const auto stats = *cache.stats().budget;
  EXPECT_GT(stats.audits, 10U);
  EXPECT_EQ(stats.audits_waiting, 0U);
  serve(cache, plain_, traffic, 20, BudgetMetric::kDecision, 1);  // some are waiting when it goes
}

TEST_F(BudgetTest, ProfilesAreReadBackAsTheyWere) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-budget-profile.json";
  for (const auto early_exit : {EarlyExit::kCachedNeighbour, EarlyExit::kCacheFree}) {
    auto options = options_for(BudgetMetric::kDecision, 0.1);
    options.budget.early_exit = early_exit;
    LayerCache<Module> first = cache_of(kModel, options);
    const auto made = first.calibrate(Traffic(1).sample(400));
    made.save(path);
    const auto read = CalibrationProfile::load(path);
    EXPECT_EQ(read.to_string(), made.to_string());
    LayerCache<Module> second = cache_of(kModel, options);
    second.use_calibration(read);
    Traffic traffic(10);
    for (int i = 0; i < 20; ++i) {
      const auto request = traffic.next();
      EXPECT_TRUE(same_bits(second.forward(request.inputs), first.forward(request.inputs)));
    }
    EXPECT_GT(first.stats().budget->early_exits, 0U);
  }
}

std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

TEST_F(BudgetTest, DamagedAndForeignProfilesAreRefused) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-budget-damaged.json";
  const std::filesystem::path tensors = path.string() + ".safetensors";
  const auto options = options_for(BudgetMetric::kDecision, 0.1);
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto profile = cache.calibrate(Traffic(1).sample(400));
  profile.save(path);
  const auto json = bytes_of(path);
  const auto data = bytes_of(tensors);
  const auto load = [&] { return CalibrationProfile::load(path); };

  EXPECT_THAT([] { CalibrationProfile::load("/nonexistent/profile.json"); },
              ThrowsError(ErrorCode::kInvalidFile, "cannot be read"));
  EXPECT_THAT([&] { profile.save("/nonexistent/profile.json"); },
              ThrowsError(ErrorCode::kInvalidFile, "cannot be written"));
  for (const std::size_t cut : {std::size_t{0}, json.size() / 2, json.size() - 4}) {
    write(path, json.substr(0, cut));
    EXPECT_THAT(load, ThrowsError(ErrorCode::kInvalidFile, "damaged"));
  }
  auto changed = json;
  changed.replace(changed.find("0.1"), 3, "0.4");
  write(path, changed);
  EXPECT_THAT(load, ThrowsError(ErrorCode::kInvalidFile, "changed"));
  write(path, "{\"format\": \"something else\"}");
  EXPECT_THAT(load, ThrowsError(ErrorCode::kInvalidFile, "no calibration profile"));
  write(path, json);
  for (const std::size_t at : {std::size_t{3}, std::size_t{40}, data.size() / 2, data.size() - 1}) {
    auto flipped = data;
    flipped[at] = static_cast<char>(flipped[at] ^ 1);
    write(tensors, flipped);
    EXPECT_THAT(load, ThrowsError(ErrorCode::kInvalidFile, "damaged"));
  }
  write(tensors, data.substr(0, data.size() / 2));
  EXPECT_THAT(load, ThrowsError(ErrorCode::kInvalidFile, "damaged"));
  write(tensors, data);

  const auto read = load();
  const auto refused = [&](const std::string& model, const Options& other, const std::string& why) {
    LayerCache<Module> foreign = cache_of(model, other);
    EXPECT_THAT([&] { foreign.use_calibration(read); }, ThrowsError(ErrorCode::kInvalidOptions, why));
    EXPECT_FALSE(foreign.calibration());
  };
  refused(kModel, options_for(BudgetMetric::kDecision, 0.05), "asks for");
  refused(kModel, options_for(BudgetMetric::kRelativeError, 0.1), "asks for");
  auto other = options;
  other.budget.scores = [](const at::Tensor& outputs) { return -classes(outputs); };
  refused(kModel, other, "decides otherwise");
  other = options;
  other.budget.early_exit = EarlyExit::kCacheFree;
  refused(kModel, other, "early exit");
  other = options;
  other.capacity_bytes = 20000;
  refused(kModel, other, "bytes");
  refused("tiny-bert-sdpa", options, "does not fit");
  LayerCache<Module> lossless = cache_of(kModel);
  EXPECT_THAT([&] { lossless.use_calibration(read); }, ThrowsError(ErrorCode::kInvalidOptions, "construct it with"));
}

TEST_F(BudgetTest, WhatCannotBeCalibratedIsRefusedAndTheOldProfileStays) {
  LayerCache<Module> cache = cache_of(kModel, options_for(BudgetMetric::kDecision, 0.1));
  const auto first = cache.calibrate(Traffic(1).sample(300));
  EXPECT_THAT([&] { cache.calibrate(std::vector<Inputs>{}); }, ThrowsError(ErrorCode::kInvalidInput, "no sequence"));
  EXPECT_THAT([&] { cache.calibrate(Traffic(1).sample(5)); }, ThrowsError(ErrorCode::kInvalidInput, "at least"));
  EXPECT_THAT([&] { cache.calibrate({{at::zeros({1, 3}, at::kFloat)}}); }, ThrowsError(ErrorCode::kInvalidInput));
  CalibrationSample foreign;
  foreign.model_digest = "another";
  EXPECT_THAT([&] { cache.calibrate(foreign); }, ThrowsError(ErrorCode::kInvalidOptions, "another"));
  EXPECT_EQ(cache.calibration()->to_string(), first.to_string());

  Options no_tokens{.fidelity = Fidelity::kBudget};
  no_tokens.budget.token_reuse = false;
  LayerCache<Module> tokens = cache_of("tiny-bert-sdpa", no_tokens);
  EXPECT_THAT([&] { tokens.calibrate(Traffic(1).sample(5)); }, ThrowsError(ErrorCode::kNotAvailable, "pooled"));
  auto narrow = options_for(BudgetMetric::kDecision, 0.1);
  narrow.budget.scores = [](const at::Tensor& outputs) { return outputs.narrow(1, 0, 1); };
  LayerCache<Module> one_class = cache_of(kModel, narrow);
  EXPECT_THAT([&] { one_class.calibrate(Traffic(1).sample(100)); },
              ThrowsError(ErrorCode::kInvalidOptions, "two scores"));
  narrow.budget.scores = [](const at::Tensor&) { return at::zeros({3}); };
  LayerCache<Module> shapeless = cache_of(kModel, narrow);
  EXPECT_THAT([&] { shapeless.calibrate(Traffic(1).sample(100)); },
              ThrowsError(ErrorCode::kInvalidOptions, "classes] is expected"));
  auto small = options_for(BudgetMetric::kDecision, 0.1);
  small.capacity_bytes = 4096;
  LayerCache<Module> cramped = cache_of(kModel, small);
  EXPECT_THAT([&] { cramped.calibrate(Traffic(1).sample(300)); }, ThrowsError(ErrorCode::kInvalidOptions, "capacity"));
}

TEST(BudgetBanks, StayWithinTheirCapacityWithWhatTheyAreSearchedBy) {
  // Wide enough for a search on principal axes.
  at::manual_seed(3);
  ExitSample sample;
  const auto topics = at::randn({20, 160});
  const auto inputs = topics.index_select(0, at::randint(20, {3000}, at::kLong)) + 0.2 * at::randn({3000, 160});
  sample.states = {inputs, inputs * 2};
  sample.outputs = at::mm(inputs, at::randn({160, 24}));
  sample.layer_times = {{0, 1}, {0, 1}};
  BudgetOptions options;
  options.budget.epsilon = 0.1;
  options.exit_layers = {0, 1};
  for (const std::size_t capacity : {1'400'000, 3'000'000, 20'000'000}) {
    CalibrationProfile profile;
    calibrate_exit(sample, options, capacity, profile);
    ASSERT_TRUE(profile.reuses()) << capacity;
    EXPECT_TRUE(profile.exit->layers[0].projected.defined());
    EXPECT_LE(profile.bytes, capacity);
    EXPECT_EQ(profile.bytes, profile.exit->bytes());
  }
}

TEST(BudgetOrder, WhatCameLastCertifies) {
  at::manual_seed(4);
  const auto inputs =
      at::randn({20, 16}).index_select(0, at::randint(20, {2000}, at::kLong)) + 0.1 * at::randn({2000, 16});
  const auto outputs = at::mm(inputs, at::randn({16, 8}));
  BudgetOptions options;
  options.budget.epsilon = 0.1;
  options.exit_layers = {0};
  const auto reuses = [&](std::int64_t changed_from) {
    ExitSample sample;
    sample.states = {inputs};
    sample.outputs = outputs.clone();
    sample.outputs.narrow(0, changed_from, 500).neg_();  // other answers than before to the same states
    sample.layer_times = {{0, 1}};
    CalibrationProfile profile;
    calibrate_exit(sample, options, 10'000'000, profile);
    return profile.reuses() ? profile.expected_share : 0.0;
  };
  EXPECT_GT(reuses(0), 0.5);     // long ago, a quarter of what is fitted on
  EXPECT_LT(reuses(1500), 0.2);  // now
}

TEST_F(BudgetTest, BanksKeepAsMuchAsThereIsRoomFor) {
  auto options = options_for(BudgetMetric::kDecision, 0.2);
  options.capacity_bytes = 300000;
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto profile = cache.calibrate(Traffic(1).sample(500));
  ASSERT_TRUE(profile.reuses());
  EXPECT_LT(profile.fitted, 900);
  Traffic traffic(11);
  serve(cache, plain_, traffic, 30, BudgetMetric::kDecision, 1);
  EXPECT_LE(cache.stats().peak_bytes, options.capacity_bytes);
  EXPECT_GT(cache.stats().budget->early_exits, 0U);
}

TEST_F(BudgetTest, TokenStatesAreReusedInEveryFormatWhereThatIsCheaper) {
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
    SCOPED_TRACE(to_string(format));
    for (const char* name : {"tiny-bert-sdpa", "tiny-bert-cls", "tiny-distilbert-eager"}) {
      SCOPED_TRACE(name);
      const auto info = model_info(name);
      Module plain = load_model(name);
      Options options{.fidelity = Fidelity::kBudget};
      options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
      options.budget.early_exit = EarlyExit::kOff;
      options.budget.audit_rate = 0;
      options.budget.format = format;
      LayerCache<Module> cache = cache_of(name, options);
      std::vector<Inputs> sample;
      for (const Request& request : documents(info, 300, 100)) sample.push_back(request.inputs);
      const auto profile = cache.calibrate(sample);
      ASSERT_TRUE(profile.reuse) << profile.to_string();
      EXPECT_LE(profile.error_bound, 0.3);
      double error = 0;
      int reused = 0;
      const auto served = documents(info, 120, 9000);
      for (const Request& request : served) {
        const auto got = leaves(cache.forward(request.inputs))[0];
        const auto want = leaves(run_plain(plain, request.inputs))[0];
        error += std::min(1.0, (got - want).norm(2, -1).mean().item<double>() / profile.typical_distance);
        reused += cache.last_report().sequences[0].source == Source::kPartial ? 1 : 0;
      }
      EXPECT_LE(error / 120, 0.3);
      EXPECT_GT(reused, 60);
      EXPECT_EQ(cache.stats().budget->token_reuses, static_cast<std::uint64_t>(reused));
      EXPECT_LE(cache.stats().peak_bytes, options.capacity_bytes);
      // Another tenant has nothing in common with anybody.
      cache.forward(served[5].inputs, {.tenant = "another"});
      EXPECT_EQ(cache.last_report().sequences[0].source, Source::kComputed);
      const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-budget-tokens.json";
      profile.save(path);
      cache.use_calibration(CalibrationProfile::load(path));
      EXPECT_EQ(cache.calibration()->to_string(), profile.to_string());
      auto other = options;
      other.budget.format = format == BankFormat::kInt8 ? BankFormat::kFloat16 : BankFormat::kInt8;
      LayerCache<Module> foreign = cache_of(name, other);
      EXPECT_THAT([&] { foreign.use_calibration(profile); }, ThrowsError(ErrorCode::kInvalidOptions, "format"));
    }
  }
}

TEST_F(BudgetTest, SegmentsOfPromptsAreReusedWithinTheBudget) {
  const auto info = model_info("tiny-llama-sdpa");
  LayerCache<Module> cache = cache_of(info.name, passage_budget(0.2));
  Module plain = load_model(info.name);
  PassagePrompts prompt(info);
  const auto profile = cache.calibrate(prompt.sample());
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  int wrong = 0;
  int reused = 0;
  for (int i = 0; i < 60; ++i) {
    const auto inputs = prompt();
    const auto got = leaves(cache.forward(inputs, {.output = Output::kLastToken}))[0];
    const auto want = leaves(run_plain(plain, inputs))[0];
    wrong += got[0][0].argmax().equal(want[0][want.size(1) - 1].argmax()) ? 0 : 1;
    const auto told = cache.last_report().sequences[0];
    reused += told.source == Source::kPartial ? 1 : 0;
    if (told.audited) {
      EXPECT_TRUE(at::allclose(got[0][0], want[0][want.size(1) - 1], 1e-3, 1e-3));
    }
    // Tokens that are new are those behind an exact prefix: no approximation.
    const auto exact = leaves(cache.forward(inputs, {.output = Output::kNewTokens}))[0];
    EXPECT_TRUE(at::allclose(exact[0][exact.size(1) - 1], want[0][want.size(1) - 1], 1e-3, 1e-3));
  }
  EXPECT_GT(reused, 20);
  EXPECT_LE(wrong, 0.4 * 60 + 3 * std::sqrt(60 * 0.4 * 0.6));
  EXPECT_GT(cache.stats().budget->segment_reuses, 0U);
  EXPECT_GT(cache.stats().budget->audits, 0U);
}

TEST_F(BudgetTest, TokenStatesAreAuditedInTheBackground) {
  const auto info = model_info("tiny-bert-pooled");
  Module plain = load_model(info.name);
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0.5;
  options.budget.background_audit = true;
  LayerCache<Module> cache = cache_of(info.name, options);
  std::vector<Inputs> sample;
  for (const Request& request : documents(info, 300, 100)) sample.push_back(request.inputs);
  ASSERT_TRUE(cache.calibrate(sample).reuse);
  std::uint64_t reused = 0;
  for (const Request& request : documents(info, 60, 9000)) {
    const auto got = leaves(cache.forward(request.inputs))[0].clone();
    const auto told = cache.last_report().sequences[0];
    EXPECT_FALSE(told.audited);
    reused += told.source == Source::kPartial ? 1 : 0;
    if (told.source != Source::kPartial) {
      EXPECT_TRUE(at::allclose(got, leaves(run_plain(plain, request.inputs))[0], 1e-3, 1e-3));
    }
  }
  for (int waited = 0; cache.stats().budget->audits_waiting > 0 && waited < 1000; ++waited) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const auto stats = *cache.stats().budget;
  EXPECT_EQ(stats.token_reuses, reused);
  EXPECT_GT(reused, 20U);
  EXPECT_GT(stats.audits, 5U);
  EXPECT_EQ(stats.audits_waiting, 0U);
}

TEST_F(BudgetTest, OptionsOutOfRangeAreNamed) {
  const auto refused = [](auto change, const std::string& field) {
    Options options;
    change(options.budget);
    EXPECT_THAT([&] { options.validate(); }, ThrowsError(ErrorCode::kInvalidOptions, field));
  };
  refused([](BudgetOptions& b) { b.budget.epsilon = 0; }, "Budget.epsilon");
  refused([](BudgetOptions& b) { b.budget.epsilon = std::nan(""); }, "Budget.epsilon");
  refused([](BudgetOptions& b) { b.budget.delta = 1; }, "Budget.delta");
  refused([](BudgetOptions& b) { b.budget.metric = static_cast<BudgetMetric>(9); }, "Budget.metric");
  refused([](BudgetOptions& b) { b.early_exit = static_cast<EarlyExit>(9); }, "BudgetOptions.early_exit");
  refused([](BudgetOptions& b) { b.capacity_share = 1.5; }, "BudgetOptions.capacity_share");
  refused([](BudgetOptions& b) { b.audit_rate = -0.1; }, "BudgetOptions.audit_rate");
  refused([](BudgetOptions& b) { b.exit_layers = {1, 0}; }, "BudgetOptions.exit_layers");
  refused([](BudgetOptions& b) { b.exit_layers = {-1}; }, "BudgetOptions.exit_layers");
  refused([](BudgetOptions& b) { b.format = static_cast<BankFormat>(9); }, "BudgetOptions.format");
  Options deep{.fidelity = Fidelity::kBudget};
  deep.budget.exit_layers = {3};
  EXPECT_THAT([&] { LayerCache<Module> cache = cache_of(kModel, deep); },
              ThrowsError(ErrorCode::kInvalidOptions, "exit_layers"));
  for (const char* name : {"decision", "relative", "token"}) {
    EXPECT_STREQ(to_string(budget_metric_from_string(name)), name);
  }
  for (const char* name : {"off", "neighbour", "cache-free"}) {
    EXPECT_STREQ(to_string(early_exit_from_string(name)), name);
  }
  EXPECT_THAT([] { budget_metric_from_string("speed"); }, ThrowsError(ErrorCode::kInvalidOptions, "speed"));
  EXPECT_THAT([] { early_exit_from_string("late"); }, ThrowsError(ErrorCode::kInvalidOptions, "late"));
}

}  // namespace
}  // namespace llmcache::test
