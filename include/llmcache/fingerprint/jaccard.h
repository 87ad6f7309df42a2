// Token shingles and their Jaccard similarity.
//
// A. Broder, "On the resemblance and containment of documents", SEQUENCES 1997: a document is the set
// of its runs of k tokens; the resemblance of two documents is |A and B| / |A or B| of these sets.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// The hashes of all runs of `shingle` tokens, sorted, each once. A sequence shorter than that is one
/// run. An empty sequence has none. Hash: XXH3, 64 bits, with `seed`; two different runs get the same
/// hash with probability 2^-64. Throws Error(kInvalidOptions) unless shingle >= 1.
std::vector<std::uint64_t> shingle_hashes(std::span<const std::int64_t> ids, std::int64_t shingle, std::uint64_t seed);

/// Jaccard similarity of two sorted sets, in [0, 1]; 0 if one is empty.
double jaccard(std::span<const std::uint64_t> a, std::span<const std::uint64_t> b) noexcept;

}  // namespace llmcache
