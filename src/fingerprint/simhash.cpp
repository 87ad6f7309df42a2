#include "llmcache/fingerprint/simhash.h"

#include <fmt/core.h>

#include <bit>
#include <cmath>
#include <numbers>
#include <random>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"

namespace llmcache {
namespace {

/// Standard normal numbers, two for each pair of uniform ones (Box and Muller 1958).
class Normal {
 public:
  explicit Normal(std::uint64_t seed) : engine_(seed) {}

  float operator()() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    const double angle = 2.0 * std::numbers::pi * uniform();
    spare_ = static_cast<float>(radius * std::sin(angle));
    has_spare_ = true;
    return static_cast<float>(radius * std::cos(angle));
  }

 private:
  /// In (0, 1], with 53 bits.
  double uniform() { return (static_cast<double>(engine_() >> 11) + 1.0) * 0x1p-53; }

  std::mt19937_64 engine_;
  float spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace

SimHash::SimHash(int bits, std::int64_t dims, std::uint64_t seed) : bits_(bits), dims_(dims) {
  if (bits != 64 && bits != 128 && bits != 256) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("SimHash bits is {}; 64, 128 or 256 is expected", bits));
  }
  if (dims < 1) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("SimHash dims is {}; at least 1 is expected", dims));
  }
  planes_.resize(static_cast<std::size_t>(bits) * static_cast<std::size_t>(dims));
  Normal normal(seed);
  for (float& value : planes_) value = normal();
}

std::vector<std::uint64_t> SimHash::operator()(std::span<const float> vector) const {
  const auto dims = static_cast<std::size_t>(dims_);
  if (vector.size() != dims) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("a vector of {} values was given; {} are expected", vector.size(), dims));
  }
  std::vector<std::uint64_t> words(static_cast<std::size_t>(bits_) / 64);
  const float* plane = planes_.data();
  for (std::uint64_t& word : words) {
    for (int bit = 0; bit < 64; ++bit, plane += dims) {
      word |= std::uint64_t{detail::dot(plane, vector.data(), dims) >= 0} << bit;
    }
  }
  return words;
}

int hamming(std::span<const std::uint64_t> a, std::span<const std::uint64_t> b) {
  if (a.size() != b.size()) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("SimHashes of {} and {} bits cannot be compared", 64 * a.size(), 64 * b.size()));
  }
  int distance = 0;
  for (std::size_t i = 0; i < a.size(); ++i) distance += std::popcount(a[i] ^ b[i]);
  return distance;
}

double simhash_similarity(int distance, int bits) noexcept { return std::cos(std::numbers::pi * distance / bits); }

int simhash_radius(double tau, int bits) noexcept {
  int low = -1;  // similar enough, or none
  int high = bits + 1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (simhash_similarity(middle, bits) >= tau ? low : high) = middle;
  }
  return low;
}

}  // namespace llmcache
