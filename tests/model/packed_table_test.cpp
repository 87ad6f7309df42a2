// Tables of embeddings in each format, alone and tied to a layer.
#include "model/packed_table.h"

#include <cmath>
#include <limits>

#include "weights_support.h"

namespace llmcache::test {
namespace {

/// Half of a last place of a type's values.
double half_a_place(at::ScalarType type) {
  if (type == at::kFloat) return 0x1p-24;
  return type == at::kHalf ? 0x1p-11 : 0x1p-8;
}

/// How far each value of `table` may be off, looked up in the type that it has. 16 bits: half of a last place (and what
/// half precision has no exponents for). 8 bits: half a step of the largest value of its 64 neighbours, or of its row
/// where that is a layer's; multiplied in float32.
at::Tensor allowed(Weights weights, const at::Tensor& table, bool by_row) {
  const auto wide = table.to(at::kDouble);
  const auto rounded = wide.abs() * half_a_place(table.scalar_type());
  if (weights == Weights::kPackedBFloat16) return wide.abs() * 0x1p-8 + rounded;
  if (weights == Weights::kPackedFp16) return wide.abs() * 0x1p-11 + 0x1p-24 + rounded;
  auto steps = at::empty_like(wide);
  const std::int64_t group = by_row ? table.size(1) : 64;
  for (std::int64_t c = 0; c < table.size(1); c += group) {
    const auto part = wide.narrow(1, c, std::min(group, table.size(1) - c));
    steps.narrow(1, c, part.size(1)).copy_(part.abs().amax(1, true).expand_as(part) / 127);
  }
  return steps * 0.5001 + rounded;
}

class PackedTableTest : public ::testing::TestWithParam<Weights> {
 protected:
  at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, generator_, at::TensorOptions()); }

  static void expect_rows(const PackedTable& packed, const at::Tensor& table, const at::Tensor& bound) {
    for (const auto& ids : {at::arange(table.size(0)), at::tensor({0, 0, 3}).view({3, 1}),
                            at::tensor({table.size(0) - 1}, at::kInt), at::tensor({1, 2, 3, 4}).view({2, 2}).t()}) {
      const auto got = packed.look_up(ids);
      const auto want = at::embedding(table, ids.to(at::kLong));
      ASSERT_EQ(got.sizes(), want.sizes());
      EXPECT_EQ(got.scalar_type(), table.scalar_type());
      const auto off = (got.to(at::kDouble) - want.to(at::kDouble)).abs();
      EXPECT_TRUE(off.le(at::embedding(bound, ids.to(at::kLong))).all().item<bool>())
          << table.sizes() << ": off by " << off.max().item<double>();
    }
    EXPECT_EQ(packed.look_up(at::empty({2, 0}, at::kLong)).sizes(), (std::vector<std::int64_t>{2, 0, table.size(1)}));
  }
  static void expect_rows(const PackedTable& packed, const at::Tensor& table, bool by_row) {
    expect_rows(packed, table, allowed(GetParam(), table, by_row));
  }

  at::Generator generator_ = at::make_generator<at::CPUGeneratorImpl>(9);
};

TEST_P(PackedTableTest, RowsAreOffByTheirRoundingOnly) {
  for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const auto& [rows, width] : {std::pair{5, 64}, {40, 100}, {9000, 130}}) {
      auto table = random({rows, width});
      table.select(1, width / 2).mul_(100);  // as tables of positions have
      table[2].zero_();
      table = table.to(type);
      const auto packed = PackedTable::pack(GetParam(), table, nullptr);
      if (type != at::kFloat && GetParam() != Weights::kPackedInt8) {
        EXPECT_EQ(packed, nullptr) << "it has 16 bits as it is";
        continue;
      }
      ASSERT_NE(packed, nullptr);
      expect_rows(*packed, table, false);
      EXPECT_EQ(&PackedTable::find(packed->number()), packed.get());
    }
  }
  const auto packed = PackedTable::pack(GetParam(), random({1000, 640}), nullptr);
  EXPECT_EQ(packed->bytes(), 1000U * 640 * (GetParam() == Weights::kPackedInt8 ? 17 : 32) / 16);
}

TEST_P(PackedTableTest, ARowIsWhatItIsByItself) {
  const auto table = random({50, 72});
  for (const auto& tied : {std::shared_ptr<const PackedLinear>(), PackedLinear::pack(GetParam(), table, "head")}) {
    const auto packed = PackedTable::pack(GetParam(), table, tied);
    const auto all = packed->look_up(at::arange(50).view({5, 10}));
    for (const std::int64_t id : {0, 1, 17, 33, 49}) {
      EXPECT_TRUE(at::equal(packed->look_up(at::tensor({id}))[0], all[id / 10][id % 10])) << id;
    }
  }
}

