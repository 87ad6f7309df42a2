// One packed weight in each format, and what stands before and behind its product.
#include <limits>
#include <tuple>

#include "model/row_kernels.h"
#include "weights_support.h"

namespace llmcache::test {
namespace {

class PackedLinearTest : public ::testing::TestWithParam<Weights> {
 protected:
  at::Tensor random(at::IntArrayRef shape, double scale = 1) {
    return at::randn(shape, generator_, at::TensorOptions()).mul(scale);
  }
  /// To 127 steps of each row's largest magnitude.
  static at::Tensor in_steps(const at::Tensor& rows) {
    const auto scales = rows.abs().amax(-1, true).clamp_min(1e-30) / 127;
    return (rows / scales).round() * scales;
  }
  /// The weight as it is after rounding.
  static at::Tensor rounded(const at::Tensor& weight) {
    if (GetParam() == Weights::kPackedFp16) return weight.to(at::kHalf).to(at::kFloat);
    if (GetParam() == Weights::kPackedBFloat16) return weight.to(at::kBFloat16).to(at::kFloat);
    return GetParam() == Weights::kPackedInt8 ? in_steps(weight) : weight;
  }
  /// What is multiplied with it, as it is then.
  static at::Tensor entering(const at::Tensor& x) {
    if (GetParam() == Weights::kPackedBFloat16) return x.to(at::kBFloat16).to(at::kFloat);
    return GetParam() == Weights::kPackedInt8 && x.numel() > 0 ? in_steps(x) : x;
  }
  ::testing::AssertionResult close(const at::Tensor& got, const at::Tensor& want) {
    if (got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type()) {
      return ::testing::AssertionFailure() << got.toString() << got.sizes() << ", not " << want.sizes();
    }
    if (want.numel() == 0) return ::testing::AssertionSuccess();
    const double difference = (got - want).abs().max().item<double>();
    // Of the order of sums; a product in bfloat16 is rounded to 8 bits itself.
    const double allowed = GetParam() == Weights::kPackedBFloat16 ? 1.0 / 256 : 1e-5;
    if (difference <= allowed * std::max(want.abs().max().item<double>(), 1.0)) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "off by " << difference;
  }
  static std::size_t bytes_of_an_element() {
    if (GetParam() == Weights::kPackedInt8) return 1;
    return GetParam() == Weights::kPackedFp32 ? 4 : 2;
  }
  at::Generator generator_ = at::make_generator<at::CPUGeneratorImpl>(7);
};

TEST_P(PackedLinearTest, IsTheLinearLayerOfTheRoundedWeight) {
  for (const auto& [in, out] : {std::pair{64, 64}, {1, 1}, {3, 5}, {33, 17}, {7, 1}, {1, 40}, {600, 31}, {512, 3100}}) {
    SCOPED_TRACE(::testing::Message() << in << " to " << out);
    const auto weight = random({out, in});
    const auto bias = random({out});
    const auto packed = PackedLinear::pack(GetParam(), weight, "w");
    for (const std::int64_t rows : {1, 2, 3, 13, 16, 17, 31, 32, 200, 1030}) {
      // Rounded beforehand: among many values some lie so close between two steps that they may become either.
      const auto x = entering(random({rows, in}, 0.1));
      EXPECT_TRUE(close(packed->apply(x, bias), at::linear(x, rounded(weight), bias))) << rows << " rows";
      EXPECT_TRUE(close(packed->apply(x, std::nullopt), at::linear(x, rounded(weight)))) << rows << " rows, no bias";
    }
    EXPECT_GE(packed->bytes(), weight.nbytes() / 4 * bytes_of_an_element());
  }
}

TEST_P(PackedLinearTest, AnyShapeAndStrides) {
  const auto weight = random({24, 16});
  const auto bias = random({24});
  const auto packed = PackedLinear::pack(GetParam(), weight, "w");
  const std::vector<at::Tensor> inputs{random({16}),
                                       random({2, 3, 5, 16}),
                                       random({16, 9}).t(),
                                       random({4, 7, 16}).transpose(0, 1),
                                       random({6, 32}).slice(1, 0, 32, 2),
                                       random({1, 16}).expand({5, 16}),
                                       at::empty({0, 16}),
                                       at::empty({1, 0, 16}),
                                       at::empty({3, 0, 2, 16})};
  for (const auto& x : inputs) {
    const auto before = x.clone();
    EXPECT_TRUE(close(packed->apply(x, bias), at::linear(entering(x), rounded(weight), bias))) << x.sizes();
    EXPECT_TRUE(at::equal(x, before)) << "the input was changed";
  }
}

TEST_P(PackedLinearTest, WeightsOfAnyStrides) {
  const auto stored = random({16, 24});
  const auto x = random({5, 16});
  const auto packed = PackedLinear::pack(GetParam(), stored.t(), "w");  // as in Conv1D
  EXPECT_TRUE(close(packed->apply(x, std::nullopt), at::linear(entering(x), rounded(stored.t()))));
  const auto part = random({24, 40}).narrow(1, 3, 16);
  EXPECT_TRUE(
      close(PackedLinear::pack(GetParam(), part, "w")->apply(x, std::nullopt), at::linear(entering(x), rounded(part))));
}

TEST_P(PackedLinearTest, ARowDependsOnTheOthersInItsRoundingOnly) {
  const auto weight = random({96, 80});
  const auto packed = PackedLinear::pack(GetParam(), weight, "w");
  const auto x = random({130, 80});
  const auto all = packed->apply(x, std::nullopt);
  for (const std::int64_t rows : {1, 2, 7, 16, 129}) {
    const auto part = packed->apply(x.narrow(0, 0, rows), std::nullopt);
    EXPECT_TRUE(close(part, all.narrow(0, 0, rows))) << rows << " rows";
    EXPECT_TRUE(at::equal(part, packed->apply(x.narrow(0, 0, rows), std::nullopt))) << "not the same again";
  }
}

TEST_P(PackedLinearTest, WrongInputsAreRefused) {
  const auto packed = PackedLinear::pack(GetParam(), random({24, 16}), "w");
  for (const auto& x : {random({2, 15}), random({16, 2}), random({2, 16}).to(at::kDouble),
                        random({2, 16}).to(at::kBFloat16), at::scalar_tensor(1.0)}) {
    EXPECT_THROW(std::ignore = packed->apply(x, std::nullopt), c10::Error) << x.toString() << x.sizes();
  }
}

TEST_P(PackedLinearTest, NumbersFindTheLiving) {
  auto first = PackedLinear::pack(GetParam(), random({4, 4}), "w");
  const auto second = PackedLinear::pack(GetParam(), random({4, 4}), "w");
  EXPECT_EQ(&PackedLinear::find(first->number()), first.get());
  EXPECT_EQ(&PackedLinear::find(second->number()), second.get());
  const auto number = first->number();
  first.reset();
  EXPECT_THAT([&] { PackedLinear::find(number); }, ThrowsError(ErrorCode::kModelFailed, std::to_string(number)));
  EXPECT_THAT([] { PackedLinear::find(0); }, ThrowsError(ErrorCode::kModelFailed));
}

TEST_P(PackedLinearTest, OtherTypesAreRefusedByName) {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kDouble}) {
    if (takes(GetParam(), type)) continue;
    EXPECT_THAT(
        [&] {
          PackedLinear::pack(GetParam(), random({4, 4}).to(type), "layer.3.up");
        },
        ThrowsError(ErrorCode::kNotAvailable, "'layer.3.up' is " + std::string(c10::toString(type))));
  }
  EXPECT_THAT(
      [&] {
        PackedLinear::pack(GetParam(), at::empty({4, 4}, at::kMeta), "w");
      },
      ThrowsError(ErrorCode::kNotAvailable, "meta"));
}

