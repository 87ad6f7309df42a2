#include "model/row_kernels.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <type_traits>

// The loops below are compiled for several instruction sets, the best of which is chosen when they run.
#if defined(__x86_64__) && defined(__GNUC__)
#define LLMCACHE_ROWS_FOR(instructions) [[gnu::target(instructions)]]
#define LLMCACHE_ROWS_HAVE_TARGETS 1
#else
#define LLMCACHE_ROWS_HAVE_TARGETS 0
#endif
#if defined(__GNUC__)
#define LLMCACHE_ROWS_INLINE [[gnu::always_inline]] inline
#else
#define LLMCACHE_ROWS_INLINE inline
#endif
#if defined(__clang__)
#define LLMCACHE_ROWS_APART _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LLMCACHE_ROWS_APART _Pragma("GCC ivdep")
#else
#define LLMCACHE_ROWS_APART
#endif

namespace llmcache {
namespace {

/// Added to a float below 2^22 in magnitude, it leaves the nearest integer in the lowest bits.
constexpr float kRounder = 12582912.0F;
/// Below this a row is nothing but zeros: the reciprocal of its scale has to be finite.
constexpr float kSmallest = 1e-30F;
/// The same where columns are multiplied apart, by what is divided by the row's scale.
constexpr float kSmallestBeside = 127e-12F;

LLMCACHE_ROWS_INLINE float exponential(float x) {
  x = x < -87.0F ? -87.0F : x;
  x = x > 88.0F ? 88.0F : x;
  const float shifted = x * 1.44269504F + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln 2 in two parts
  float series = 1.9875691500e-4F;
  series = series * r + 1.3981999507e-3F;
  series = series * r + 8.3334519073e-3F;
  series = series * r + 4.1665795894e-2F;
  series = series * r + 1.6666665459e-1F;
  series = series * r + 5.0000001201e-1F;
  series = series * r * r + r + 1.0F;
  const auto exponent = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRounder);
  return series * std::bit_cast<float>((exponent + 127) << 23);
}

/// x times the normal distribution's mass below x, by the series 7.1.26 of Abramowitz and Stegun: off by 1e-7 at most.
LLMCACHE_ROWS_INLINE float gelu(float x) {
  float z = (x < 0 ? -x : x) * 0.707106781F;
  z = z > 10.0F ? 10.0F : z;  // nothing is left of the other side's mass from here on
  const float t = 1.0F / (1.0F + 0.3275911F * z);
  float series = 1.061405429F;
  series = series * t - 1.453152027F;
  series = series * t + 1.421413741F;
  series = series * t - 0.284496736F;
  series = series * t + 0.254829592F;
  const float other = 0.5F * series * t * exponential(-z * z);
  return x * (x < 0 ? other : 1.0F - other);
}

template <Activation kActivation>
LLMCACHE_ROWS_INLINE float activated(float x) {
  switch (kActivation) {
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kSilu:
      return x / (1.0F + exponential(-x));
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return x / (1.0F + exponential(-1.59576912F * (x + 0.044715F * x * x * x)));
    default:
      return x;
  }
}

LLMCACHE_ROWS_INLINE float to_float(float x) { return x; }
LLMCACHE_ROWS_INLINE float to_float(at::BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.x) << 16);
}

template <class T>
LLMCACHE_ROWS_INLINE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {  // to the nearest, of two to the even one; what is not a number stays none
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const auto rounded = (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16;
    return at::BFloat16(static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded), at::BFloat16::from_bits());
  }
}

/// Quantises one row. `factors` is read only if it has them.
template <bool kFactors>
struct Quantise {
  template <class T>
  LLMCACHE_ROWS_INLINE static float at(const T* from, const float* factors, std::int64_t c) {
    if constexpr (kFactors) return to_float(from[c]) * factors[c];
    return to_float(from[c]);
  }

  template <class T>
  LLMCACHE_ROWS_INLINE static void run(const T* from, const float* factors, std::int64_t columns, std::int8_t* to,
                                       float* scale) {
    std::int32_t bits = 0;  // of the largest magnitude: they are in the order of the numbers
    for (std::int64_t c = 0; c < columns; ++c) {
      const auto own = std::bit_cast<std::int32_t>(at(from, factors, c)) & std::numeric_limits<std::int32_t>::max();
      bits = own > bits ? own : bits;
    }
    float largest = std::bit_cast<float>(bits);
    const bool finite = largest <= std::numeric_limits<float>::max();
    if constexpr (kFactors) largest = largest < kSmallestBeside ? kSmallestBeside : largest;
    const float steps = finite && largest >= kSmallest ? 127.0F / largest : 0.0F;
    *scale = finite ? largest / 127.0F : std::numeric_limits<float>::quiet_NaN();
    LLMCACHE_ROWS_APART
    for (std::int64_t c = 0; c < columns; ++c) {
      to[c] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(at(from, factors, c) * steps + kRounder));
    }
  }
};

