// A hand-written model (LayeredModel), and what plans, reports and statistics print.
#include <array>
#include <atomic>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// Uniform attention over real tokens, three layers. `calls` counts layers run.
class HandWritten {
 public:
  explicit HandWritten(std::int64_t vocabulary = 50) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
    table_ = at::randn({vocabulary, 16}, generator, at::TensorOptions());
    weight_ = at::randn({16, 16}, generator, at::TensorOptions()).mul(0.3);
  }

  Activations embed(const Inputs& inputs) const {
    const auto ids = inputs.at(0).toTensor();
    auto mask = std::make_shared<at::Tensor>(at::ones(ids.sizes()));
    if (inputs.size() > 1 && inputs[1].isTensor()) *mask = inputs[1].toTensor().to(at::kFloat);
    return {at::embedding(table_, ids.to(at::kLong)), mask};
  }
  std::int64_t layers() const { return 3; }
  void layer(std::int64_t i, Activations& activations) const {
    ++*calls;
    const auto mask = static_cast<at::Tensor*>(activations.context.get())->unsqueeze(2);
    const auto mean = (activations.hidden * mask).sum(1, true) / mask.sum(1, true).clamp_min(1);
    activations.hidden = at::tanh(at::matmul(activations.hidden + mean, weight_) + static_cast<double>(i));
  }
  c10::IValue head(Activations& activations) const { return activations.hidden * 2; }
  at::Device device() const { return at::kCPU; }
  at::ScalarType dtype() const { return at::kFloat; }
  std::string digest() const { return "hand-written, seed 5"; }

  c10::IValue run(const Inputs& inputs) const {
    auto activations = embed(inputs);
    for (std::int64_t i = 0; i < layers(); ++i) layer(i, activations);
    return head(activations);
  }

  std::shared_ptr<std::atomic<int>> calls = std::make_shared<std::atomic<int>>(0);

 private:
  at::Tensor table_;
  at::Tensor weight_;
};
static_assert(LayeredModel<HandWritten>);
static_assert(!LayeredModel<std::string>);

/// Says what it takes.
class WithSpec : public HandWritten {
 public:
  InputSpec input_spec() const { return {{"tokens", "mask"}, {false, true}, {50, 0}}; }
};
static_assert(LayeredModel<WithSpec>);

/// Adds a number that belongs to the whole batch.
class WithLoss : public WithSpec {
 public:
  c10::IValue head(Activations& activations) const {
    return c10::ivalue::Tuple::create({activations.hidden * 2, activations.hidden.sum()});
  }
};

class Failing : public WithSpec {
 public:
  void layer(std::int64_t i, Activations& activations) const {
    if (*fail) throw std::runtime_error("the disk is full");
    WithSpec::layer(i, activations);
  }
  std::shared_ptr<std::atomic<bool>> fail = std::make_shared<std::atomic<bool>>(false);
};

Request request_of(const std::vector<std::int64_t>& lengths, std::uint64_t seed) {
  return right_padded({"hand-written", "encoder", "none", "float32", 50, 16, 3, 2}, lengths, seed);
}

TEST(LayeredModels, RunsWholeLayersAndKeepsRows) {
  const WithSpec model;
  LayerCache cache(model, Options{.verify_rate = 0});  // its calls are counted
  EXPECT_EQ(cache.profile().layers, 3);
  EXPECT_THAT(cache.profile().inputs, ElementsAre("tokens", "mask"));
  EXPECT_EQ(cache.profile().mask_argument, 1);
  EXPECT_EQ(cache.profile().granularity, Granularity::kWholeLayers);
  EXPECT_THAT(cache.profile().notes, Contains(HasSubstr("whole layers only")));
  EXPECT_EQ(cache.profile().digest, model.digest());
  const auto request = request_of({9, 4, 12}, 1);
  const auto want = model.run(request.inputs);
  *model.calls = 0;
  EXPECT_TRUE(same_bits(cache.forward(request.inputs), want));
  EXPECT_EQ(*model.calls, 3);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, 0));
  EXPECT_EQ(*model.calls, 3) << "nothing was to be run";
  EXPECT_EQ(cache.stats().identical_hits, 3U);
  EXPECT_THAT([&] { cache.forward_plan(request.inputs, cache.full_plan(request.inputs)); },
              ThrowsError(ErrorCode::kNotAvailable, "whole layers"));
}