INSTANTIATE_TEST_SUITE_P(, PackedLinearTest, ::testing::ValuesIn(packings()),
                         [](const auto& param) { return std::string(to_string(param.param)).substr(7); });

class FinishingLinearTest : public PackedLinearTest {};

TEST_P(FinishingLinearTest, FinishesAsSeparateOperatorsDo) {
  const auto packed = PackedLinear::pack(GetParam(), random({75, 40}), "w");
  const auto bias = random({75});
  for (const std::int64_t rows : {1, 5}) {
    const auto x = random({2, rows, 40}, 0.3);
    const auto residual = random({2, rows, 75});
    const auto product = packed->apply(x, std::nullopt);
    for (const bool with_bias : {false, true}) {
      const auto sum = with_bias ? product + bias : product;
      const auto given = with_bias ? std::optional(bias) : std::nullopt;
      const std::pair<Activation, at::Tensor> wanted[] = {{Activation::kNone, sum},
                                                          {Activation::kRelu, at::relu(sum)},
                                                          {Activation::kSilu, at::silu(sum)},
                                                          {Activation::kGelu, at::gelu(sum)},
                                                          {Activation::kGeluTanh, at::gelu(sum, "tanh")}};
      for (const auto& [activation, want] : wanted) {
        SCOPED_TRACE(::testing::Message() << static_cast<int>(activation) << " bias " << with_bias);
        const auto alone = packed->apply(x, given, activation, std::nullopt);
        const auto added = packed->apply(x, given, activation, residual.transpose(0, 1).contiguous().transpose(0, 1));
        EXPECT_LE((alone - want).abs().max().item<double>(), 1e-5);
        EXPECT_LE((added - (want + residual)).abs().max().item<double>(), 1e-5);
      }
    }
  }
}

