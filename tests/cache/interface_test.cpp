// What every program does first: load, make a batch, call, read what happened, and be told what is wrong.
#include <llmcache/generate.h>
#include <llmcache/padding.h>

#include <chrono>
#include <fstream>
#include <set>
#include <stdexcept>
#include <thread>

#include "budget_support.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Ids = std::vector<std::int64_t>;

std::filesystem::path file_of(const std::string& model) {
  return std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / (model + ".pt");
}

// --- loading ----------------------------------------------------------------------------------------

TEST(InterfaceLoad, LoadsAndWraps) {
  TorchScriptCache cache = load(file_of("tiny-bert-sdpa"), {.capacity_bytes = 1U << 20});
  EXPECT_EQ(cache.options().capacity_bytes, 1U << 20);
  Module module = load_model("tiny-bert-sdpa");
  const auto request = right_padded(model_info("tiny-bert-sdpa"), {7, 7}, 1);
  EXPECT_TRUE(same_bits(cache.forward(request.inputs), run_plain(module, request.inputs)));
}

TEST(InterfaceLoad, WhatIsNoModelIsNamedInOneLine) {
  const auto folder = std::filesystem::temp_directory_path();
  const auto garbage = folder / "llmcache-interface-garbage.pt";
  for (const std::string& text : {std::string(), std::string(5000, 'x'), std::string("PK\3\4 not a module")}) {
    std::ofstream(garbage, std::ios::binary) << text;
    try {
      (void)load(garbage);
      ADD_FAILURE() << "loaded " << text.size() << " bytes of nothing";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidFile);
      EXPECT_THAT(error.what(), AllOf(HasSubstr(garbage.string()), HasSubstr("TorchScript"), Not(HasSubstr("\n"))));
    }
  }
  std::filesystem::remove(garbage);
  EXPECT_THAT([&] { (void)load(garbage); }, ThrowsError(ErrorCode::kInvalidFile, "no such file"));
  EXPECT_THAT([&] { (void)load(folder); }, ThrowsError(ErrorCode::kInvalidFile, "folder"));
  EXPECT_THAT([] { (void)load("/dev/zero"); }, ThrowsError(ErrorCode::kInvalidFile, "ordinary"));
  EXPECT_THAT([&] { (void)load(file_of("tiny-mlp")); }, ThrowsError(ErrorCode::kUnsupportedModel));
}

// --- batches ----------------------------------------------------------------------------------------

TEST(InterfacePad, PutsPaddingOnTheRight) {
  const PaddedBatch batch = pad({{5, 6, 7}, {8}, {}}, 9);
  EXPECT_TRUE(batch.ids.equal(at::tensor(Ids{5, 6, 7, 8, 9, 9, 9, 9, 9}).view({3, 3})));
  EXPECT_TRUE(batch.mask.equal(at::tensor(Ids{1, 1, 1, 1, 0, 0, 0, 0, 0}).view({3, 3})));
  EXPECT_EQ(batch.inputs().size(), 2U);
  EXPECT_THAT([] { (void)pad({}); }, ThrowsError(ErrorCode::kInvalidInput, "no sequence"));
  EXPECT_THAT([] { (void)pad({{}, {}}); }, ThrowsError(ErrorCode::kInvalidInput, "token"));
}

TEST(InterfacePad, FillsInFurtherInputs) {
  TorchScriptCache cache = load(file_of("tiny-bert-types-sdpa"));
  const auto batch = pad({{15, 16, 17}, {18}});
  const auto inputs = batch.inputs(cache.profile());
  ASSERT_EQ(inputs.size(), 3U);
  EXPECT_TRUE(inputs[2].toTensor().equal(at::zeros_like(batch.ids)));
  Module module = load_model("tiny-bert-types-sdpa");
  const Request request{inputs, {{0, 3}, {0, 1}}, 3};
  EXPECT_TRUE(close_on_real(cache.forward(inputs), run_plain(module, inputs), request, 1e-4));
}