TEST(LayeredModels, WithoutInputSpec) {
  const HandWritten model;
  LayerCache cache(model);
  EXPECT_THAT(cache.profile().inputs, ElementsAre("input_ids", "attention_mask"));
  const auto request = request_of({9, 4, 12}, 1);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), model.run(request.inputs), request, 0));
    EXPECT_TRUE(same_bits(cache.forward({request.ids()}), model.run({request.ids()}))) << "the mask may be left out";
  }
  EXPECT_GT(cache.stats().identical_hits, 0U);
}

TEST(LayeredModels, OutputWithoutABatchDimensionIsNotKept) {
  const WithLoss model;
  LayerCache cache(model);
  EXPECT_FALSE(cache.profile().per_row_output);
  const auto request = request_of({9, 9}, 1);
  auto activations = model.embed(request.inputs);
  for (std::int64_t i = 0; i < 3; ++i) model.layer(i, activations);
  const auto want = model.head(activations);
  for (int turn = 0; turn < 2; ++turn) EXPECT_TRUE(same_bits(cache.forward(request.inputs), want));
  EXPECT_EQ(cache.stats().entries, 0U);
  EXPECT_EQ(cache.stats().identical_hits, 0U);
}

TEST(LayeredModels, ItsExceptionsAreNested) {
  const Failing model;
  LayerCache cache(model);
  const auto request = request_of({9, 4}, 1);
  *model.fail = true;
  const auto before = counters_of(cache);
  try {
    cache.forward(request.inputs);
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kModelFailed);
    EXPECT_THAT(error.what(), HasSubstr("the disk is full"));
    EXPECT_THAT([&] { std::rethrow_if_nested(error); },
                ::testing::ThrowsMessage<std::runtime_error>("the disk is full"));
  }
  EXPECT_EQ(counters_of(cache), before);
  *model.fail = false;
  EXPECT_TRUE(same_bits(cache.forward(request.inputs), model.run(request.inputs)));
}

TEST(LayeredModels, FailingAtOnceIsRefused) {
  Failing model;
  *model.fail = true;
  EXPECT_THAT([&] { LayerCache cache(model); }, ThrowsError(ErrorCode::kUnsupportedModel, "the disk is full"));
}

// --- text -------------------------------------------------------------------------------------------

TEST(Text, OfAPlan) {
  const Plan plan{
      3, 10, 4, {compute_all(0, 2, 8, 4), {2, 0, 6, 1, {{0, 3, 0, 0, 5}, {3, 5, 1, 4, 8}, {5, 6, 0, 4, 0}}}}};
  EXPECT_THAT(plan.to_string(), AllOf(HasSubstr("3 rows"), HasSubstr("padded length 10"), HasSubstr("4 layers"),
                                      HasSubstr("row 0: 8 tokens from position 2"), HasSubstr("row 2: 6 tokens"),
                                      HasSubstr("donor 1"), HasSubstr("[0, 3) reused, else from donor position 5"),
                                      HasSubstr("[3, 5) computed in layers [1, 4), else from donor position 8"),
                                      HasSubstr("[5, 6) computed in layers [0, 4)\n")));
}

