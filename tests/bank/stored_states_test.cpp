// Formats of a bank: what they lose, what they take, and that tokens come out where they are wanted. No model.
#include "bank/stored_states.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "bank/group_kernels.h"
#include "simulation.h"

namespace llmcache {
namespace {

constexpr BankFormat kFormats[] = {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16,
                                   BankFormat::kInt8};

at::Tensor normal(at::IntArrayRef sizes, std::uint64_t seed = 1) {
  at::manual_seed(seed);
  return at::randn(sizes);
}

/// The largest rounding of one value of `states`.
at::Tensor rounding(const at::Tensor& states, BankFormat format, std::int64_t group) {
  switch (format) {
    case BankFormat::kBFloat16:
      return states.abs() * 0x1p-8;
    case BankFormat::kFloat16:
      return states.abs() * 0x1p-11 + 1e-7;
    case BankFormat::kInt8: {
      std::vector<at::Tensor> parts;
      for (const at::Tensor& part : states.split(group, -1)) {
        parts.push_back(part.abs().amax(-1, true).expand_as(part) * (1.0001 / 254));
      }
      return at::cat(parts, -1);
    }
    case BankFormat::kAsComputed:
      break;
  }
  return at::zeros_like(states);
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& tolerance) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const at::Tensor beyond = (actual.to(at::kFloat) - expected.to(at::kFloat)).abs() - tolerance;
  EXPECT_LE(beyond.max().item<float>(), 0);
}

struct Layout {
  std::vector<std::int64_t> sizes;
  std::int64_t token_dim, group;
};

/// Keys, hidden states, several sequences, last dimensions that no group divides, one value, no head dimension.
const std::vector<Layout> kLayouts = {{{1, 12, 37, 64}, 2, 32}, {{1, 37, 768}, 1, 32}, {{2, 3, 9, 40}, 2, 32},
                                      {{1, 4, 11, 8}, 2, 32},   {{5, 1}, 0, 32},       {{3, 7, 2, 50}, 0, 16},
                                      {{1, 9, 4, 64}, 1, 32}};

TEST(StoredStates, LoseNoMoreThanTheirRounding) {
  for (const Layout& layout : kLayouts) {
    const at::Tensor states = normal(layout.sizes) * 5;
    for (const BankFormat format : kFormats) {
      SCOPED_TRACE(std::string(to_string(format)) + " " + std::to_string(states.numel()));
      const StoredStates stored = StoredStates::encode(states, layout.token_dim, format, layout.group);
      const at::Tensor decoded = stored.decode();
      EXPECT_EQ(decoded.scalar_type(), at::kFloat);
      expect_close(decoded, states, rounding(states, format, layout.group));
      EXPECT_EQ(stored.tokens(), layout.sizes[static_cast<std::size_t>(layout.token_dim)]);
    }
  }
}

TEST(StoredStates, AsComputedIsExactInAnyType) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
    const at::Tensor states = normal({1, 3, 5, 64}).to(type);
    const StoredStates stored = StoredStates::encode(states, 2, BankFormat::kAsComputed);
    EXPECT_TRUE(at::equal(stored.decode(), states));
    EXPECT_EQ(stored.decode().scalar_type(), type);
    EXPECT_EQ(stored.relative_error(states), 0);
    EXPECT_FALSE(stored.decode().is_alias_of(states));
  }
}

TEST(StoredStates, TakeWhatTheySay) {
  const at::Tensor states = normal({1, 12, 100, 64});
  const auto full = static_cast<double>(states.nbytes());
  for (const BankFormat format : kFormats) {
    const StoredStates stored = StoredStates::encode(states, 2, format);
    EXPECT_EQ(static_cast<double>(stored.bytes()), bytes_per_value(format, 4) * static_cast<double>(states.numel()));
    EXPECT_EQ(stored.bytes(), StoredStates::bytes_for(states.sizes(), states.options(), format));
  }
  EXPECT_LE(static_cast<double>(StoredStates::encode(states, 2, BankFormat::kInt8).bytes()), 0.3 * full);
  const at::Tensor odd = normal({1, 3, 10, 40});
  EXPECT_EQ(StoredStates::encode(odd, 2, BankFormat::kInt8).bytes(),
            StoredStates::bytes_for(odd.sizes(), odd.options(), BankFormat::kInt8));
  EXPECT_EQ(StoredStates::bytes_for({1, 0, 64}, odd.options(), BankFormat::kInt8), 0U);
}

TEST(StoredStates, Int8ErrorOfNormalStatesIsSmall) {
  const at::Tensor states = normal({1, 12, 200, 64});
  const double error = StoredStates::encode(states, 2, BankFormat::kInt8).relative_error(states);
  EXPECT_LE(error, 0.007);
  EXPECT_GE(error, 0.003);  // measured, not assumed
  const at::Tensor decoded = StoredStates::encode(states, 2, BankFormat::kInt8).decode();
  EXPECT_NEAR(error, ((decoded - states).norm() / states.norm()).item<double>(), 1e-6);
}