TEST(InterfacePad, OtherInputsAreKnownByTheirNames) {
  Module module = load_model("tiny-bert-pooling-mask");
  TorchScriptCache cache(module);
  const auto batch = pad({{15, 16, 17}, {18}});
  const auto inputs = batch.inputs(cache.profile());
  ASSERT_EQ(inputs.size(), 3U);
  EXPECT_TRUE(inputs[2].toTensor().equal(batch.mask)) << "all real tokens are pooled";
  const Request request{inputs, {{0, 3}, {0, 1}}, 3};
  EXPECT_TRUE(close_on_real(cache.forward(inputs), run_plain(module, inputs), request, 1e-4));
  ModelProfile profile;
  profile.inputs = {"input_ids", "attention_mask", "position_ids"};
  profile.mask_argument = 1;
  EXPECT_THAT([&] { (void)batch.inputs(profile); }, ThrowsError(ErrorCode::kInvalidInput, "position_ids"));
}

TEST(InterfacePad, AModelWithoutAMaskTakesNoPadding) {
  ModelProfile profile;
  profile.inputs = {"input_ids"};
  EXPECT_THAT([&] { (void)pad({{1, 2}, {3}}).inputs(profile); }, ThrowsError(ErrorCode::kInvalidInput, "mask"));
  EXPECT_EQ(pad({{1, 2}, {3, 4}}).inputs(profile).size(), 1U);
}

TEST(InterfaceScores, AreThoseOfALinearLayer) {
  at::manual_seed(1);
  const auto weight = at::randn({3, 8});
  const auto bias = at::randn({3});
  const auto outputs = at::randn({5, 8});
  EXPECT_TRUE(at::allclose(linear_scores(weight, bias)(outputs), at::linear(outputs, weight, bias), 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(linear_scores(weight)(outputs), at::linear(outputs, weight), 1e-5, 1e-6));
  const auto scores = linear_scores(weight, bias);
  const auto before = scores(outputs);
  const auto column = at::randn({8, 3});
  const auto transposed = linear_scores(column.t(), bias);
  const auto as_before = transposed(outputs);
  column.zero_();
  EXPECT_TRUE(transposed(outputs).equal(as_before)) << "a copy, whatever the strides";
  EXPECT_THAT([&] { scores(at::randn({5, 7})); }, ThrowsError(ErrorCode::kInvalidOptions, "8 values"));
  weight.zero_();
  bias.zero_();
  EXPECT_TRUE(scores(outputs).equal(before)) << "a copy";
  EXPECT_THAT([&] { linear_scores(bias); }, ThrowsError(ErrorCode::kInvalidOptions, "classes"));
  EXPECT_THAT([&] { linear_scores(at::randn({1, 8})); }, ThrowsError(ErrorCode::kInvalidOptions, "two classes"));
  EXPECT_THAT([&] { linear_scores(weight, at::randn({8})); }, ThrowsError(ErrorCode::kInvalidOptions, "bias"));
}

// --- bad requests -----------------------------------------------------------------------------------

TEST(InterfaceErrors, IdsOutsideTheVocabularyAreNamedByRowAndPosition) {
  TorchScriptCache cache = load(file_of("tiny-bert-sdpa"));
  const auto counters = counters_of(cache);
  for (const std::int64_t id : {300L, -1L, 1L << 40}) {
    const auto batch = pad({{15, 16, 17}, {18, id}});
    EXPECT_THAT([&] { cache.forward(batch.inputs()); },
                ThrowsError(ErrorCode::kInvalidInput,
                            "holds " + std::to_string(id) +
                                " in row 1 at position 1; the model's embedding has the ids 0 to 299"));
  }
  EXPECT_EQ(counters_of(cache), counters);
  auto batch = pad({{15, 16, 17}, {18}});
  batch.ids[1][2] = 299;
  EXPECT_NO_THROW(cache.forward(batch.inputs()));
}

/// By model: the longest sequence, as the model itself takes it.
class InterfaceLength : public ModelTest {};

TEST_P(InterfaceLength, IsWhatTheModelTakes) {
  if (refused()) return;
  const std::int64_t most = profile().max_tokens;
  constexpr std::int64_t kPositions = 256;  // of all models here that have any
  const auto fails = [&](std::int64_t tokens) {
    try {
      (void)plain(right_padded(info(), {tokens}, 1).inputs);
      return false;
    } catch (const std::exception&) {
      return true;
    }
  };
  if (most == 0) return;
  EXPECT_LE(most, kPositions);
  EXPECT_FALSE(fails(most));
  EXPECT_TRUE(fails(most + 1));
  EXPECT_NO_THROW(cache().forward(right_padded(info(), {most, 3}, 1).inputs));
  EXPECT_THAT(
      [&] {
        cache().forward(right_padded(info(), {3, most + 1}, 1).inputs);
      },
      ThrowsError(ErrorCode::kInvalidInput, " has " + std::to_string(most + 1) + " tokens"));
}

INSTANTIATE_TEST_SUITE_P(All, InterfaceLength, ::testing::ValuesIn(wrappable_names({"tiny-", "zoo-"})), test_name);

TEST(InterfaceLengths, AreFoundWhereThereIsATableOfPositions) {
  for (const char* name : {"tiny-bert-sdpa", "tiny-distilbert-eager", "tiny-gpt2-sdpa", "tiny-gpt2-eager", "zoo-opt",
                           "zoo-albert", "zoo-electra"}) {
    EXPECT_EQ(subject(name).cache.profile().max_tokens, 256) << name;
  }
  EXPECT_EQ(subject("zoo-roberta").cache.profile().max_tokens, 254) << "positions begin behind the padding id, 1";
  EXPECT_EQ(subject("tiny-llama-sdpa").cache.profile().max_tokens, 0) << "rotary: no bound";
}

TEST(InterfaceErrors, AFailingModelSaysWhyInOneLine) {
  TorchScriptCache cache = load(file_of("tiny-throws"));
  auto request = right_padded(model_info("tiny-throws"), {5}, 1);
  request.ids()[0][2] = 7;
  try {
    cache.forward(request.inputs);
    FAIL() << "the model did not fail";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kModelFailed);
    EXPECT_THAT(error.what(), AllOf(HasSubstr("an input id was 7"), Not(HasSubstr("\n"))));
    try {
      std::rethrow_if_nested(error);
      FAIL() << "the model's own error is not nested";
    } catch (const std::exception& own) {
      EXPECT_THAT(own.what(), AllOf(HasSubstr("an input id was 7"), HasSubstr("Traceback")));
    }
  }
}

