// LayerCache::calibrate() beside serving: it shares nothing, holds no more than it says, and fails with the right
// error.
#include <atomic>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <thread>

#include "budget_support.h"
#include "passages.h"
#include "refresh/exit_model.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

constexpr const char* kEncoder = "tiny-bert-sdpa";

std::vector<Inputs> sample_of(std::uint64_t seed, int requests = 300) {
  return inputs_of(documents(model_info(kEncoder), requests, seed));
}

/// All that a profile says, as it is saved.
/// What the file of a profile says, but for the sizes that answers were compared at: these are all of the cache's.
std::string saved(CalibrationProfile profile, const std::string& name) {
  profile.verified = {};
  const auto path = std::filesystem::path(::testing::TempDir()) / ("llmcache-calibration-" + name + ".json");
  profile.save(path);
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Runs `beside` again and again in a thread, at least once, while `work` runs.
void while_running(const std::function<void()>& beside, const std::function<void()>& work) {
  std::atomic<bool> done{false};
  std::thread other([&] {
    try {
      do {
        beside();
      } while (!done);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
  });
  work();
  done = true;
  other.join();
}

TEST(CalibrationIsPrivate, NoLiveRequestIsAnsweredFromTheSample) {
  LayerCache<Module> cache = cache_of(kEncoder, token_options());
  Module plain = load_model(kEncoder);
  const auto first = cache.calibrate(sample_of(100));
  ASSERT_TRUE(first.reuse) << first.to_string();
  const auto sample = documents(model_info(kEncoder), 300, 50000);
  std::atomic<bool> running{true};
  std::thread calibrating([&] {
    cache.calibrate(inputs_of(sample));
    running = false;
  });
  // One request of each document, which is in no other live one, with an edit that the sample has too.
  int served = 0;
  for (std::size_t i = 6; i < 200; i += 12) {
    Request request = sample[i];
    request.inputs = copy_of(request.inputs);
    request.ids()[0][38] = 11;
    const auto got = leaves(cache.forward(request.inputs))[0];
    if (!running) break;
    ++served;
    const auto told = cache.last_report().sequences[0];
    EXPECT_EQ(told.source, Source::kComputed) << "request " << i;
    EXPECT_TRUE(at::allclose(got, leaves(run_plain(plain, request.inputs))[0], 1e-4, 1e-4)) << "request " << i;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  calibrating.join();
  EXPECT_GT(served, 8) << "the calibration was over before anything was served";
  EXPECT_EQ(cache.stats().budget->token_reuses, 0U);
  // Nor is one afterwards: the sample's states are not kept.
  Request request = sample[250];
  request.inputs = copy_of(request.inputs);
  request.ids()[0][37] = 12;
  cache.forward(request.inputs);
  EXPECT_EQ(cache.last_report().sequences[0].source, Source::kComputed);
}

TEST(CalibrationIsPrivate, ClearAndLiveTrafficLeaveTheCertificateAsItIs) {
  const auto sample = sample_of(100);
  const auto alone = [&] {
    LayerCache<Module> cache = cache_of(kEncoder, token_options());
    const auto profile = cache.calibrate(sample);
    EXPECT_TRUE(profile.reuse) << profile.to_string();
    return saved(profile, "alone");
  }();
  {
    LayerCache<Module> cache = cache_of(kEncoder, token_options());
    while_running(
        [&] {
          cache.clear();
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        },
        [&] { EXPECT_EQ(saved(cache.calibrate(sample), "cleared"), alone); });
  }
  {
    // Reuse is in force, so that live requests are kept: of the same documents.
    LayerCache<Module> cache = cache_of(kEncoder, token_options());
    cache.calibrate(sample);
    std::size_t next = 0;
    while_running([&] { cache.forward(sample[(next += 7) % sample.size()]); },
                  [&] { EXPECT_EQ(saved(cache.calibrate(sample), "served"), alone); });
    EXPECT_GT(next, 7U * 20);
  }
}

TEST(CalibrationIsPrivate, LiveTrafficMakesNoCertificateOutOfNothing) {
  LayerCache<Module> cache = cache_of(kEncoder, token_options());
  ASSERT_TRUE(cache.calibrate(sample_of(100)).reuse);
  // Requests that have nothing in common with each other; live traffic knows each of them, but for a token.
  const auto info = model_info(kEncoder);
  std::vector<Inputs> sample;
  std::vector<Inputs> live;
  for (std::uint64_t i = 0; i < 150; ++i) {
    const auto request = right_padded(info, {40}, 7000 + i);
    sample.push_back(request.inputs);
    live.push_back(copy_of(request.inputs));
    live.back()[0].toTensor()[0][20] = 11;
  }
  std::size_t next = 0;
  while_running([&] { cache.forward(live[next++ % live.size()]); },
                [&] { EXPECT_FALSE(cache.calibrate(sample).reuses()) << cache.calibration()->to_string(); });
}

TEST(CalibrationIsPrivate, TwoAtOnceDoNotMix) {
  const auto a = sample_of(100);
  const auto b = sample_of(9000, 250);
  const auto alone = [](const std::vector<Inputs>& sample) {
    LayerCache<Module> cache = cache_of(kEncoder, token_options());
    return saved(cache.calibrate(sample), "one");
  };
  const std::string of_a = alone(a);
  const std::string of_b = alone(b);
  ASSERT_NE(of_a, of_b);
  LayerCache<Module> cache = cache_of(kEncoder, token_options());
  std::string got_b;
  std::thread other([&] { got_b = saved(cache.calibrate(b), "b"); });
  EXPECT_EQ(saved(cache.calibrate(a), "a"), of_a);
  other.join();
  EXPECT_EQ(got_b, of_b);
  const std::string in_force = saved(*cache.calibration(), "in-force");
  EXPECT_TRUE(in_force == of_a || in_force == of_b);
}

TEST(CalibrationIsPrivate, SegmentsOfASampleServeNobody) {
  const auto info = model_info("tiny-llama-sdpa");
  LayerCache<Module> cache = cache_of(info.name, passage_budget());
  PassagePrompts prompt(info);
  const auto sample = prompt.sample();
  ASSERT_TRUE(cache.calibrate(sample).reuse);
  const auto live = prompt();
  while_running(
      [&] {
        // Each tenant is there once: nothing is known of it.
        cache.forward(live, {.output = Output::kLastToken, .tenant = std::to_string(random())});
        EXPECT_EQ(cache.last_report().sequences[0].source, Source::kComputed);
      },
      [&] { cache.calibrate(sample); });
  cache.clear();
  cache.forward(live, {.output = Output::kLastToken});
  EXPECT_EQ(cache.last_report().sequences[0].source, Source::kComputed);
}

TEST(CalibrationMemory, IsBoundedByTheCapacityAndTold) {
  auto options = token_options();
  options.capacity_bytes = 400 << 10;
  LayerCache<Module> cache = cache_of(kEncoder, options);
  const auto inputs = sample_of(100);
  std::size_t next = 0;
  const auto sample = cache.run_sample([&]() -> std::optional<Inputs> {
    EXPECT_EQ(cache.stats().budget->calibrating_bytes > 0, next > 0);
    if (next == inputs.size()) return std::nullopt;
    return inputs[next++];
  });
  EXPECT_EQ(cache.stats().budget->calibrating_bytes, 0U);
  EXPECT_EQ(sample.bytes, 300U * 2 * 40 * sizeof(std::int64_t));
  const auto bank =
      static_cast<std::size_t>(static_cast<double>(options.capacity_bytes) * options.budget.capacity_share);
  std::size_t most = 0;
  std::size_t most_served = 0;
  while_running(
      [&] {
        const auto stats = cache.stats();
        most = std::max(most, stats.budget->calibrating_bytes);
        most_served = std::max(most_served, stats.peak_bytes);
      },
      [&] { cache.calibrate(sample); });
  EXPECT_GT(most, sample.bytes + bank / 4) << "the bank of the calibration is not told";
  EXPECT_LE(most, sample.bytes + 2 * bank) << "its own bank, and the outputs to compare with";
  EXPECT_LE(most_served, options.capacity_bytes);
  EXPECT_EQ(cache.stats().budget->calibrating_bytes, 0U);
}

TEST(CalibrationMemory, OfASampleOnlyTheFirstThousandRequestsAreKept) {
  LayerCache<Module> cache = cache_of(kEncoder, token_options());
  const auto request = right_padded(model_info(kEncoder), {4}, 1);
  int given = 0;
  const auto sample = cache.run_sample([&]() -> std::optional<Inputs> {
    if (given++ == 1500) return std::nullopt;
    return request.inputs;
  });
  EXPECT_EQ(sample.sequences, 1500);
  EXPECT_EQ(sample.bytes, 1000U * 2 * 4 * sizeof(std::int64_t));
}

// --- errors -------------------------------------------------------------------------------------------

/// The three kinds of output: one entry a token, one a token with a head, pooled.
class CalibrationErrors : public ::testing::TestWithParam<std::string> {
 protected:
  CalibrationErrors() : info_(model_info(GetParam())), cache_(cache_of(GetParam(), options(GetParam()))) {}

  static Options options(const std::string& name) {
    Options options{.fidelity = Fidelity::kBudget};
    options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
    options.budget.audit_rate = 0;
    if (name == kModel) options.budget.exit_layers = {0, 1, 2};
    return options;
  }

  std::vector<Inputs> sample() const { return inputs_of(documents(info_, 300, 100)); }

  /// Throws so, and what is in force stays.
  template <class Matcher>
  void expect_refused(const std::function<void()>& call, const Matcher& matcher) {
    const auto before = cache_.calibration()->to_string();
    EXPECT_THAT(call, matcher);
    ASSERT_TRUE(cache_.calibration());
    EXPECT_EQ(cache_.calibration()->to_string(), before);
    EXPECT_EQ(cache_.stats().budget->calibrating_bytes, 0U);
  }

  ModelInfo info_;
  LayerCache<Module> cache_;
};

TEST(CalibrationOfAFailingModel, ItsErrorIsNestedInModelFailed) {
  Script script;  // looks a token's state up in a table, beyond its end where the state is large
  script.layer = Script::with(script.layer, "    x = x + torch.matmul(mixed, self.wo)\n",
                              "    x = x + torch.matmul(mixed, self.wo)\n"
                              "    far = (x.abs().amax(-1) > 1.0e4).long() * 1000000\n"
                              "    x = x + 0.0 * torch.embedding(self.up, far)\n");
  Module module = make_module(script);
  constexpr std::int64_t kPoison = 20;  // an id that neither probes nor the sample have
  {
    const c10::NoGradGuard no_grad;
    module.attr("table").toTensor()[kPoison].fill_(1e6);
  }
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  LayerCache<Module> cache(module, options);
  const auto sample = inputs_of(documents(script_info(script), 200, 100));
  for (const Inputs& inputs : sample) inputs[0].toTensor().masked_fill_(inputs[0].toTensor() == kPoison, kPoison + 1);
  const auto profile = cache.calibrate(sample);
  auto bad = sample;
  for (c10::IValue& input : bad[70]) input = input.toTensor().clone();
  bad[70][0].toTensor()[0][3] = kPoison;
  try {
    cache.calibrate(bad);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kModelFailed);
    EXPECT_THAT(error.what(), HasSubstr("index out of range"));
    EXPECT_ANY_THROW(std::rethrow_if_nested(error)) << "the model's own error is expected in it";
  }
  EXPECT_EQ(cache.calibration()->to_string(), profile.to_string());
}

TEST_P(CalibrationErrors, OfWhatTheModelDoesNotTakeAreInvalidInput) {
  cache_.calibrate(sample());
  const auto failing = [&](const std::function<void(Inputs&)>& change) {
    auto bad = sample();
    change(bad[70]);
    expect_refused([&] { cache_.calibrate(bad); }, ThrowsError(ErrorCode::kInvalidInput, "row 0"));
  };
  failing([](Inputs& inputs) { inputs[0].toTensor()[0][3] = 1'000'000; });
  failing([](Inputs& inputs) { inputs[0].toTensor()[0][3] = -1; });
  if (info_.name.find("llama") != std::string::npos) return;  // its positions are computed: any length goes
  failing([&](Inputs& inputs) { inputs = right_padded(info_, {5000}, 1).inputs; });
}

TEST_P(CalibrationErrors, OfTheCallersOwnCodePassUnchanged) {
  cache_.calibrate(sample());
  const auto throwing = [&](auto thrown, int after) {
    return [this, thrown, after] {
      int given = 0;
      cache_.calibrate([&]() -> std::optional<Inputs> {
        if (given++ == after) throw thrown;
        return right_padded(info_, {9}, 1).inputs;
      });
    };
  };
  struct Mine : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  for (const int after : {0, 3}) {
    expect_refused(throwing(Mine("my file ended"), after),
                   ::testing::Throws<Mine>(::testing::Property(&Mine::what, HasSubstr("my file ended"))));
    expect_refused(throwing(42, after), ::testing::Throws<int>(42));
    expect_refused(throwing(Error(ErrorCode::kUnsupportedModel, "of another cache"), after),
                   ThrowsError(ErrorCode::kUnsupportedModel, "of another cache"));
    expect_refused(throwing(c10::Error(c10::SourceLocation{"here", "my.cpp", 1}, "mine too"), after),
                   ::testing::Throws<c10::Error>());
  }
}

TEST_P(CalibrationErrors, OfBadRequestsSayWhatIsExpected) {
  cache_.calibrate(sample());
  const auto refused = [&](const Inputs& bad, ErrorCode code) {
    auto all = sample();
    all[150] = bad;
    expect_refused([&] { cache_.calibrate(all); }, ThrowsError(code));
  };
  const auto good = right_padded(info_, {9, 5}, 1);
  refused({}, ErrorCode::kInvalidInput);
  refused({good.ids().to(at::kFloat), good.mask()}, ErrorCode::kInvalidInput);
  refused({good.ids()[0], good.mask()}, ErrorCode::kInvalidInput);
  refused({good.ids().to_sparse(), good.mask().to_sparse()}, ErrorCode::kInvalidInput);
  auto holes = good.mask().clone();
  holes[0][4] = 0;
  refused({good.ids(), holes}, ErrorCode::kInvalidInput);
}

TEST_P(CalibrationErrors, OfSmallSamplesSayHowMuchIsNeeded) {
  cache_.calibrate(sample());
  const bool pooled = info_.name == kModel;
  const auto refused = [&](int sequences, const std::string& came) {
    auto few = sample();
    few.resize(static_cast<std::size_t>(sequences));
    expect_refused([&] { cache_.calibrate(few); }, ThrowsError(ErrorCode::kInvalidInput, came));
    expect_refused([&] { cache_.calibrate(few); }, ThrowsError(ErrorCode::kInvalidInput, "at least 67 sequences"));
  };
  refused(3, "3 sequences in 3 requests");
  refused(60, "60 sequences in 60 requests");
  if (pooled) {  // too few for early exits, enough for token reuse
    auto some = sample();
    some.resize(120);
    const auto profile = cache_.calibrate(some);
    EXPECT_EQ(profile.exit, nullptr);
    EXPECT_TRUE(profile.reuses() || profile.reason.find("at least 160") != std::string::npos) << profile.reason;
    cache_.calibrate(sample());
  }
  expect_refused([&] { cache_.calibrate(std::vector<Inputs>{}); },
                 ThrowsError(ErrorCode::kInvalidInput, "no sequence"));
  // Many sequences in one request leave nothing to certify on.
  expect_refused([&] { cache_.calibrate({right_padded(info_, std::vector<std::int64_t>(200, 9), 1).inputs}); },
                 ThrowsError(ErrorCode::kInvalidInput, "200 sequences in 1 requests"));
  // As many as it says are enough to try.
  if (!pooled) {
    auto enough = sample();
    enough.resize(67);
    EXPECT_NO_THROW(cache_.calibrate(enough));
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, CalibrationErrors,
                         ::testing::Values("tiny-bert-sdpa", "tiny-gpt2-sdpa", "tiny-llama-sdpa", "tiny-bert-pooled"),
                         test_name);

TEST(CalibrationScores, WhatTheyThrowIsNotBlamedOnTheModel) {
  for (const auto early_exit : {EarlyExit::kOff, EarlyExit::kCachedNeighbour}) {
    SCOPED_TRACE(to_string(early_exit));
    enum class Mode { kFine, kThrows, kThrowsInt, kNothing, kShapeless };
    auto mode = std::make_shared<std::atomic<Mode>>(Mode::kFine);
    Options options{.fidelity = Fidelity::kBudget};
    options.budget.budget = {BudgetMetric::kDecision, 0.3, 0.1};
    options.budget.early_exit = early_exit;
    options.budget.audit_rate = 0;
    options.budget.exit_layers = {0, 1, 2};
    options.budget.scores = [mode](const at::Tensor& outputs) -> at::Tensor {
      if (*mode == Mode::kThrows) throw std::runtime_error("my classifier is gone");
      if (*mode == Mode::kThrowsInt) throw 42;
      if (*mode == Mode::kNothing) return {};
      if (*mode == Mode::kShapeless) return at::zeros({3});
      return classes(outputs);
    };
    LayerCache<Module> cache = cache_of(kModel, options);
    const auto sample = inputs_of(documents(model_info(kModel), 300, 100));
    const auto profile = cache.calibrate(sample);
    ASSERT_TRUE(profile.reuses()) << profile.to_string();
    const auto stays = [&] {
      *mode = Mode::kFine;
      EXPECT_EQ(cache.calibration()->to_string(), profile.to_string());
    };
    const auto refused = [&](Mode how, const std::string& text) {
      *mode = how;
      EXPECT_THAT([&] { cache.calibrate(sample); }, ThrowsError(ErrorCode::kInvalidOptions, text));
      if (profile.exit) {
        EXPECT_THAT([&] { cache.use_calibration(profile); }, ThrowsError(ErrorCode::kInvalidOptions, text));
      }
      stays();
    };
    refused(Mode::kNothing, "BudgetOptions.scores returned nothing");
    refused(Mode::kShapeless, "classes] is expected");
    // What it throws is the caller's own.
    *mode = Mode::kThrows;
    EXPECT_THAT([&] { cache.calibrate(sample); },
                ::testing::ThrowsMessage<std::runtime_error>(::testing::StrEq("my classifier is gone")));
    stays();
    *mode = Mode::kThrowsInt;
    EXPECT_THROW(cache.calibrate(sample), int);
    stays();
  }
}

TEST(CalibrationScores, ADecisionBetweenFewerThanTwoIsNone) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.scores = [](const at::Tensor& outputs) { return outputs.narrow(1, 0, 1); };
  LayerCache<Module> cache = cache_of(kModel, options);
  EXPECT_THAT([&] { cache.calibrate(inputs_of(documents(model_info(kModel), 300, 100))); },
              ThrowsError(ErrorCode::kInvalidOptions, "two scores"));
}

// --- profiles -----------------------------------------------------------------------------------------

TEST(CalibrationProfiles, NumbersThatCannotBeAreRefused) {
  LayerCache<Module> cache = cache_of(kEncoder, token_options());
  const auto good = cache.calibrate(sample_of(100));
  ASSERT_TRUE(good.reuse);
  const double nan = std::nan("");
  const double infinite = std::numeric_limits<double>::infinity();
  const auto refused = [&](const std::string& what, const std::function<void(CalibrationProfile&)>& change) {
    auto bad = good;
    change(bad);
    EXPECT_THAT([&] { cache.use_calibration(bad); }, ThrowsError(ErrorCode::kInvalidOptions, what));
    EXPECT_EQ(cache.calibration()->to_string(), good.to_string());
  };
  refused("fitted", [](CalibrationProfile& p) { p.fitted = -1; });
  refused("certified", [](CalibrationProfile& p) { p.certified = -1; });
  refused("reuse.fitted", [](CalibrationProfile& p) { p.reuse->fitted = -1; });
  refused("reuse.certified", [](CalibrationProfile& p) { p.reuse->certified = -1; });
  refused("reuse.typical_distance", [](CalibrationProfile& p) { p.reuse->typical_distance = 0; });
  for (const double bad : {nan, infinite, -infinite, -0.5}) {
    SCOPED_TRACE(bad);
    refused("epsilon", [&](CalibrationProfile& p) { p.budget.epsilon = bad; });
    refused("delta", [&](CalibrationProfile& p) { p.budget.delta = bad; });
    refused("certified_error", [&](CalibrationProfile& p) { p.certified_error = bad; });
    refused("error_bound", [&](CalibrationProfile& p) { p.error_bound = bad; });
    refused("expected_share", [&](CalibrationProfile& p) { p.expected_share = bad; });
    refused("expected_exits", [&](CalibrationProfile& p) { p.expected_exits = {0.1, bad}; });
    refused("typical_distance", [&](CalibrationProfile& p) { p.typical_distance = bad; });
    refused("reuse.limit", [&](CalibrationProfile& p) { p.reuse->match_threshold = bad; });
    refused("reuse.error", [&](CalibrationProfile& p) { p.reuse->error = bad; });
    refused("reuse.bound", [&](CalibrationProfile& p) { p.reuse->bound = bad; });
    refused("reuse.computed", [&](CalibrationProfile& p) { p.reuse->computed = bad; });
    refused("reuse.typical_distance", [&](CalibrationProfile& p) { p.reuse->typical_distance = bad; });
  }
}

TEST(CalibrationProfiles, NumbersOfEarlyExitsThatCannotBeAreRefused) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kDecision, 0.1, 0.1};
  options.budget.scores = classes;
  options.budget.token_reuse = false;
  options.budget.exit_layers = {0, 1, 2};
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto good = cache.calibrate(Traffic(1).sample(400));
  ASSERT_TRUE(good.exit) << good.to_string();
  const auto used = static_cast<std::size_t>(
      std::find_if(good.exit->layers.begin(), good.exit->layers.end(), [](const auto& l) { return l.used(); }) -
      good.exit->layers.begin());
  const auto refused = [&](const std::string& what, const std::function<void(ExitModel&)>& change) {
    auto bad = good;
    auto model = std::make_shared<ExitModel>(*good.exit);
    change(*model);
    bad.exit = model;
    EXPECT_THAT([&] { cache.use_calibration(bad); }, ThrowsError(ErrorCode::kInvalidOptions, what));
    EXPECT_EQ(cache.calibration()->to_string(), good.to_string());
  };
  const auto with = [](const at::Tensor& tensor, double value) {
    auto changed = tensor.clone();
    changed.view({-1})[0] = value;
    return changed;
  };
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    SCOPED_TRACE(bad);
    refused("threshold", [&](ExitModel& m) { m.thresholds[0][used] = bad; });
    refused("scale", [&](ExitModel& m) { m.layers[used].gate.scales[0] = bad; });
    refused("mean", [&](ExitModel& m) { m.layers[used].gate.means[0] = bad; });
    refused("weight", [&](ExitModel& m) { m.layers[used].gate.weights[0] = bad; });
    refused("intercept", [&](ExitModel& m) { m.layers[used].gate.intercept = bad; });
    refused("outputs", [&](ExitModel& m) { m.outputs = with(m.outputs, bad); });
    refused("mean_output", [&](ExitModel& m) { m.mean_output = with(m.mean_output, bad); });
    refused("bank", [&](ExitModel& m) { m.layers[used].states = with(m.layers[used].states, bad); });
    refused("bank", [&](ExitModel& m) { m.layers[used].translator = with(m.layers[used].translator, bad); });
  }
  refused("threshold", [&](ExitModel& m) { m.thresholds[0][used] = 2; });  // everything would leave
  refused("scale", [&](ExitModel& m) { m.layers[used].gate.scales[0] = 0; });
}

