#include "bank/group_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "fingerprint/kernels.h"

namespace llmcache::detail {
namespace {

constexpr std::int64_t kGroup = 32;  ///< the size of group that loops are unrolled for
constexpr float kMost = 127;
constexpr std::uint32_t kMagnitude = 0x7fffffffU;
constexpr std::uint32_t kInfinite = 0x7f800000U;

/// `size` is a constant where it is inlined with one.
LLMCACHE_ALWAYS_INLINE void quantise_group(const float* __restrict row, std::int8_t* __restrict values, float* scale,
                                           std::int64_t size) {
  // The magnitudes of floats are ordered as their bits are, and the greatest are not finite.
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(row[i]) & kMagnitude);
  }
  if (largest >= kInfinite) {
    std::fill_n(values, size, std::int8_t{0});
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float step = std::bit_cast<float>(largest) / kMost;
  const float inverse = step > 0 ? 1 / step : 0;
  *scale = step;
  if (!(inverse <= std::numeric_limits<float>::max())) {  // magnitudes below 1e-36
    std::fill_n(values, size, std::int8_t{0});
    return;
  }
  for (std::int64_t i = 0; i < size; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits. It is at most 127: the product is not above that by
    // more than its rounding.
    const float shifted = row[i] * inverse + 12582912.0F;
    values[i] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(shifted) - 0x4b400000);
  }
}

LLMCACHE_ALWAYS_INLINE void dequantise_group(const std::int8_t* __restrict values, float scale,
                                             const float* __restrict shift, float* __restrict row, std::int64_t size) {
  if (shift == nullptr) {
    for (std::int64_t i = 0; i < size; ++i) row[i] = static_cast<float>(values[i]) * scale;
  } else {
    for (std::int64_t i = 0; i < size; ++i) row[i] = static_cast<float>(values[i]) * scale + shift[i];
  }
}

LLMCACHE_ALWAYS_INLINE void quantise_body(const float* row, std::int8_t* values, float* scales, std::int64_t size,
                                          std::int64_t group) {
  std::int64_t i = 0;
  if (group == kGroup) {
    for (; i + kGroup <= size; i += kGroup) quantise_group(row + i, values + i, scales++, kGroup);
  } else {
    for (; i + group <= size; i += group) quantise_group(row + i, values + i, scales++, group);
  }
  if (i < size) quantise_group(row + i, values + i, scales, size - i);
}

LLMCACHE_ALWAYS_INLINE void dequantise_body(const std::int8_t* values, const float* scales, const float* shift,
                                            float* row, std::int64_t size, std::int64_t group) {
  std::int64_t i = 0;
  if (group == kGroup && shift == nullptr) {
    for (; i + kGroup <= size; i += kGroup) dequantise_group(values + i, *scales++, nullptr, row + i, kGroup);
  } else if (group == kGroup) {
    for (; i + kGroup <= size; i += kGroup) dequantise_group(values + i, *scales++, shift + i, row + i, kGroup);
  }
  for (; i < size; i += group) {
    dequantise_group(values + i, *scales++, shift == nullptr ? nullptr : shift + i, row + i, std::min(group, size - i));
  }
}

LLMCACHE_ALWAYS_INLINE float widened(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

LLMCACHE_ALWAYS_INLINE void widen_body(const std::uint16_t* __restrict values, const float* __restrict shift,
                                       float* __restrict row, std::int64_t size) {
  if (shift == nullptr) {
    for (std::int64_t i = 0; i < size; ++i) row[i] = widened(values[i]);
  } else {
    for (std::int64_t i = 0; i < size; ++i) row[i] = widened(values[i]) + shift[i];
  }
}

LLMCACHE_ALWAYS_INLINE void add_body(const float* __restrict values, const float* __restrict shift,
                                     float* __restrict row, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) row[i] = values[i] + shift[i];
}

// Each loop for any processor and with AVX2, which rounds alike: no multiplication and addition are fused.
#define LLMCACHE_BOTH(name, parameters, arguments)                \
  void name##_base parameters noexcept { name##_body arguments; } \
  LLMCACHE_TARGET("avx2") void name##_avx2 parameters noexcept { name##_body arguments; }

LLMCACHE_BOTH(quantise, (const float* row, std::int8_t* values, float* scales, std::int64_t size, std::int64_t group),
              (row, values, scales, size, group))
LLMCACHE_BOTH(dequantise,
              (const std::int8_t* values, const float* scales, const float* shift, float* row, std::int64_t size,
               std::int64_t group),
              (values, scales, shift, row, size, group))
LLMCACHE_BOTH(widen, (const std::uint16_t* values, const float* shift, float* row, std::int64_t size),
              (values, shift, row, size))
LLMCACHE_BOTH(add, (const float* values, const float* shift, float* row, std::int64_t size), (values, shift, row, size))
#undef LLMCACHE_BOTH

}  // namespace

void quantise_row(const float* row, std::int8_t* values, float* scales, std::int64_t size,
                  std::int64_t group) noexcept {
  static const auto chosen = cpu_has_avx2() ? &quantise_avx2 : &quantise_base;
  chosen(row, values, scales, size, group);
}

void dequantise_row(const std::int8_t* values, const float* scales, const float* shift, float* row, std::int64_t size,
                    std::int64_t group) noexcept {
  static const auto chosen = cpu_has_avx2() ? &dequantise_avx2 : &dequantise_base;
  chosen(values, scales, shift, row, size, group);
}

void widen_row(const std::uint16_t* values, const float* shift, float* row, std::int64_t size) noexcept {
  static const auto chosen = cpu_has_avx2() ? &widen_avx2 : &widen_base;
  chosen(values, shift, row, size);
}

void add_row(const float* values, const float* shift, float* row, std::int64_t size) noexcept {
  static const auto chosen = cpu_has_avx2() ? &add_avx2 : &add_base;
  chosen(values, shift, row, size);
}

}  // namespace llmcache::detail