TEST(Text, OfAReport) {
  ForwardReport report;
  report.execution = Execution::kPacked;
  report.sequences.resize(2);
  report.sequences[0] = {.tokens = 9, .source = Source::kPartial, .layers = {{3, 6}, {3, 6}}};
  report.sequences[1] = {.tokens = 4, .source = Source::kIdentical, .similarity = 1, .layers = {{0, 4}, {0, 4}}};
  report.layer_ms = {1.25, 0};
  report.total_ms = 7.5;
  EXPECT_NEAR(report.computed_fraction(), 6.0 / 26, 1e-12);
  EXPECT_EQ(report.summary(),
            "2 rows (1 identical, 1 partial), 13 tokens, 0 known, 23 % of the work computed packed; 7.50 ms");
  EXPECT_THAT(
      report.to_string(),
      AllOf(HasSubstr(report.summary() + "\n"), HasSubstr("row 0: 9 tokens, partial; computed in 6 token-layers of 18"),
            HasSubstr("row 1: 4 tokens, identical"), HasSubstr("layer 0: 1.250 ms"), HasSubstr("layer 1: not run\n")));
  report.layer_ms = {1, 2, 3};
  EXPECT_THAT(report.to_string(), HasSubstr("layers 0 to 2: 6.000 ms\n"));
  EXPECT_EQ(ForwardReport{}.computed_fraction(), 0);
  EXPECT_THAT(ForwardReport{}.to_string(), HasSubstr("nothing computed"));
}

TEST(Text, OfStatistics) {
  Stats stats;
  EXPECT_EQ(stats.hit_rate(), 0);
  stats.requests = 7;
  stats.sequences = 20;
  stats.identical_hits = 3;
  stats.similar_hits = 2;
  stats.prefix_hits = 4;
  stats.tokens_reused = 777;
  stats.tokens = 4321;
  stats.tokens_computed = 1234;
  stats.padding_skipped = 99;
  stats.bytes = 5555;
  stats.peak_bytes = 6666;
  stats.evictions = 3;
  stats.rejected = 2;
  EXPECT_EQ(stats.hit_rate(), 0.45);
  EXPECT_THAT(stats.to_string(),
              AllOf(HasSubstr("7, of 20 sequences"), HasSubstr("45.0 % (9 of 20): 3 identical, 4 prefix, 2 similar\n"),
                    HasSubstr("4321; known 18.0 % (777 of 4321), computed 1234; 99 of padding"),
                    HasSubstr("5 KiB in 0 entries, at most 7 KiB so far"), HasSubstr("3 evictions, 2 not kept")));
}

TEST(Text, OfEnumerations) {
  EXPECT_STREQ(to_string(Source::kComputed), "computed");
  EXPECT_STREQ(to_string(Source::kIdentical), "identical");
  EXPECT_STREQ(to_string(Source::kPartial), "partial");
  EXPECT_STREQ(to_string(Execution::kNone), "none");
  EXPECT_STREQ(to_string(Execution::kDense), "dense");
  EXPECT_STREQ(to_string(Execution::kPacked), "packed");
  EXPECT_STREQ(to_string(Granularity::kTokens), "tokens");
  EXPECT_STREQ(to_string(Granularity::kPacked), "packed sequences");
  EXPECT_STREQ(to_string(Granularity::kWholeLayers), "whole layers");
  for (const auto code : {ErrorCode::kInvalidOptions, ErrorCode::kInvalidInput, ErrorCode::kUnsupportedModel,
                          ErrorCode::kModelChanged, ErrorCode::kModelFailed, ErrorCode::kNotAvailable}) {
    EXPECT_THAT(Error(code, "what").what(), AllOf(HasSubstr(to_string(code)), HasSubstr(": what")));
    EXPECT_STRNE(to_string(code), "unknown");
  }
}

TEST(Text, VersionMacros) {
  EXPECT_EQ(std::string(LLMCACHE_VERSION), std::to_string(LLMCACHE_VERSION_MAJOR) + "." +
                                               std::to_string(LLMCACHE_VERSION_MINOR) + "." +
                                               std::to_string(LLMCACHE_VERSION_PATCH));
}

}  // namespace
}  // namespace llmcache::test
