// The most similar of many fingerprints (LLMCache, arXiv 2512.16843: Cache Matching and Lookup Engine).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <memory_resource>
#include <optional>

#include "llmcache/fingerprint/fingerprint.h"

namespace llmcache {

class FingerprintIndexImpl;

/// Fingerprints of one kind under small numbers, and the search for the one most similar to another.
///
/// | kind | few entries | many entries | result |
/// |---|---|---|---|
/// | SimHash | scan | from 16,384: multi-index hashing | always that of the scan |
/// | raw, PCA | scan | from 32,768: inverted lists | at times a less similar one, or none |
/// | Jaccard | scan | from 1,024 and tau >= 0.5: MinHash bands | at times a less similar one, or none |
///
/// - Multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012): the code is cut into pieces, each with
///   a table of its own. If two codes differ in at most r bits, one of the m pieces differs in at most
///   r / m bits, so looking up all pieces nearby finds every code within r. The radius grows bit by
///   bit and stops at the first match. Where tau is so loose that this costs more than the scan, the scan is
///   done.
/// - Inverted lists (Jegou, Douze, Schmid, PAMI 2011, section IV, without the quantiser): each vector is in the
///   list of the nearest of about sqrt(n) centroids, and a query reads the lists of the centroids nearest to it.
///   Lists that have grown too long are split in two by 2-means, so there is no training. Of 100,000
///   vectors of 384 values in groups of 20 it found the best one for 49 of 50 queries (llmcache-microbench).
/// - MinHash bands (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4): 32 bands of
///   4 hashes. A pair of similarity s is compared with probability 1 - (1 - s^4)^32: 0.87 at 0.5, 0.99 at 0.6,
///   above 0.9999 from 0.7 on. The similarity of what is compared is exact.
///
/// Thread safety: `best` and `size` may be called at once; nothing else may run beside anything.
/// Memory: everything that grows with the entries comes from the given resource and goes back as entries are
/// erased; the object itself (under 1 KiB) and what one call needs for a moment do not come from it.
class FingerprintIndex {
 public:
  /// The largest id there can be.
  static constexpr std::uint32_t kMaxId = std::numeric_limits<std::uint32_t>::max() - 1;

  struct Match {
    std::uint32_t id;
    double similarity;  ///< equal to llmcache::similarity of query and entry, to the last bit
  };

  /// Takes nothing from `memory` before the first insertion. `memory` must outlive the index.
  explicit FingerprintIndex(FingerprintKind kind, std::pmr::memory_resource* memory = std::pmr::get_default_resource());
  ~FingerprintIndex();
  FingerprintIndex(FingerprintIndex&&) noexcept;
  FingerprintIndex& operator=(FingerprintIndex&&) noexcept;

  /// Adds a fingerprint. `id` must not be in use; ids of erased entries may be used again. Memory follows
  /// the largest id in use, so ids should be small and dense. Constant time on average for SimHash
  /// and Jaccard; about sqrt(n) dot products for raw and PCA. Now and then an insertion takes
  /// longer, when tables are first built.
  /// Throws Error(kInvalidInput) if the id is in use or too large, or if the fingerprint is of another kind or
  /// size than the index (vectors: than its other entries) or not of unit length; whatever `memory`
  /// throws. Then nothing has changed.
  void insert(std::uint32_t id, const Fingerprint& fingerprint);

  /// Removes an entry; an id that is not in use is no error. Constant time.
  void erase(std::uint32_t id) noexcept;

  /// The entry with the highest similarity that is at least `tau`; of equal ones the lowest id. Empty if there is
  /// none, if tau is NaN, or if the query is not finite.
  /// Throws Error(kInvalidInput) if the query is of another kind or size than the entries.
  [[nodiscard]] std::optional<Match> best(const Fingerprint& query, double tau) const;

  [[nodiscard]] std::size_t size() const noexcept;
  [[nodiscard]] FingerprintKind kind() const noexcept { return kind_; }

  /// Removes all entries and gives their memory back.
  void clear() noexcept;

 private:
  FingerprintKind kind_;
  std::unique_ptr<FingerprintIndexImpl> impl_;
};

}  // namespace llmcache