// --- progress ---------------------------------------------------------------------------------------

TEST(InterfaceProgress, TellsTheStepsOfWrapping) {
  std::vector<std::string> steps;
  const auto me = std::this_thread::get_id();
  Options options{.weights = Weights::kPackedFp32};
  options.progress = [&](const Progress& progress) {
    EXPECT_EQ(std::this_thread::get_id(), me);
    steps.push_back(progress.step);
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
  };
  const TorchScriptCache cache = load(file_of("tiny-gpt2-sdpa"), options);
  EXPECT_THAT(steps, AllOf(Contains("packing weights"), Contains("checking prefix reuse")));
  EXPECT_EQ(steps.back(), "done");
  EXPECT_GE(cache.profile().wrap_ms, 40.0 * static_cast<double>(steps.size() - 1)) << "all of it counts";
}

TEST(InterfaceProgress, WhatItThrowsPassesThrough) {
  struct Mine {};
  Options options;
  options.progress = [](const Progress&) { throw Mine(); };
  EXPECT_THROW((void)load(file_of("tiny-bert-sdpa"), options), Mine);
}

TEST(InterfaceProgress, TellsHowFarACalibrationIs) {
  std::set<std::string> steps;
  std::int64_t most = 0;
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {.metric = BudgetMetric::kDecision, .epsilon = 0.1};
  options.budget.scores = classes;
  options.progress = [&](const Progress& progress) {
    steps.insert(progress.step);
    if (progress.step != "calibration: running the sample") return;
    EXPECT_EQ(progress.total, 300);
    EXPECT_EQ(progress.done, ++most);
  };
  LayerCache<Module> cache = cache_of(kModel, options);
  cache.calibrate(Traffic(1).sample(300));
  EXPECT_EQ(most, 300);
  EXPECT_THAT(steps, Contains("calibration: fitting early exits"));
}

