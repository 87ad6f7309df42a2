#include "model/weight_panels.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define LLMCACHE_PANELS_HAVE_AVX2 1
#define LLMCACHE_PANELS_AVX2 [[gnu::target("avx2,fma,f16c")]]
#else
#define LLMCACHE_PANELS_HAVE_AVX2 0
#endif

namespace llmcache {
namespace {

constexpr std::int64_t kOutputs = 16;    ///< of a panel
constexpr std::int64_t kRowsAtOnce = 6;  ///< rows whose sums the registers of AVX2 hold

/// A product of some rows and some panels, one behind the other.
template <class Value, class Weight>
struct Block {
  const Value* rows;
  std::int64_t stride;  ///< from row to row
  const Weight* panels;
  std::int64_t in;
  const float* scales;  ///< of the panels' outputs; null: none
  float* to;
  std::int64_t to_stride;
};

/// Rows of whole numbers are widened to 16 bits once, for all panels.
using Int8Block = Block<std::int16_t, std::int8_t>;

/// The value of one weight of a panel. Int8: pairs of inputs of each output. BFloat16: the outputs j and j + 8 beside
/// each other, so that both are had from 32 bits without moving them. Half: the outputs in order.
std::int32_t weight_of(const std::int8_t* panel, std::int64_t input, std::int64_t output) {
  return panel[input / 2 * 2 * kOutputs + 2 * output + input % 2];
}
float weight_of(const at::BFloat16* panel, std::int64_t input, std::int64_t output) {
  const auto bits = panel[input * kOutputs + output % 8 * 2 + output / 8].x;
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

float weight_of(const at::Half* panel, std::int64_t input, std::int64_t output) {
  return static_cast<float>(panel[input * kOutputs + output]);
}

/// With one panel. One row by the other, so that each is the same whatever their number.
template <class B>
void multiply_anywhere(const B& block, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) {
    using Sum = decltype(weight_of(block.panels, 0, 0));
    std::array<Sum, kOutputs> sums{};
    for (std::int64_t k = 0; k < block.in; ++k) {
      const Sum x = block.rows[r * block.stride + k];
      for (std::int64_t o = 0; o < kOutputs; ++o) {
        sums[static_cast<std::size_t>(o)] += x * weight_of(block.panels, k, o);
      }
    }
    for (std::int64_t o = 0; o < kOutputs; ++o) {
      const auto sum = static_cast<float>(sums[static_cast<std::size_t>(o)]);
      block.to[r * block.to_stride + o] = block.scales != nullptr ? sum * block.scales[o] : sum;
    }
  }
}

#if LLMCACHE_PANELS_HAVE_AVX2
/// The sums of 16 outputs of one row.
struct FloatSums {
  __m256 low;
  __m256 high;
};
struct WholeSums {
  __m256i low;
  __m256i high;
};

LLMCACHE_PANELS_AVX2 inline void clear(FloatSums& sums) { sums.low = sums.high = _mm256_setzero_ps(); }
LLMCACHE_PANELS_AVX2 inline void clear(WholeSums& sums) { sums.low = sums.high = _mm256_setzero_si256(); }

LLMCACHE_PANELS_AVX2 inline void store(const FloatSums& sums, const float* scales, float* to) {
  const bool scaled = scales != nullptr;
  _mm256_storeu_ps(to, scaled ? _mm256_mul_ps(sums.low, _mm256_loadu_ps(scales)) : sums.low);
  _mm256_storeu_ps(to + 8, scaled ? _mm256_mul_ps(sums.high, _mm256_loadu_ps(scales + 8)) : sums.high);
}
LLMCACHE_PANELS_AVX2 inline void store(const WholeSums& sums, const float* scales, float* to) {
  store(FloatSums{_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}, scales, to);
}

/// How products with weights of one type are made: `kStep` inputs at once.
struct OfInt8 {
  using Sums = WholeSums;
  using Weights = WholeSums;
  static constexpr std::int64_t kStep = 2;

  LLMCACHE_PANELS_AVX2 static Weights load(const std::int8_t* from) {
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
  }
  /// Products of 16 bits, added in pairs to 32 bits: nothing overflows, unlike pairs of 8 bits that are added to 16.
  LLMCACHE_PANELS_AVX2 static void add(const std::int16_t* x, const Weights& weights, WholeSums& sums) {
    std::int32_t pair = 0;
    std::memcpy(&pair, x, sizeof(pair));
    const __m256i both = _mm256_set1_epi32(pair);
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(both, weights.low));
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(both, weights.high));
  }
};