/// Adds eight multiples of a matrix's rows to each of four rows. Always four, so that a row becomes the same whatever
/// is beside it: another number would be other code, and might round in another way.
struct AddEight {
  static constexpr std::int64_t kRows = 4;

  /// Multiples of a row stand `stride` behind those of the one before, rows of the matrix `width`.
  LLMCACHE_ROWS_INLINE static void run(const float* by, std::int64_t stride, const float* matrix, std::int64_t width,
                                       std::int64_t columns, float* const* to) {
    float* const first = to[0];
    float* const second = to[1];
    float* const third = to[2];
    float* const fourth = to[3];
    LLMCACHE_ROWS_APART
    for (std::int64_t c = 0; c < columns; ++c) {
      float sums[kRows] = {first[c], second[c], third[c], fourth[c]};
      for (std::int64_t k = 0; k < 8; ++k) {
        const float weight = matrix[k * width + c];
        for (std::int64_t r = 0; r < kRows; ++r) sums[r] += by[r * stride + k] * weight;
      }
      first[c] = sums[0];
      second[c] = sums[1];
      third[c] = sums[2];
      fourth[c] = sums[3];
    }
  }
};

/// What finishes one row; null pointers are left out.
template <class Product, class Result>
struct Row {
  const Product* product;
  float scale;
  const float* bias;
  const Result* residual;
  Result* result;
  std::int64_t columns;
};

template <Activation kActivation, bool kBias, bool kResidual>
struct FinishRow {
  template <class R>
  LLMCACHE_ROWS_INLINE static void run(const R* row) {
    const auto* product = row->product;
    const auto* bias = row->bias;
    const auto* residual = row->residual;
    auto* result = row->result;
    const float scale = row->scale;
    const auto columns = row->columns;
    LLMCACHE_ROWS_APART  // or in place: each element goes where it came from
        for (std::int64_t c = 0; c < columns; ++c) {
      float x = to_float(product[c]) * scale;
      if constexpr (kBias) x += to_float(bias[c]);
      x = activated<kActivation>(x);
      if constexpr (kResidual) x += to_float(residual[c]);
      result[c] = from_float<std::remove_reference_t<decltype(result[c])>>(x);
    }
  }
};

#if LLMCACHE_ROWS_HAVE_TARGETS
template <class Body, class... Arguments>
LLMCACHE_ROWS_FOR("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
void run_avx512(Arguments... arguments) {
  Body::run(arguments...);
}

template <class Body, class... Arguments>
LLMCACHE_ROWS_FOR("avx2,fma")
void run_avx2(Arguments... arguments) {
  Body::run(arguments...);
}
#endif

template <class Body, class... Arguments>
void run_anywhere(Arguments... arguments) {
  Body::run(arguments...);
}

/// Body::run(arguments...), as compiled for the best instructions that this CPU has.
template <class Body, class... Arguments>
void run_best(Arguments... arguments) {
#if LLMCACHE_ROWS_HAVE_TARGETS
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("fma");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return run_avx512<Body>(arguments...);
  if (avx2) return run_avx2<Body>(arguments...);
#endif
  run_anywhere<Body>(arguments...);
}

template <Activation kActivation, class R>
void finish_activated(const R* row) {
  if (row->bias != nullptr && row->residual != nullptr) {
    run_best<FinishRow<kActivation, true, true>>(row);
  } else if (row->bias != nullptr) {
    run_best<FinishRow<kActivation, true, false>>(row);
  } else if (row->residual != nullptr) {
    run_best<FinishRow<kActivation, false, true>>(row);
  } else {
    run_best<FinishRow<kActivation, false, false>>(row);
  }
}

template <class R>
void finish_row(Activation activation, const R& row) {
  switch (activation) {
    case Activation::kNone:
      return finish_activated<Activation::kNone>(&row);
    case Activation::kRelu:
      return finish_activated<Activation::kRelu>(&row);
    case Activation::kSilu:
      return finish_activated<Activation::kSilu>(&row);
    case Activation::kGelu:
      return finish_activated<Activation::kGelu>(&row);
    case Activation::kGeluTanh:
      return finish_activated<Activation::kGeluTanh>(&row);
  }
}

template <class T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <class Product, class Result>
void finish_all(const at::Tensor& product, const Finish& finish, const at::Tensor& result) {
  const auto columns = product.size(1);
  const auto* from = product.const_data_ptr<Product>();
  auto* to = result.mutable_data_ptr<Result>();
  const auto* residual = data_or_null<Result>(finish.residual);
  const auto* scales = data_or_null<float>(finish.row_scales);
  const bool wide = finish.bias.defined() && finish.bias.scalar_type() != at::kFloat;
  const at::Tensor bias = wide ? finish.bias.to(at::kFloat) : finish.bias;
  for (std::int64_t r = 0; r < product.size(0); ++r) {
    const auto at = r * columns;
    finish_row(finish.activation,
               Row<Product, Result>{from + at, scales != nullptr ? scales[r] : 1.0F, data_or_null<float>(bias),
                                    residual != nullptr ? residual + at : nullptr, to + at, columns});
  }
}

template <class T>
void quantise_all(const T* from, const at::Tensor& factors, std::int64_t columns, const QuantisedRows& to) {
  auto* values = to.values.mutable_data_ptr<std::int8_t>();
  auto* scales = to.scales.mutable_data_ptr<float>();
  const auto* own = data_or_null<float>(factors);
  for (std::int64_t r = 0; r < to.scales.size(0); ++r) {
    const auto at = r * columns;
    if (own != nullptr) {
      run_best<Quantise<true>>(from + at, own, columns, values + at, scales + r);
    } else {
      run_best<Quantise<false>>(from + at, own, columns, values + at, scales + r);
    }
  }
}

}  // namespace

