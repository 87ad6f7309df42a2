// SimHash: one bit for each random hyperplane, the side of it on which a vector lies.
//
// M. Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002, section 3: two
// vectors at angle a get different bits with probability a / pi, so the share of different bits
// estimates the angle.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// A fixed set of hyperplanes through the origin with Gaussian normals.
///
/// The normals follow from `seed` alone: std::mt19937_64, whose numbers the C++ standard fixes, and
/// the Box-Muller transform. Hyperplane i is the same for every number of bits.
/// Thread safety: immutable after construction.
class SimHash {
 public:
  /// `bits`: 64, 128 or 256. `dims`: values of a vector, at least 1.
  /// Throws Error(kInvalidOptions) that names the argument at fault.
  SimHash(int bits, std::int64_t dims, std::uint64_t seed);

  /// The bits of a vector of `dims` finite values, as bits / 64 words; bit i of word w belongs to
  /// hyperplane 64 * w + i. Throws Error(kInvalidInput) if the number of values is wrong.
  [[nodiscard]] std::vector<std::uint64_t> operator()(std::span<const float> vector) const;

  [[nodiscard]] int bits() const noexcept { return bits_; }
  [[nodiscard]] std::int64_t dims() const noexcept { return dims_; }

 private:
  int bits_;
  std::int64_t dims_;
  std::vector<float> planes_;  ///< [bits, dims]
};

/// Number of different bits. Both must have the same number of words, else Error(kInvalidInput).
int hamming(std::span<const std::uint64_t> a, std::span<const std::uint64_t> b);

/// Cosine of the angle that `distance` different bits out of `bits` stand for: cos(pi * distance / bits).
double simhash_similarity(int distance, int bits) noexcept;

/// The largest distance whose similarity is >= tau; -1 if there is none (tau above 1, or no number).
int simhash_radius(double tau, int bits) noexcept;

}  // namespace llmcache