TEST(StoredStates, CopyTokensIntoAnyView) {
  for (const Layout& layout : kLayouts) {
    const at::Tensor states = normal(layout.sizes);
    const std::int64_t tokens = layout.sizes[static_cast<std::size_t>(layout.token_dim)];
    std::vector<std::int64_t> one = layout.sizes;
    one[static_cast<std::size_t>(layout.token_dim)] = 1;
    const at::Tensor shift = normal(one, 2);
    for (const BankFormat format : kFormats) {
      const StoredStates stored = StoredStates::encode(states, layout.token_dim, format, layout.group);
      for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) {
        for (const bool shifted : {false, true}) {
          SCOPED_TRACE(std::string(to_string(format)) + ' ' + c10::toString(type) + (shifted ? " shifted" : ""));
          // Tokens 1 .. tokens - 1 into the middle of a longer tensor, whose tokens come first in memory.
          std::vector<std::int64_t> sizes = layout.sizes;
          sizes[static_cast<std::size_t>(layout.token_dim)] = tokens + 4;
          const at::Tensor longer =
              at::full(sizes, -9.0, type).transpose(0, layout.token_dim).contiguous().transpose(0, layout.token_dim);
          const at::Tensor target = longer.narrow(layout.token_dim, 2, tokens - 2);
          stored.copy_to(target, 1, shifted ? shift : at::Tensor());
          at::Tensor expected = stored.decode().narrow(layout.token_dim, 1, tokens - 2);
          if (shifted) expected = expected + shift;
          EXPECT_TRUE(at::equal(target, expected.to(type)));
          EXPECT_TRUE((longer.narrow(layout.token_dim, 0, 2) == -9).all().item<bool>());
          EXPECT_TRUE((longer.narrow(layout.token_dim, tokens, 4) == -9).all().item<bool>());
        }
      }
    }
  }
}

TEST(StoredStates, ShiftOfOneNumberOrOneRowBroadcasts) {
  const StoredStates stored = StoredStates::encode(normal({1, 2, 6, 64}), 2, BankFormat::kInt8);
  at::Tensor target = at::empty({1, 2, 6, 64});
  stored.copy_to(target, 0, at::full({1}, 2.5));
  EXPECT_TRUE(at::equal(target, stored.decode() + 2.5));
  const at::Tensor row = normal({64}, 3);
  stored.copy_to(target, 0, row);
  EXPECT_TRUE(at::equal(target, stored.decode() + row));
}

TEST(StoredStates, WriteInPlaceFillsWhatEncodeWould) {
  for (const Layout& layout : kLayouts) {
    const at::Tensor states = normal(layout.sizes);
    const std::int64_t tokens = layout.sizes[static_cast<std::size_t>(layout.token_dim)];
    for (const BankFormat format : kFormats) {
      const StoredStates whole = StoredStates::encode(states, layout.token_dim, format, layout.group);
      StoredStates grown = StoredStates::empty(layout.sizes, layout.token_dim, states.options(), format, layout.group);
      for (std::int64_t begin = 0; begin < tokens; begin += 2) {
        const std::int64_t count = std::min<std::int64_t>(2, tokens - begin);
        grown.write(begin, states.narrow(layout.token_dim, begin, count));
      }
      EXPECT_TRUE(at::equal(grown.decode(), whole.decode())) << to_string(format);
    }
  }
}

TEST(StoredStates, ReadsStatesInAnyOrderOfMemory) {
  const at::Tensor states = normal({1, 20, 12, 64}).transpose(1, 2);  // as attention has its keys
  const at::Tensor last = normal({1, 12, 64, 20}).transpose(2, 3);
  for (const BankFormat format : kFormats) {
    for (const at::Tensor& view : {states, last}) {
      EXPECT_TRUE(at::equal(StoredStates::encode(view, 2, format).decode(),
                            StoredStates::encode(view.contiguous(), 2, format).decode()));
    }
  }
}

TEST(StoredStates, KernelsAndAtenAgree) {
  const at::Tensor states =
      at::cat({normal({6, 80}), at::zeros({1, 80}), at::full({1, 80}, 1e-38),
               at::full({1, 80}, std::numeric_limits<float>::infinity()), normal({1, 80}) * 1e30});
  const auto [values, scales] = detail::quantise(states, 32);
  std::vector<std::int8_t> kernel_values(80);
  std::vector<float> kernel_scales(3);
  std::vector<float> row(80);
  for (std::int64_t i = 0; i < states.size(0); ++i) {
    detail::quantise_row(states[i].const_data_ptr<float>(), kernel_values.data(), kernel_scales.data(), 80, 32);
    EXPECT_TRUE(at::equal(values[i], at::tensor(kernel_values, at::kChar))) << i;
    EXPECT_TRUE(at::allclose(scales[i], at::tensor(kernel_scales), 0, 0, true)) << i;
    detail::dequantise_row(kernel_values.data(), kernel_scales.data(), nullptr, row.data(), 80, 32);
    EXPECT_TRUE(at::allclose(detail::dequantise(values[i], scales[i], 32), at::tensor(row), 0, 0, true)) << i;
  }
}