QuantisedRows quantise_rows(const at::Tensor& rows, std::int64_t room, RowBytes bytes, const at::Tensor& factors) {
  const auto columns = rows.size(1);
  QuantisedRows made{at::empty({room, columns}, rows.options().dtype(at::kChar)),
                     at::empty({rows.size(0)}, rows.options().dtype(at::kFloat))};
  if (rows.scalar_type() == at::kFloat) {
    quantise_all(rows.const_data_ptr<float>(), factors, columns, made);
  } else {
    quantise_all(rows.const_data_ptr<at::BFloat16>(), factors, columns, made);
  }
  made.values.narrow(0, rows.size(0), room - rows.size(0)).zero_();
  if (bytes == RowBytes::kShifted) {
    constexpr unsigned kSign = 0x80;  // adds 128, or takes it away: the same bits
    made.values = made.values.view(at::kByte);
    auto* shifted = made.values.mutable_data_ptr<std::uint8_t>();
    std::transform(shifted, shifted + room * columns, shifted,
                   [](unsigned value) { return static_cast<std::uint8_t>(value ^ kSign); });
  }
  return made;
}

void add_columns(const at::Tensor& product, const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& columns,
                 const at::Tensor& weights) {
  constexpr std::int64_t kAtOnce = 8;
  constexpr std::int64_t kBlock = 512;  // columns whose weights stay in the nearest cache
  const auto count = columns.size(0);
  const auto out = weights.size(1);
  const auto missing = (AddEight::kRows - rows.size(0) % AddEight::kRows) % AddEight::kRows;
  const auto chosen = at::zeros({rows.size(0) + missing, count}, scales.options());
  auto real = chosen.narrow(0, 0, rows.size(0));
  at::div_out(real, rows.index_select(1, columns).to(at::kFloat), scales.unsqueeze(1));
  const auto* by = chosen.const_data_ptr<float>();
  const auto* matrix = weights.const_data_ptr<float>();
  auto* to = product.mutable_data_ptr<float>();
  std::array<std::array<float, kBlock>, AddEight::kRows> nowhere{};  // what rows that there are not become
  for (std::int64_t r = 0; r < chosen.size(0); r += AddEight::kRows) {
    for (std::int64_t c = 0; c < out; c += kBlock) {
      std::array<float*, AddEight::kRows> own{};
      for (std::int64_t i = 0; i < AddEight::kRows; ++i) {
        const auto at = static_cast<std::size_t>(i);
        own[at] = r + i < rows.size(0) ? to + (r + i) * out + c : nowhere[at].data();
      }
      for (std::int64_t k = 0; k < count; k += kAtOnce) {
        run_best<AddEight>(by + r * count + k, count, matrix + k * out + c, out, std::min(kBlock, out - c), own.data());
      }
    }
  }
}

at::Tensor finish_rows(const at::Tensor& product, const Finish& finish, at::ScalarType type) {
  const bool wide = type == at::kFloat;
  if (product.scalar_type() == at::kFloat) {
    const auto result = wide ? product : at::empty(product.sizes(), product.options().dtype(type));
    wide ? finish_all<float, float>(product, finish, result) : finish_all<float, at::BFloat16>(product, finish, result);
    return result;
  }
  const auto result = wide ? at::empty(product.sizes(), product.options().dtype(type)) : product;
  wide ? finish_all<at::BFloat16, float>(product, finish, result)
       : finish_all<at::BFloat16, at::BFloat16>(product, finish, result);
  return result;
}

}  // namespace llmcache
