// Products with weights in panels, against sums in double precision.
#include "model/weight_panels.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <limits>
#include <utility>

namespace llmcache::test {
namespace {

constexpr std::pair<std::int64_t, std::int64_t> kSizes[] = {{1, 1},   {2, 16},  {3, 5},    {33, 17},
                                                            {64, 64}, {7, 100}, {600, 31}, {768, 48},
                                                            {1, 40},  {40, 80}, {3001, 9}, {129, 130}};
constexpr std::int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 13, 64, 131};

class WeightPanelsTest : public ::testing::Test {
 protected:
  at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, generator_, at::TensorOptions()); }
  at::Tensor whole(at::IntArrayRef shape) { return at::randint(-127, 128, shape, generator_, at::kChar); }

  at::Generator generator_ = at::make_generator<at::CPUGeneratorImpl>(5);
};

TEST_F(WeightPanelsTest, SumsOfWholeNumbersAreExact) {
  for (const auto& [in, out] : kSizes) {
    auto weight = whole({out, in});
    weight[0].fill_(127);
    weight[out - 1].fill_(-127);
    const WeightPanels panels(weight);
    const auto scales = random({out});
    for (const auto count : kRows) {
      auto rows = whole({count, in});
      rows[0].fill_(-127);
      const auto sums = at::matmul(rows.to(at::kLong), weight.to(at::kLong).t()).to(at::kFloat);
      EXPECT_TRUE(at::equal(panels.multiply(rows), sums)) << in << " to " << out << ", " << count << " rows";
      EXPECT_TRUE(at::equal(panels.multiply(rows, scales), sums * scales)) << in << " to " << out;
    }
  }
}

/// A sum of n products in float32 is off by at most n times half of a last place of the sum of their magnitudes.
TEST_F(WeightPanelsTest, SumsOfFloatsAreOffByTheirRoundingOnly) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    for (const auto& [in, out] : kSizes) {
      const auto weight = random({out, in}).to(type);
      const WeightPanels panels(weight);
      const auto exact = weight.to(at::kDouble).t();
      for (const auto count : kRows) {
        const auto rows = random({count, in});
        const auto want = at::matmul(rows.to(at::kDouble), exact);
        const auto bound = at::matmul(rows.to(at::kDouble).abs(), exact.abs()) * (static_cast<double>(in) * 0x1p-24);
        const auto got = panels.multiply(rows);
        EXPECT_EQ(got.scalar_type(), at::kFloat);
        EXPECT_TRUE((got - want).abs().le(bound).all().item<bool>()) << in << " to " << out << ", " << count << " rows";
      }
    }
  }
}

TEST_F(WeightPanelsTest, WeightsOfAnyStridesTakeWhatTheirBitsSay) {
  const auto stored = random({32, 48}).to(at::kBFloat16);
  const auto rows = random({5, 32});
  const WeightPanels panels(stored.t());
  EXPECT_EQ(panels.bytes(), 32U * 48 * 2);
  EXPECT_TRUE(at::equal(panels.multiply(rows), WeightPanels(stored.t().contiguous()).multiply(rows)));
  EXPECT_EQ(WeightPanels(whole({48, 32})).bytes(), 32U * 48);
}

TEST_F(WeightPanelsTest, ARowDependsOnNoOtherBitForBit) {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kChar}) {
    for (const auto& [in, out] : {std::pair{80, 200}, {33, 17}, {3000, 70}}) {
      const WeightPanels panels(type == at::kChar ? whole({out, in}) : random({out, in}).to(type));
      const auto rows = type == at::kChar ? whole({130, in}) : random({130, in});
      const auto all = panels.multiply(rows);
      for (const auto& [first, count] : {std::pair{0, 1}, {7, 2}, {5, 3}, {3, 16}, {44, 17}, {129, 1}, {1, 129}}) {
        EXPECT_TRUE(at::equal(panels.multiply(rows.narrow(0, first, count)), all.narrow(0, first, count)))
            << type << ": " << in << " to " << out << ", " << count << " rows";
      }
    }
  }
}

TEST_F(WeightPanelsTest, ThreadsChangeNothing) {
  const WeightPanels panels(random({1000, 300}).to(at::kBFloat16));
  for (const std::int64_t count : {1, 2, 50}) {
    const auto rows = random({count, 300});
    const int threads = at::get_num_threads();
    at::set_num_threads(1);
    const auto alone = panels.multiply(rows);
    at::set_num_threads(3);
    EXPECT_TRUE(at::equal(panels.multiply(rows), alone)) << count;
    at::set_num_threads(threads);
  }
}

TEST_F(WeightPanelsTest, WhatIsNotFiniteStaysInItsRowAndOutput) {
  auto weight = random({40, 24}).to(at::kBFloat16);
  weight[17][3].fill_(std::numeric_limits<float>::infinity());
  const WeightPanels panels(weight);
  auto rows = random({8, 24});
  rows[5][0] = std::numeric_limits<float>::quiet_NaN();
  const auto finite = panels.multiply(rows).isfinite();
  for (std::int64_t row = 0; row < 8; ++row) {
    EXPECT_EQ(finite[row].sum().item<std::int64_t>(), row == 5 ? 0 : 39) << row;
  }
}

}  // namespace
}  // namespace llmcache::test