// --- exceptions of the caller's functions -----------------------------------------------------------

struct Mine : std::runtime_error {
  Mine() : std::runtime_error("mine") {}
};

TEST(InterfaceCallbacks, ThrowTheirOwnExceptionsInACalibration) {
  bool broken = false;
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {.metric = BudgetMetric::kDecision, .epsilon = 0.1};
  options.budget.exit_layers = {0, 1, 2};  // not by measured times: the tiny model's are all alike
  options.budget.token_reuse = false;
  options.budget.scores = [&](const at::Tensor& outputs) {
    if (broken) throw Mine();
    return classes(outputs);
  };
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto profile = cache.calibrate(Traffic(1).sample(300));
  ASSERT_NE(profile.exit, nullptr) << profile.to_string();
  broken = true;
  EXPECT_THROW(cache.calibrate(Traffic(1).sample(300)), Mine);
  EXPECT_THROW(cache.use_calibration(profile), Mine);
  EXPECT_THROW(cache.calibrate([]() -> std::optional<Inputs> { throw Mine(); }), Mine);
  EXPECT_TRUE(cache.calibration().has_value()) << "what was in force stays";

  // Serving goes on without the budget, and counts.
  const auto request = Traffic(7).next();
  Module module = load_model(kModel);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), run_plain(module, request.inputs), request, 1e-4));
  const auto fallbacks = cache.stats().fallbacks;
  ASSERT_EQ(fallbacks.size(), 1U);
  EXPECT_EQ(fallbacks[0].count, 1U);
  EXPECT_THAT(fallbacks[0].last_reason, HasSubstr("mine"));
}

TEST(InterfaceCalibration, SaysWhyNothingIsReusedAndWhatItWouldTake) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {.metric = BudgetMetric::kDecision, .epsilon = 0.001};
  options.budget.scores = classes;
  options.budget.exit_layers = {1, 2};
  options.budget.token_reuse = false;
  LayerCache<Module> cache = cache_of(kModel, options);
  const auto profile = cache.calibrate(Traffic(1).sample(100));
  ASSERT_FALSE(profile.reuses());
  EXPECT_THAT(profile.reason, AllOf(HasSubstr("early exit"), HasSubstr("epsilon = 0.001"), HasSubstr("needs about")));
  EXPECT_THAT(profile.to_string(), HasSubstr(profile.reason));

  options.budget.budget.epsilon = 0.1;
  LayerCache<Module> loose = cache_of(kModel, options);
  const auto enough = loose.calibrate(Traffic(1).sample(500));
  ASSERT_TRUE(enough.reuses());
  EXPECT_EQ(enough.reason, "");
}

TEST(InterfaceCalibration, AMetricThatCannotWorkIsRefused) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget.metric = BudgetMetric::kTokenAgreement;
  for (const char* name : {"tiny-bert-sdpa", "tiny-bert-pooled"}) {
    LayerCache<Module> cache = cache_of(name, options);
    EXPECT_THAT([&] { cache.calibrate(Traffic(1).sample(50)); }, ThrowsError(ErrorCode::kInvalidOptions, "causal"));
  }
}

TEST(InterfaceCalibration, ASampleOfThreeIsTooSmall) {
  for (const char* name : {"tiny-bert-sdpa", "tiny-bert-pooled", "tiny-llama-sdpa"}) {
    Options options{.fidelity = Fidelity::kBudget};
    options.budget.budget.metric = BudgetMetric::kRelativeError;
    LayerCache<Module> cache = cache_of(name, options);
    std::vector<Inputs> three;
    for (std::uint64_t seed = 0; seed < 3; ++seed) three.push_back(right_padded(model_info(name), {9}, seed).inputs);
    EXPECT_THAT([&] { cache.calibrate(three); }, ThrowsError(ErrorCode::kInvalidInput, "at least")) << name;
  }
}