TEST(CalibrationProfiles, SizesThatWereVerifiedAreTakenOver) {
  const auto info = model_info(kEncoder);
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-calibration-sizes.json";
  const auto request = right_padded(info, {100, 30, 7}, 3);
  LayerCache<Module> first = cache_of(kEncoder, token_options());
  first.calibrate(sample_of(100));
  first.forward(request.inputs, {.fidelity = Fidelity::kLossless});
  EXPECT_TRUE(first.last_report().verified) << "beyond what wrapping compared";
  first.calibration()->save(path);

  LayerCache<Module> second = cache_of(kEncoder, token_options());
  second.use_calibration(CalibrationProfile::load(path));
  second.forward(request.inputs, {.fidelity = Fidelity::kLossless});
  EXPECT_FALSE(second.last_report().verified) << "compared by the first";
  LayerCache<Module> third = cache_of(kEncoder, token_options());
  third.forward(request.inputs, {.fidelity = Fidelity::kLossless});
  EXPECT_TRUE(third.last_report().verified);
}

TEST(CalibrationProfiles, WhatWasVerifiedIsKeptInTheFile) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-calibration-verified.json";
  CalibrationProfile profile;
  profile.model_digest = "some model";
  profile.save(path);
  EXPECT_TRUE(CalibrationProfile::load(path).verified.codes.empty());
  profile.verified = {512, 64, 100, {3, 17, 4'000'000'000}};
  profile.save(path);
  const auto read = CalibrationProfile::load(path).verified;
  EXPECT_EQ(read.tokens, 512);
  EXPECT_EQ(read.rows, 64);
  EXPECT_EQ(read.padding, 100);
  EXPECT_EQ(read.codes, profile.verified.codes);
  for (std::uint32_t i = 0; i < 4097; ++i) profile.verified.codes.push_back(4'000'000'001 + i);
  profile.save(path);
  EXPECT_THAT([&] { CalibrationProfile::load(path); }, ThrowsError(ErrorCode::kInvalidFile, "damaged"));
}

}  // namespace
}  // namespace llmcache::test
