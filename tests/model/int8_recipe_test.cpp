// Options.weights_sample: which inputs of a layer of 8 bits stay in float32, and how the others are scaled.
#include "model/int8_recipe.h"

#include <ATen/ATen.h>

#include <filesystem>
#include <limits>

#include "weights_support.h"

namespace llmcache::test {
namespace {

constexpr const char* kEncoder = "tiny-bert-sdpa";

class Int8RecipeTest : public ::testing::Test {
 protected:
  at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, generator_, at::TensorOptions()); }

  /// Rows of which some inputs are a hundred times as large as the others.
  at::Tensor rows_with_outliers(std::int64_t rows, std::int64_t in) {
    auto x = random({rows, in});
    for (const std::int64_t column : {std::int64_t{1}, in / 2, in - 1}) x.select(1, column).mul_(100);
    return x;
  }

  static Int8Recipe recipe_of(const at::Tensor& weight, const at::Tensor& x) {
    return int8_recipe(weight, x.to(at::kFloat).abs().amax(0));
  }

  static double error_of(const at::Tensor& got, const at::Tensor& want) {
    return ((got - want).norm() / want.norm()).item<double>();
  }

  at::Generator generator_ = at::make_generator<at::CPUGeneratorImpl>(11);
};

TEST_F(Int8RecipeTest, LargeInputsStayAndOthersAreScaledInSteps) {
  for (const auto& [in, outliers] : {std::pair{8, 0}, {32, 8}, {128, 32}, {600, 32}}) {
    const auto weight = random({40, in});
    const auto recipe = recipe_of(weight, rows_with_outliers(50, in));
    ASSERT_EQ(recipe.outliers.numel(), outliers);
    const auto steps = at::log2(recipe.smoothing).mul(8);
    EXPECT_TRUE(at::allclose(steps, steps.round(), 0, 1e-3));
    if (outliers == 0) continue;
    for (const std::int64_t column : {std::int64_t{1}, std::int64_t{in} / 2, std::int64_t{in} - 1}) {
      EXPECT_TRUE(recipe.outliers.eq(column).any().item<bool>()) << column << " of " << in;
    }
    EXPECT_TRUE(recipe.outliers.diff().gt(0).all().item<bool>());
  }
  // Inputs that a sample never has, and columns of zeros.
  const auto none = int8_recipe(at::zeros({4, 64}), at::zeros({64}));
  EXPECT_TRUE(none.smoothing.isfinite().all().item<bool>());
}

TEST_F(Int8RecipeTest, ProductsAreThoseOfTheRoundedPartAndTheOthers) {
  for (const auto& [in, out] : {std::pair{64, 64}, {8, 5}, {33, 17}, {600, 31}, {130, 300}}) {
    SCOPED_TRACE(::testing::Message() << in << " to " << out);
    const auto weight = random({out, in});
    const auto x = rows_with_outliers(37, in);
    const auto recipe = recipe_of(weight, x);
    const auto packed = PackedLinear::pack(Weights::kPackedInt8, weight, "w", &recipe);
    const auto plain = PackedLinear::pack(Weights::kPackedInt8, weight, "w");
    EXPECT_GT(packed->bytes(), plain->bytes());
    const auto bias = random({out});
    const auto want = at::gelu(at::linear(x, weight, bias));
    const auto got = packed->apply(x, bias, Activation::kGelu, std::nullopt);
    EXPECT_LT(error_of(got, want), 0.02);
    if (recipe.outliers.numel() > 0) {
      const auto without = plain->apply(x, bias, Activation::kGelu, std::nullopt);
      EXPECT_LT(error_of(got, want), 0.5 * error_of(without, want));
    }
    EXPECT_LT(error_of(packed->apply(x, bias), at::linear(x, weight, bias)), 0.02);  // without an activation
  }
}

TEST_F(Int8RecipeTest, TakesBFloat16) {
  const auto weight = random({48, 96}).to(at::kBFloat16);
  const auto x = rows_with_outliers(5, 96).to(at::kBFloat16);
  const auto recipe = recipe_of(weight, x);
  const auto packed = PackedLinear::pack(Weights::kPackedInt8, weight, "w", &recipe);
  const auto got = packed->apply(x, std::nullopt);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_LT(error_of(got.to(at::kFloat), at::linear(x.to(at::kFloat), weight.to(at::kFloat))), 0.02);
}