struct OfFloats {
  using Sums = FloatSums;
  using Weights = FloatSums;
  static constexpr std::int64_t kStep = 1;

  LLMCACHE_PANELS_AVX2 static Weights load(const at::BFloat16* from) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i upper = _mm256_set1_epi32(static_cast<std::int32_t>(0xffff0000U));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(_mm256_and_si256(both, upper))};
  }
  LLMCACHE_PANELS_AVX2 static Weights load(const at::Half* from) {
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  LLMCACHE_PANELS_AVX2 static void add(const float* x, const Weights& weights, FloatSums& sums) {
    const __m256 value = _mm256_broadcast_ss(x);
    sums.low = _mm256_fmadd_ps(value, weights.low, sums.low);
    sums.high = _mm256_fmadd_ps(value, weights.high, sums.high);
  }
};

template <class B>
using WaysOf = std::conditional_t<std::is_same_v<B, Int8Block>, OfInt8, OfFloats>;

/// Sums of kRows * kPanels stay in registers. Each is made in the order of the inputs, whatever is beside it.
template <std::int64_t kRows, std::int64_t kPanels, class B>
LLMCACHE_PANELS_AVX2 void multiply_avx2(const B& block) {
  using Ways = WaysOf<B>;
  typename Ways::Sums sums[kRows][kPanels];
  for (auto& row : sums) {
    for (auto& own : row) clear(own);
  }
  for (std::int64_t k = 0; k < block.in; k += Ways::kStep) {
    for (std::int64_t p = 0; p < kPanels; ++p) {
      const auto weights = Ways::load(block.panels + (p * block.in + k) * kOutputs);
      for (std::int64_t r = 0; r < kRows; ++r) Ways::add(block.rows + r * block.stride + k, weights, sums[r][p]);
    }
  }
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t p = 0; p < kPanels; ++p) {
      const float* scales = block.scales != nullptr ? block.scales + p * kOutputs : nullptr;
      store(sums[r][p], scales, block.to + r * block.to_stride + p * kOutputs);
    }
  }
}

/// Several panels with few rows: one sum has to wait for the one before.
template <class B>
void multiply_avx2(const B& block, std::int64_t rows, std::int64_t panels) {
  if (panels == 4) return multiply_avx2<1, 4>(block);
  if (panels == 2) return rows == 3 ? multiply_avx2<3, 2>(block) : multiply_avx2<2, 2>(block);
  switch (rows) {
    case 1:
      return multiply_avx2<1, 1>(block);
    case 2:
      return multiply_avx2<2, 1>(block);
    case 3:
      return multiply_avx2<3, 1>(block);
    case 4:
      return multiply_avx2<4, 1>(block);
    case 5:
      return multiply_avx2<5, 1>(block);
    default:
      return multiply_avx2<kRowsAtOnce, 1>(block);
  }
}

bool has_avx2() {
  static const bool has = [] {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;  // Clang's __builtin_cpu_supports() knows no F16C
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) != 0 &&
           (c & bit_F16C) != 0;
  }();
  return has;
}
#endif

/// How many panels are multiplied at once with so many rows.
std::int64_t panels_at_once(std::int64_t rows) {
#if LLMCACHE_PANELS_HAVE_AVX2
  if (rows == 1) return 4;
  if (rows <= 3) return 2;
#endif
  return 1;
}

/// At most kRowsAtOnce rows.
template <class B>
void multiply_block(const B& block, std::int64_t rows, std::int64_t panels) {
#if LLMCACHE_PANELS_HAVE_AVX2
  if (has_avx2()) return multiply_avx2(block, rows, panels);
#endif
  for (std::int64_t p = 0; p < panels; ++p) {
    auto own = block;
    own.panels += p * block.in * kOutputs;
    own.to += p * kOutputs;
    if (own.scales != nullptr) own.scales += p * kOutputs;
    multiply_anywhere(own, rows);
  }
}

/// The same with the last panel, of which there are `width` outputs.
template <class B>
void multiply_cut(const B& block, std::int64_t rows, std::int64_t width) {
  std::array<float, kRowsAtOnce * kOutputs> sums{};
  std::array<float, kOutputs> scales{};
  B own = block;
  own.to = sums.data();
  own.to_stride = kOutputs;
  if (block.scales != nullptr) own.scales = (std::copy_n(block.scales, width, scales.begin()), scales.data());
  multiply_block(own, rows, 1);
  for (std::int64_t r = 0; r < rows; ++r)
    std::copy_n(sums.data() + r * kOutputs, width, block.to + r * block.to_stride);
}