// --- prints -----------------------------------------------------------------------------------------

TEST(InterfacePrints, SayWhatHappenedInOneLine) {
  TorchScriptCache cache = load(file_of("tiny-llama-sdpa"));
  const auto batch = pad({{15, 16, 17, 18}, {19, 20}});
  cache.forward(batch.inputs());
  EXPECT_THAT(cache.last_report().summary(),
              ::testing::MatchesRegex("2 rows \\(2 computed\\), 6 tokens, 0 known, 100 % of the work computed packed; "
                                      "[0-9.]+ ms.*"));
  cache.forward(batch.inputs());
  EXPECT_THAT(cache.last_report().summary(),
              ::testing::MatchesRegex("2 rows \\(2 identical\\), 6 tokens, nothing computed; [0-9.]+ ms.*"));
  cache.forward(pad({{15, 16, 17, 18, 21}}).inputs());
  EXPECT_THAT(cache.last_report().summary(), HasSubstr("1 row (1 prefix), 5 tokens, 4 known, 20 % of the work"));
  for (const std::string& text :
       {cache.last_report().to_string(), cache.stats().to_string(), cache.profile().to_string()}) {
    EXPECT_EQ(text.back(), '\n');
    EXPECT_NE(text[text.size() - 2], '\n');
  }
  EXPECT_THAT(cache.stats().to_string(), AllOf(HasSubstr("60.0 % (3 of 5): 2 identical, 1 prefix"), HasSubstr("KiB")));
}

// --- generation -------------------------------------------------------------------------------------

/// One whole pass of the plain module a token.
Ids expected(Module& module, Ids ids, std::size_t count, const Sampling& sampling = {}) {
  std::mt19937_64 draws(sampling.seed);
  Ids said;
  while (said.size() < count) {
    const auto row = at::tensor(ids, at::kLong).unsqueeze(0);
    const auto logits =
        run_plain(module, {row, at::ones_like(row)}).toTensor().select(1, -1)[0].to(at::kFloat).contiguous();
    said.push_back(
        sample({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())}, sampling, next_draw(draws)));
    ids.push_back(said.back());
  }
  return said;
}

class InterfaceGenerate : public ::testing::TestWithParam<std::string> {};

