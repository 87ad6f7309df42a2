// Inner loops that are compiled for several instruction sets and chosen at run time.
#pragma once

#include <cstddef>

// The library is built for any x86-64 processor; a function with this attribute may use more, and is
// called only after cpu_has_popcnt() or its like has said yes.
#if defined(__x86_64__) && defined(__GNUC__)
#define LLMCACHE_MULTIVERSION 1
#define LLMCACHE_TARGET(isa) __attribute__((target(isa)))
#else
#define LLMCACHE_MULTIVERSION 0
#define LLMCACHE_TARGET(isa)
#endif

#if defined(__GNUC__)
#define LLMCACHE_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define LLMCACHE_ALWAYS_INLINE inline
#endif

namespace llmcache::detail {

inline bool cpu_has_popcnt() noexcept {
#if LLMCACHE_MULTIVERSION
  return __builtin_cpu_supports("popcnt") != 0;
#else
  return false;
#endif
}

inline bool cpu_has_avx2() noexcept {
#if LLMCACHE_MULTIVERSION
  return __builtin_cpu_supports("avx2") != 0;
#else
  return false;
#endif
}

/// Sum of a[i] * b[i]. The order of the additions does not depend on the instruction set, so neither
/// does the result.
double dot(const float* a, const float* b, std::size_t count) noexcept;

/// dot, forced into [-1, 1]: the cosine of two unit vectors. NaN stays NaN.
double unit_cosine(const float* a, const float* b, std::size_t count) noexcept;

}  // namespace llmcache::detail