/// The panels from `begin` to `end` with all rows.
template <class Value, class Weight>
void multiply_panels(const at::Tensor& rows, const at::Tensor& panels, const float* scales, const at::Tensor& result,
                     std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kRowBytes = std::int64_t{192} << 10;  // rows that stay in the second cache
  const auto in = rows.size(1);
  const auto out = result.size(1);
  const auto bytes = in * static_cast<std::int64_t>(sizeof(Value));
  const auto chunk = std::max(kRowBytes / (bytes * kRowsAtOnce), std::int64_t{1}) * kRowsAtOnce;
  for (std::int64_t first = 0; first < rows.size(0); first += chunk) {
    const auto last = std::min(first + chunk, rows.size(0));
    std::int64_t step = 1;
    for (std::int64_t p = begin; p < end; p += step) {
      step = panels_at_once(rows.size(0));
      if (p + step > end || (p + step) * kOutputs > out) step = 1;
      const auto width = std::min(kOutputs, out - p * kOutputs);
      for (std::int64_t r = first; r < last; r += kRowsAtOnce) {
        const Block<Value, Weight> block{rows.const_data_ptr<Value>() + r * in,
                                         in,
                                         panels.const_data_ptr<Weight>() + p * in * kOutputs,
                                         in,
                                         scales != nullptr ? scales + p * kOutputs : nullptr,
                                         result.mutable_data_ptr<float>() + r * out + p * kOutputs,
                                         out};
        const auto count = std::min(kRowsAtOnce, last - r);
        width < kOutputs ? multiply_cut(block, count, width) : multiply_block(block, count, step);
      }
    }
  }
}

}  // namespace

WeightPanels::WeightPanels(const at::Tensor& weight) : out_(weight.size(0)), in_(weight.size(1)) {
  const bool int8 = weight.scalar_type() == at::kChar;
  const bool half = weight.scalar_type() == at::kHalf;
  TORCH_INTERNAL_ASSERT(weight.device().is_cpu() && (int8 || half || weight.scalar_type() == at::kBFloat16));
  TORCH_INTERNAL_ASSERT(!int8 || in_ <= kMostInt8Inputs);
  const auto panels = (out_ + kOutputs - 1) / kOutputs;
  if (int8) in_ += in_ % 2;
  at::Tensor filled = weight;
  if (weight.size(0) != panels * kOutputs || weight.size(1) != in_) {
    filled = at::constant_pad_nd(weight, {0, in_ - weight.size(1), 0, panels * kOutputs - out_});
  }
  if (int8) {
    panels_ = filled.reshape({panels, kOutputs, in_ / 2, 2}).permute({0, 2, 1, 3}).clone(at::MemoryFormat::Contiguous);
  } else if (half) {
    panels_ = filled.reshape({panels, kOutputs, in_}).permute({0, 2, 1}).clone(at::MemoryFormat::Contiguous);
  } else {
    panels_ = filled.reshape({panels, 2, kOutputs / 2, in_}).permute({0, 3, 2, 1}).clone(at::MemoryFormat::Contiguous);
  }
}

bool WeightPanels::suit_the_cpu() noexcept {
#if LLMCACHE_PANELS_HAVE_AVX2
  return has_avx2() && !__builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

at::Tensor WeightPanels::multiply(const at::Tensor& rows, const at::Tensor& scales) const {
  constexpr std::int64_t kWorthAThread = std::int64_t{1} << 18;  // products
  const bool int8 = panels_.scalar_type() == at::kChar;
  at::Tensor given = rows;
  if (int8) {
    given = rows.size(1) == in_ ? rows.to(at::kShort) : at::constant_pad_nd(rows.to(at::kShort), {0, 1});
  }
  const auto result = at::empty({rows.size(0), out_}, rows.options().dtype(at::kFloat));
  const float* own = scales.defined() ? scales.const_data_ptr<float>() : nullptr;
  const auto grain = std::max(kWorthAThread / (rows.size(0) * in_ * kOutputs), std::int64_t{1});
  at::parallel_for(0, panels_.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    if (int8) {
      multiply_panels<std::int16_t, std::int8_t>(given, panels_, own, result, begin, end);
    } else if (panels_.scalar_type() == at::kHalf) {
      multiply_panels<float, at::Half>(given, panels_, own, result, begin, end);
    } else {
      multiply_panels<float, at::BFloat16>(given, panels_, own, result, begin, end);
    }
  });
  return result;
}

}  // namespace llmcache
