#include "llmcache/fingerprint/jaccard.h"

#include <fmt/core.h>
#include <xxhash.h>

#include <algorithm>

#include "llmcache/error.h"

namespace llmcache {

std::vector<std::uint64_t> shingle_hashes(std::span<const std::int64_t> ids, std::int64_t shingle, std::uint64_t seed) {
  if (shingle < 1) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("shingle is {}; at least 1 token is expected", shingle));
  }
  if (ids.empty()) return {};
  const std::size_t length = std::min(static_cast<std::size_t>(shingle), ids.size());
  std::vector<std::uint64_t> hashes(ids.size() - length + 1);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    hashes[i] = XXH3_64bits_withSeed(ids.data() + i, length * sizeof(std::int64_t), seed);
  }
  std::sort(hashes.begin(), hashes.end());
  hashes.erase(std::unique(hashes.begin(), hashes.end()), hashes.end());
  return hashes;
}

double jaccard(std::span<const std::uint64_t> a, std::span<const std::uint64_t> b) noexcept {
  if (a.empty() || b.empty()) return 0;
  std::size_t common = 0;
  std::size_t i = 0;
  std::size_t j = 0;
  while (i < a.size() && j < b.size()) {
    const std::uint64_t x = a[i];
    const std::uint64_t y = b[j];
    common += x == y ? 1 : 0;
    i += x <= y ? 1 : 0;
    j += y <= x ? 1 : 0;
  }
  return static_cast<double>(common) / static_cast<double>(a.size() + b.size() - common);
}

}  // namespace llmcache