TEST_P(FinishingLinearTest, RowsOfOtherTypesStayWhatTheyAre) {
  for (const auto type : types_of(GetParam())) {
    const auto weight = random({75, 40}).to(type);
    const auto bias = random({75}).to(type);
    const auto packed = PackedLinear::pack(GetParam(), weight, "w");
    const auto wide = PackedLinear::pack(GetParam(), weight.to(at::kFloat), "w");
    const auto x = random({7, 40}).to(type);
    const auto residual = random({7, 75}).to(type);
    const auto got = packed->apply(x, bias, Activation::kGelu, residual);
    const auto want =
        wide->apply(x.to(at::kFloat), bias.to(at::kFloat), Activation::kGelu, residual.to(at::kFloat)).to(type);
    EXPECT_EQ(got.scalar_type(), type);
    EXPECT_TRUE(at::equal(got, want));
    EXPECT_THROW((void)packed->apply(x.to(at::kDouble), std::nullopt), c10::Error);
  }
}

TEST_P(FinishingLinearTest, WhatIsNotFiniteStaysInItsRow) {
  const auto packed = PackedLinear::pack(GetParam(), random({24, 40}), "w");
  auto x = random({5, 40});
  const auto before = packed->apply(x, std::nullopt);
  x[1][3] = std::numeric_limits<float>::quiet_NaN();
  x[3][39] = std::numeric_limits<float>::infinity();
  const auto after = packed->apply(x, std::nullopt);
  for (const std::int64_t row : {0, 2, 4}) EXPECT_TRUE(at::equal(after[row], before[row])) << row;
  for (const std::int64_t row : {1, 3}) EXPECT_FALSE(after[row].isfinite().any().item<bool>()) << row;
}

TEST_P(FinishingLinearTest, AResidualOfAnotherSizeOrTypeIsRefused) {
  const auto packed = PackedLinear::pack(GetParam(), random({24, 16}), "w");
  const auto x = random({2, 16});
  for (const auto& residual : {random({1, 24}), random({2, 24}).to(at::kDouble)}) {
    EXPECT_THROW((void)packed->apply(x, std::nullopt, Activation::kNone, residual), c10::Error);
  }
}

INSTANTIATE_TEST_SUITE_P(, FinishingLinearTest, ::testing::ValuesIn(finishing()),
                         [](const auto& param) { return std::string(to_string(param.param)).substr(7); });

TEST(PackedLinear, ARowOfEightBitsDependsOnNoOtherBitForBit) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  for (const auto& [in, out] : {std::pair{80, 96}, {33, 17}, {768, 64}}) {
    const auto packed =
        PackedLinear::pack(Weights::kPackedInt8, at::randn({out, in}, generator, at::TensorOptions()), "w");
    auto x = at::randn({130, in}, generator, at::TensorOptions());
    const auto bias = at::randn({out}, generator, at::TensorOptions());
    const auto all = packed->apply(x, bias, Activation::kGelu, std::nullopt);
    x.narrow(0, 60, 70).mul_(1e6);  // others may be of any size
    for (const auto& [first, rows] : {std::pair{0, 1}, {7, 2}, {3, 16}, {44, 16}, {0, 60}, {59, 1}, {1, 129}}) {
      const auto part = packed->apply(x.narrow(0, first, rows), bias, Activation::kGelu, std::nullopt);
      const auto unchanged = std::min(rows, 60 - first);
      EXPECT_TRUE(at::equal(part.narrow(0, 0, unchanged), all.narrow(0, first, unchanged)))
          << in << " to " << out << ": " << rows << " rows from " << first;
    }
  }
}

/// Sums of 8 bits that are as large as they can be: some CPUs' own products of them overflow.
TEST(PackedLinear, TheLargestSumsOfEightBits) {
  for (const std::int64_t in : {2, 64, 65, 768, 3072}) {
    auto weight = at::full({24, in}, 0.5F);
    weight.narrow(0, 8, 8).neg_();
    weight.narrow(0, 16, 8).mul_(at::arange(in).remainder(2).mul(2).sub(1));
    const auto packed = PackedLinear::pack(Weights::kPackedInt8, weight, "w");
    for (const std::int64_t rows : {1, 2, 3, 4, 16, 40}) {
      auto x = at::full({rows, in}, 3.0F);
      for (std::int64_t r = 1; r < rows; r += 3) x[r].neg_();
      for (std::int64_t r = 2; r < rows; r += 3) x[r].mul_(at::arange(in).remainder(2).mul(2).sub(1));
      const auto want = at::linear(x, weight);  // all are their row's largest: nothing is rounded
      const double off = (packed->apply(x, std::nullopt) - want).abs().max().item<double>();
      EXPECT_LE(off, 1e-5 * 1.5 * static_cast<double>(in)) << in << " inputs, " << rows << " rows";
    }
  }
}