TEST_F(Int8RecipeTest, ARowDependsOnNoOtherBitForBit) {
  const auto weight = random({96, 160});
  auto x = rows_with_outliers(130, 160);
  const auto recipe = recipe_of(weight, x);
  const auto packed = PackedLinear::pack(Weights::kPackedInt8, weight, "w", &recipe);
  const auto all = packed->apply(x, std::nullopt);
  x.narrow(0, 60, 70).mul_(1e6);
  for (const auto& [first, rows] : {std::pair{0, 1}, {7, 2}, {3, 16}, {0, 60}, {59, 1}, {1, 129}}) {
    const auto part = packed->apply(x.narrow(0, first, rows), std::nullopt);
    const auto unchanged = std::min(rows, 60 - first);
    EXPECT_TRUE(at::equal(part.narrow(0, 0, unchanged), all.narrow(0, first, unchanged))) << rows << " from " << first;
  }
}

TEST_F(Int8RecipeTest, RowsThatTheSampleHadNothingLike) {
  const auto weight = random({24, 64});
  const auto recipe = recipe_of(weight, rows_with_outliers(9, 64));
  const auto packed = PackedLinear::pack(Weights::kPackedInt8, weight, "w", &recipe);
  auto x = random({6, 64});
  x[0].zero_();
  x[1].zero_().index_fill_(0, recipe.outliers, 3.0);  // nothing but what is multiplied apart
  x[2].mul_(1e-20);
  x[3].mul_(1e6);
  x[4][recipe.outliers[0].item<std::int64_t>()] = std::numeric_limits<float>::quiet_NaN();
  x[5][0] = std::numeric_limits<float>::infinity();
  const auto got = packed->apply(x, std::nullopt);
  const auto want = at::linear(x, weight);
  EXPECT_TRUE(got[0].eq(0).all().item<bool>());
  EXPECT_LT(error_of(got[1], want[1]), 1e-5);
  EXPECT_LT(got[2].abs().max().item<double>(), 1e-9);
  EXPECT_LT(error_of(got[3], want[3]), 0.02);
  EXPECT_TRUE(got[4].isfinite().logical_not().all().item<bool>());
  EXPECT_TRUE(got[5].isfinite().logical_not().all().item<bool>());
}

// --- whole models -------------------------------------------------------------------------------------

Options tuned(std::vector<std::vector<std::int64_t>> sample) {
  return {.weights = Weights::kPackedInt8, .weights_sample = std::move(sample)};
}

TEST_F(Int8RecipeTest, ModelsAreNearerToTheirModule) {
  double error = 0;
  double untuned_error = 0;
  for (const char* name : {"tiny-bert-sdpa", "tiny-gpt2-sdpa", "zoo-mistral", "zoo-albert"}) {
    SCOPED_TRACE(name);
    auto plain = load_model(name);
    LayerCache<Module> cache(load_model(name), tuned({{10, 20, 30, 40, 50, 60}, {11, 12}}));
    EXPECT_EQ(cache.profile().weights, "packed-int8");
    LayerCache<Module> other(load_model(name), {.weights = Weights::kPackedInt8});
    EXPECT_NE(cache.profile().digest, other.profile().digest);
    EXPECT_EQ(cache.profile().granularity, other.profile().granularity);
    const auto request = right_padded(model_info(name), {9, 4, 6}, 3);
    const auto want = run_plain(plain, request.inputs);
    EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, 0.2));
    const auto sum = [&](LayerCache<Module>& one) {
      const auto all = right_padded(model_info(name), {40, 40, 40}, 4);
      const auto exact = leaves(run_plain(plain, all.inputs)).at(0);
      return error_of(leaves(one.forward(all.inputs)).at(0), exact);
    };
    error += sum(cache);
    untuned_error += sum(other);
  }
  EXPECT_LT(error, untuned_error);
}

/// The texts of a sample are sources too, so that encoders are tuned on what they will get.
TEST_F(Int8RecipeTest, EncodersOfTwoPartModelsSeeTheSample) {
  for (const char* name : {"seq2seq-t5", "seq2seq-bart"}) {
    SCOPED_TRACE(name);
    const auto digest_of = [&](std::vector<std::vector<std::int64_t>> sample) {
      LayerCache<Module> cache(load_model(name), tuned(std::move(sample)));
      const Inputs inputs{at::tensor({20, 30, 40, 50}, at::kLong).unsqueeze(0), at::ones({1, 4}, at::kLong),
                          at::tensor({11, 12}, at::kLong).unsqueeze(0)};
      auto plain = load_model(name);
      EXPECT_LT(error_of(leaves(cache.forward(inputs)).at(0), leaves(run_plain(plain, inputs)).at(0)), 0.2);
      return cache.profile().digest;
    };
    EXPECT_NE(digest_of({{20, 30, 40, 50, 60}}), digest_of({{120, 130, 140, 150, 160}}));
  }
}