TEST_P(PackedTableTest, TiedToALayer) {
  for (const auto& [rows, width] : {std::pair{5, 1}, {40, 33}, {130, 64}}) {
    const auto table = random({rows, width});
    const auto layer = PackedLinear::pack(GetParam(), table, "head");
    const auto packed = PackedTable::pack(GetParam(), table, layer);
    ASSERT_EQ(packed != nullptr, layer->has_rows() || width >= 64);
    if (packed == nullptr) continue;
    expect_rows(*packed, table, layer->has_rows());
    EXPECT_EQ(packed->bytes() == 0, layer->has_rows());
    if (GetParam() != Weights::kPackedInt8) continue;
    const auto recipe = int8_recipe(table, at::arange(1, width + 1, at::kFloat));
    const auto tuned = PackedLinear::pack(GetParam(), table, "head", &recipe);
    const auto scaled = table * recipe.smoothing;
    const auto bound = (scaled.abs().amax(1, true) / 127 / recipe.smoothing * 0.501).to(at::kDouble);
    expect_rows(*PackedTable::pack(GetParam(), table, tuned), table,
                tuned->has_rows() ? bound : allowed(GetParam(), table, false));
  }
}

/// As of a module that comes in 16 bits: the rows of a layer that holds them as they are.
TEST_P(PackedTableTest, TiedToALayerOfItsType) {
  const auto type = GetParam() == Weights::kPackedFp16 ? at::kHalf : at::kBFloat16;
  const auto table = random({70, 64}).to(type);
  const auto layer = PackedLinear::pack(GetParam(), table, "head");
  const auto packed = PackedTable::pack(GetParam(), table, layer);
  ASSERT_EQ(packed != nullptr, layer->has_rows() || GetParam() == Weights::kPackedInt8);
  if (packed == nullptr) return;
  expect_rows(*packed, table, layer->has_rows());
  if (layer->has_rows() && GetParam() != Weights::kPackedInt8) {
    EXPECT_TRUE(at::equal(packed->look_up(at::arange(70)), table));
  }
}

/// The layouts of engines cannot be read.
TEST_P(PackedTableTest, TiedToALayerThatHasNoRows) {
  const auto table = random({130, 64});
  const auto layer = PackedLinear::pack(Weights::kPackedFp32, table, "head");
  ASSERT_FALSE(layer->has_rows());
  EXPECT_THAT([&] { (void)layer->rows(at::tensor({1})); }, ThrowsError(ErrorCode::kModelFailed));
  const auto packed = PackedTable::pack(GetParam(), table, layer);
  expect_rows(*packed, table, false);
  EXPECT_GT(packed->bytes(), 0U);
}

TEST_P(PackedTableTest, OtherIdsAreRefused) {
  const auto table = random({20, 64});
  for (const auto& tied : {std::shared_ptr<const PackedLinear>(), PackedLinear::pack(GetParam(), table, "head")}) {
    const auto packed = PackedTable::pack(GetParam(), table, tied);
    for (const std::int64_t bad : {20, 31, -1}) {
      EXPECT_THROW((void)packed->look_up(at::tensor({std::int64_t{3}, bad})), c10::IndexError) << bad;
    }
    EXPECT_THROW((void)packed->look_up(at::tensor({1.0F})), c10::Error);
  }
}

TEST_P(PackedTableTest, WhatAFormatCannotHoldStays) {
  auto table = random({5000, 64});
  table[4998][5].fill_(GetParam() == Weights::kPackedInt8 ? std::numeric_limits<float>::infinity()
                                                          : std::numeric_limits<float>::max());
  EXPECT_EQ(PackedTable::pack(GetParam(), table, nullptr), nullptr);
}

INSTANTIATE_TEST_SUITE_P(, PackedTableTest, ::testing::ValuesIn(finishing()),
                         [](const auto& param) { return std::string(to_string(param.param)).substr(7); });

TEST(PackedTable, WhatIsNotWorthItStays) {
  const auto table = at::ones({20, 64});
  EXPECT_EQ(PackedTable::pack(Weights::kPackedFp32, table, nullptr), nullptr);
  for (const auto weights : finishing()) {
    EXPECT_NE(PackedTable::pack(weights, table, nullptr), nullptr);
    EXPECT_EQ(PackedTable::pack(weights, table.narrow(1, 0, 63), nullptr), nullptr);
    EXPECT_EQ(PackedTable::pack(weights, table.to(at::kLong), nullptr), nullptr);
    EXPECT_EQ(PackedTable::pack(weights, table.narrow(0, 0, 0), nullptr), nullptr);
  }
  EXPECT_THAT([] { PackedTable::find(0); }, ThrowsError(ErrorCode::kModelFailed));
}

}  // namespace
}  // namespace llmcache::test