TEST(PackedLinear, RowsOfEightBits) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(4);
  for (const std::int64_t columns : {1, 2, 15, 16, 17, 63, 64, 100}) {
    auto rows = at::randn({6, columns}, generator, at::TensorOptions());
    rows[1].zero_();
    rows[2].mul_(1e-38);
    rows[3].mul_(1e37);
    const auto made = quantise_rows(rows, 9, RowBytes::kSigned);
    const auto shifted = quantise_rows(rows, 9, RowBytes::kShifted);
    EXPECT_EQ(shifted.values.scalar_type(), at::kByte);
    EXPECT_TRUE(at::equal(shifted.values.to(at::kInt), made.values.to(at::kInt) + 128)) << columns;
    EXPECT_TRUE(at::equal(made.values.narrow(0, 6, 3), at::zeros({3, columns}, at::kChar))) << columns;
    const auto scales = rows.abs().amax(1) / 127;
    EXPECT_TRUE(at::allclose(made.scales, scales)) << columns;
    const auto back = made.values.narrow(0, 0, 6).to(at::kFloat) * made.scales.unsqueeze(1);
    const auto off = (back - rows).abs().amax(1);
    for (const std::int64_t row : {0, 1, 3, 4, 5}) {
      EXPECT_LE(off[row].item<float>(), scales[row].item<float>() * 0.5001F) << columns << ", row " << row;
    }
    EXPECT_LE(off[2].item<float>(), 1e-30F);
  }
}

TEST(PackedLinear, ActivationsAreThoseOfLibTorch) {
  const auto x = at::cat({at::linspace(-30, 30, 6001), at::tensor({0.0F, 1e-20F, -1e-20F, 1e4F, -1e4F})}).unsqueeze(0);
  const std::pair<Activation, at::Tensor> wanted[] = {
      {Activation::kSilu, at::silu(x)}, {Activation::kGelu, at::gelu(x)}, {Activation::kGeluTanh, at::gelu(x, "tanh")}};
  for (const auto& [activation, want] : wanted) {
    const auto got = finish_rows(x.clone(), {.activation = activation}, at::kFloat);
    const auto off = ((got - want).abs() / x.abs().clamp_min(1)).max().item<double>();
    EXPECT_LE(off, 1e-6) << static_cast<int>(activation);
  }
  const auto infinite = at::full({1, 20}, std::numeric_limits<float>::infinity());
  const auto nan = at::full({1, 20}, std::numeric_limits<float>::quiet_NaN());
  for (const auto activation : {Activation::kRelu, Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    EXPECT_TRUE(at::equal(finish_rows(infinite.clone(), {.activation = activation}, at::kFloat), infinite));
    EXPECT_TRUE(finish_rows(nan.clone(), {.activation = activation}, at::kFloat).isnan().all().item<bool>());
  }
}

TEST(PackedLinear, WhatAFormatCannotHoldIsNamed) {
  auto weight = at::ones({8, 8});
  weight[3][5].fill_(std::numeric_limits<float>::max());
  EXPECT_THAT([&] { PackedLinear::pack(Weights::kPackedBFloat16, weight, "layer.3.up"); },
              ThrowsError(ErrorCode::kNotAvailable, "'layer.3.up'"));
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    weight[3][5].fill_(bad);
    EXPECT_THAT([&] { PackedLinear::pack(Weights::kPackedInt8, weight, "layer.3.up"); },
                ThrowsError(ErrorCode::kNotAvailable, "'layer.3.up'"));
    EXPECT_EQ(PackedLinear::pack(Weights::kPackedBFloat16, weight, "w")->outputs(), 8);
  }
}

TEST(PackedLinear, HalfPrecisionHasARange) {
  for (const float bad :
       {65520.0F, -70000.0F, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    auto weight = at::ones({8, 8});
    weight[3][5].fill_(bad);
    EXPECT_THAT([&] { PackedLinear::pack(Weights::kPackedFp16, weight, "layer.3.up"); },
                ThrowsError(ErrorCode::kNotAvailable, "'layer.3.up'"));
    EXPECT_EQ(PackedLinear::pack(Weights::kPackedFp32, weight, "w")->outputs(), 8);
  }
  auto weight = at::ones({8, 8});
  weight[3][5].fill_(-65504.0F);
  EXPECT_EQ(PackedLinear::pack(Weights::kPackedFp16, weight, "w")->apply(at::ones({8}), std::nullopt)[3].item<float>(),
            7 - 65504.0F);
}

}  // namespace
}  // namespace llmcache::test