TEST(StoredStates, WhatIsNotFiniteStaysSo) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    at::Tensor states = normal({1, 4, 96});
    states[0][2][40] = bad;
    for (const BankFormat format : kFormats) {
      const at::Tensor finite = StoredStates::encode(states, 1, format).decode().isfinite();
      EXPECT_FALSE(finite[0][2][40].item<bool>()) << to_string(format);
      EXPECT_TRUE(finite[0][1].all().item<bool>());
      EXPECT_TRUE(finite[0][2].narrow(0, 64, 32).all().item<bool>());  // the group beside
    }
  }
}

TEST(StoredStates, ExtremesKeepTheirSign) {
  at::Tensor states = at::zeros({1, 2, 32});
  states[0][0][0] = 3e38;
  states[0][0][1] = -3e38;
  const at::Tensor decoded = StoredStates::encode(states, 1, BankFormat::kInt8).decode();
  expect_close(decoded, states, states.abs() * 1e-6);
  EXPECT_TRUE((decoded[0][1] == 0).all().item<bool>());
}

TEST(StoredStates, HalfModels) {
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const at::Tensor states = normal({1, 4, 21, 64}).to(type);
    const StoredStates stored = StoredStates::encode(states, 2, BankFormat::kInt8);
    EXPECT_EQ(stored.decode().scalar_type(), type);
    expect_close(stored.decode(), states,
                 rounding(states.to(at::kFloat), BankFormat::kInt8, 32) + states.abs().to(at::kFloat) * 0x1p-8);
  }
}

TEST(StoredStates, EmptyRangesAndNoTokens) {
  for (const BankFormat format : kFormats) {
    const StoredStates none = StoredStates::encode(at::empty({1, 2, 0, 64}), 2, format);
    EXPECT_EQ(none.bytes(), 0U);
    EXPECT_EQ(none.decode().size(2), 0);
    const StoredStates some = StoredStates::encode(normal({1, 2, 3, 64}), 2, format);
    some.copy_to(at::empty({1, 2, 0, 64}), 3);
  }
}

TEST(StoredStates, RefusesWhatDoesNotFit) {
  const at::Tensor states = normal({1, 2, 6, 64});
  const StoredStates stored = StoredStates::encode(states, 2, BankFormat::kInt8);
  expect_error(ErrorCode::kInvalidOptions, "token_dim is 3",
               [&] { StoredStates::encode(states, 3, BankFormat::kInt8); });
  expect_error(ErrorCode::kInvalidOptions, "group is 0",
               [&] { StoredStates::encode(states, 2, BankFormat::kInt8, 0); });
  expect_error(ErrorCode::kInvalidInput, "type Long",
               [&] { StoredStates::encode(states.to(at::kLong), 2, BankFormat::kInt8); });
  expect_error(ErrorCode::kInvalidInput, "from token 1", [&] { stored.copy_to(at::empty({1, 2, 6, 64}), 1); });
  expect_error(ErrorCode::kInvalidInput, "from token -1", [&] { stored.copy_to(at::empty({1, 2, 1, 64}), -1); });
  expect_error(ErrorCode::kInvalidInput, "sizes [1, 3, 6, 64]", [&] { stored.copy_to(at::empty({1, 3, 6, 64}), 0); });
  expect_error(ErrorCode::kInvalidInput, "stride 2", [&] {
    stored.copy_to(at::empty({1, 2, 6, 128}).slice(3, 0, 128, 2), 0);
  });
  expect_error(ErrorCode::kInvalidInput, "the shift has sizes [1, 2, 6, 64]", [&] {
    stored.copy_to(at::empty({1, 2, 6, 64}), 0, at::zeros({1, 2, 6, 64}));
  });
  StoredStates room = stored;
  expect_error(ErrorCode::kInvalidInput, "from token 5", [&] { room.write(5, normal({1, 2, 2, 64})); });
  expect_error(ErrorCode::kInvalidInput, "does not fit", [&] { StoredStates().copy_to(states, 0); });
}

TEST(BankFormat, Names) {
  for (const BankFormat format : kFormats) EXPECT_EQ(bank_format_from_string(to_string(format)), format);
  expect_error(ErrorCode::kInvalidOptions, "'int4' is no bank format", [] { bank_format_from_string("int4"); });
}

}  // namespace
}  // namespace llmcache