TEST_P(InterfaceGenerate, SaysWhatThePlainModuleSays) {
  Module module = load_model(GetParam());
  TorchScriptCache cache(module);
  const std::vector<Ids> prompts = {{15, 16, 17, 18, 19}, {20, 21}, {15, 16, 17, 99, 100, 101, 102}};
  for (const Sampling& sampling : {Sampling{}, Sampling{.temperature = 0.8, .top_k = 40, .top_p = 0.95, .seed = 3}}) {
    std::vector<Ids> streamed(prompts.size());
    const auto all = generate_batch(cache, prompts, {.max_new_tokens = 9, .sampling = sampling},
                                    [&](std::size_t sequence, std::int64_t token) {
                                      streamed.at(sequence).push_back(token);
                                      return true;
                                    });
    ASSERT_EQ(all.size(), prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      Sampling own = sampling;
      own.seed += i;
      EXPECT_EQ(all[i].tokens, expected(module, prompts[i], 9, own)) << "prompt " << i;
      EXPECT_EQ(all[i].tokens, streamed[i]);
      EXPECT_EQ(all[i].stopped, StopReason::kMaxNewTokens);
      EXPECT_EQ(all[i].steps, 8);
      EXPECT_EQ(all[i].prompt_tokens, static_cast<std::int64_t>(prompts[i].size()));
    }
  }
  const auto again = generate(cache, prompts[2], {.max_new_tokens = 2});
  if (cache.profile().prefix_reuse) {
    EXPECT_GT(again.prompt_reused, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Decoders, InterfaceGenerate,
                         ::testing::Values("tiny-gpt2-sdpa", "tiny-gpt2-eager", "tiny-llama-sdpa", "zoo-bloom",
                                           "zoo-mistral", "zoo-qwen3moe"),
                         test_name);

TEST(InterfaceGenerateTest, StopsWhereItShould) {
  Module module = load_model("tiny-llama-sdpa");
  TorchScriptCache cache(module);
  const Ids prompt = {15, 16, 17};
  const Ids all = expected(module, prompt, 12);
  std::size_t late = 3;
  while (std::find(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(late), all[late]) !=
         all.begin() + static_cast<std::ptrdiff_t>(late)) {
    ++late;
    ASSERT_LT(late, all.size()) << "choose another prompt";
  }
  const auto stopped = generate(cache, prompt, {.max_new_tokens = 12, .stop_tokens = {1000, all[late]}});
  EXPECT_EQ(stopped.stopped, StopReason::kStopToken);
  EXPECT_EQ(stopped.tokens, Ids(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(late)));

  std::size_t count = 0;
  const auto told = generate(cache, prompt, {}, [&](std::int64_t) { return ++count < 4; });
  EXPECT_EQ(told.stopped, StopReason::kCaller);
  EXPECT_EQ(told.tokens.size(), 4U);

  TorchScriptCache gpt2 = load(file_of("tiny-gpt2-sdpa"));
  const auto full = generate(gpt2, Ids(250, 20), {.max_new_tokens = 50});
  EXPECT_EQ(full.stopped, StopReason::kMaxTokens);
  EXPECT_EQ(full.tokens.size(), 7U) << "the last one is said behind 256 tokens";
  EXPECT_EQ(generate(gpt2, Ids(5, 20), {.max_new_tokens = 50, .max_tokens = 8}).tokens.size(), 4U);
  EXPECT_EQ(generate(gpt2, Ids(250, 20), {.max_new_tokens = 50, .max_tokens = 1000}).tokens.size(), 7U);
}

TEST(InterfaceGenerateTest, TenantsDoNotShare) {
  TorchScriptCache cache = load(file_of("tiny-llama-sdpa"));
  const Ids prompt(40, 20);
  generate(cache, prompt, {.max_new_tokens = 1, .tenant = "a"});
  EXPECT_EQ(generate(cache, prompt, {.max_new_tokens = 1, .tenant = "b"}).prompt_reused, 0);
  EXPECT_GT(generate(cache, prompt, {.max_new_tokens = 1, .tenant = "a"}).prompt_reused, 0);
}

TEST(InterfaceGenerateTest, BadCallsAreRefused) {
  TorchScriptCache cache = load(file_of("tiny-gpt2-sdpa"));
  const auto refused = [&](const std::vector<Ids>& prompts, const GenerateOptions& options, ErrorCode code,
                           const char* part) {
    EXPECT_THAT([&] { generate_batch(cache, prompts, options); }, ThrowsError(code, part)) << part;
  };
  refused({}, {}, ErrorCode::kInvalidInput, "no prompt");
  refused({{15}, {}}, {}, ErrorCode::kInvalidInput, "prompt 1 has no token");
  refused({Ids(257, 20)}, {}, ErrorCode::kInvalidInput, "257 tokens");
  refused({{15, 300}}, {}, ErrorCode::kInvalidInput, "position 1");
  refused({{15}}, {.max_new_tokens = 0}, ErrorCode::kInvalidOptions, "max_new_tokens");
  refused({{15}}, {.sampling = {.temperature = -1}}, ErrorCode::kInvalidOptions, "temperature");
  TorchScriptCache encoder = load(file_of("tiny-bert-sdpa"));
  EXPECT_THAT([&] { generate(encoder, Ids{15}); }, ThrowsError(ErrorCode::kNotAvailable, "causal"));
  EXPECT_THROW(generate(cache, Ids{15}, {}, [](std::int64_t) -> bool { throw Mine(); }), Mine);
}

}  // namespace
}  // namespace llmcache::test
