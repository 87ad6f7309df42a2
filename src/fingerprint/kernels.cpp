#include "fingerprint/kernels.h"

#include <algorithm>
#include <cstring>

namespace llmcache::detail {
namespace {

using Lanes = float __attribute__((vector_size(32)));
constexpr std::size_t kLanes = 8;
constexpr std::size_t kSums = 4;

LLMCACHE_ALWAYS_INLINE double dot_body(const float* a, const float* b, std::size_t count) {
  Lanes sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kLanes * kSums <= count; i += kLanes * kSums) {
    for (std::size_t s = 0; s < kSums; ++s) {
      Lanes x;
      Lanes y;
      std::memcpy(&x, a + i + s * kLanes, sizeof x);
      std::memcpy(&y, b + i + s * kLanes, sizeof y);
      sums[s] += x * y;
    }
  }
  const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane]);
  for (; i < count; ++i) total += static_cast<double>(a[i] * b[i]);
  return total;
}

double dot_base(const float* a, const float* b, std::size_t count) { return dot_body(a, b, count); }
// Without fused multiply-add, which would round differently.
LLMCACHE_TARGET("avx2") double dot_avx2(const float* a, const float* b, std::size_t count) {
  return dot_body(a, b, count);
}

}  // namespace

double dot(const float* a, const float* b, std::size_t count) noexcept {
  static const auto chosen = cpu_has_avx2() ? &dot_avx2 : &dot_base;
  return chosen(a, b, count);
}

double unit_cosine(const float* a, const float* b, std::size_t count) noexcept {
  const double value = dot(a, b, count);
  return value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value;
}

}  // namespace llmcache::detail