TEST_F(Int8RecipeTest, FurtherCachesHaveTheSampleOfTheFirst) {
  const LayerCache<Module> first(load_model(kEncoder), tuned({{10, 20, 30, 40}}));
  EXPECT_EQ(first.with_options({.weights = Weights::kPackedInt8}).options().weights_sample,
            first.options().weights_sample);
  EXPECT_NO_THROW((void)first.with_options(first.options()));
  EXPECT_THAT(
      [&] {
        (void)first.with_options(tuned({{10, 20, 30}}));
      },
      ThrowsError(ErrorCode::kInvalidOptions, "weights_sample"));
}

TEST_F(Int8RecipeTest, TheFastestIsTimedAsItWillBePacked) {
  Options options = tuned({{10, 20, 30, 40}});
  options.weights = Weights::kFastest;
  options.fastest_may_be_int8 = true;
  const LayerCache<Module> cache(load_model(kEncoder), options);
  const LayerCache<Module> same(load_model(kEncoder), tuned({{10, 20, 30, 40}}));
  EXPECT_TRUE(cache.profile().weights != "packed-int8" || cache.profile().digest == same.profile().digest);
  options.weights_sample = {{10, 1'000'000}};
  EXPECT_THAT([&] { LayerCache<Module> refused(load_model(kEncoder), options); },
              ThrowsError(ErrorCode::kInvalidInput, "Options.weights_sample[0] cannot be run"));
}

TEST_F(Int8RecipeTest, TheSampleIsAPartOfTheDigest) {
  const auto digest_of = [](std::vector<std::vector<std::int64_t>> sample) {
    return LayerCache<Module>(load_model(kEncoder), tuned(std::move(sample))).profile().digest;
  };
  const auto digest = digest_of({{10, 20, 30, 40}});
  EXPECT_EQ(digest, digest_of({{10, 20, 30, 40}}));
  EXPECT_NE(digest, digest_of({{90, 91, 92, 93, 94, 95}}));
}

TEST_F(Int8RecipeTest, OtherFormatsDoNotUseIt) {
  LayerCache<Module> cache(load_model(kEncoder), {.weights = Weights::kPackedFp32, .weights_sample = {{10, 20}}});
  LayerCache<Module> other(load_model(kEncoder), {.weights = Weights::kPackedFp32});
  EXPECT_EQ(cache.profile().digest, other.profile().digest);
}

TEST_F(Int8RecipeTest, TextsThatTheModelCannotRunAreNamed) {
  const std::pair<std::vector<std::int64_t>, std::string> bad[] = {
      {{}, "no token"}, {{3, 1'000'000}, "1000000"}, {{-1}, "-1"}, {std::vector<std::int64_t>(100'000, 7), ""}};
  for (const auto& [text, why] : bad) {
    const auto options = tuned({{10, 20}, text});
    const auto wrap = [&] { LayerCache<Module> cache(load_model(kEncoder), options); };
    EXPECT_THAT(wrap, ThrowsError(ErrorCode::kInvalidInput, "Options.weights_sample[1] cannot be run"));
    EXPECT_THAT(wrap, ThrowsError(ErrorCode::kInvalidInput, why));
  }
}

TEST_F(Int8RecipeTest, SavedProfilesHoldForTheirSample) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "llmcache-int8-recipe.profile";
  std::filesystem::remove(path);
  auto options = tuned({{10, 20, 30, 40}});
  options.profile_path = path;
  EXPECT_FALSE(LayerCache<Module>(load_model(kEncoder), options).profile().from_file);
  EXPECT_TRUE(LayerCache<Module>(load_model(kEncoder), options).profile().from_file);
  options.weights_sample = {{90, 91, 92, 93, 94, 95}};
  EXPECT_FALSE(LayerCache<Module>(load_model(kEncoder), options).profile().from_file);
}

}  // namespace
}  // namespace llmcache::test
