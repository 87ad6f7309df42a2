// Which cached sequences have most text in common with a new one: an inverted index over hashes of short runs of tokens
// (shingles, Broder: On the resemblance and containment of documents, 1997).
#pragma once

#include <cstdint>
#include <memory_resource>
#include <span>
#include <unordered_map>
#include <vector>

namespace llmcache {

/// Sequences under small dense ids. Of a long sequence a sample of hashes is used, by their value, so that the samples
/// of two sequences agree; about kSample of them. A hash remembers the last kPostings sequences that had it, so that a
/// look-up takes at most kSample * kPostings steps however many sequences there are. A text that very many sequences
/// share is found through the newest of them.
///
/// Partitions never see each other; a partition is a number that the owner gives.
/// Memory: all from the resource given; only `insert` may throw std::bad_alloc, and then the sequence is not
/// held (and others may be found by fewer of their hashes).
/// Thread safety: none; the owner locks.
class ShingleIndex {
 public:
  static constexpr std::size_t kSample = 128;
  static constexpr std::size_t kPostings = 32;

  struct Candidate {
    std::uint32_t id = 0;
    std::int64_t shared = 0;  ///< estimate of the shingles in common
  };

  explicit ShingleIndex(std::pmr::memory_resource* memory) : postings_(memory), entries_(memory), counts_(memory) {}

  /// `hashes`: of all shingles of the sequence (shingle_hashes). The id must be free.
  void insert(std::uint32_t id, std::uint32_t partition, std::span<const std::uint64_t> hashes);
  /// An id that is not held is ignored.
  void erase(std::uint32_t id) noexcept;
  /// At most `limit` sequences of the partition with shingles in common, those with most first, higher ids first among
  /// equals.
  [[nodiscard]] std::vector<Candidate> best(std::uint32_t partition, std::span<const std::uint64_t> hashes,
                                            std::size_t limit);
  void clear() noexcept;
  [[nodiscard]] std::size_t size() const noexcept { return held_; }

 private:
  struct Entry {
    explicit Entry(std::pmr::memory_resource* memory) : hashes(memory) {}
    std::pmr::vector<std::uint64_t> hashes;
    std::uint32_t partition = 0;
    int thinning = -1;  ///< one hash in 2^thinning is used; -1: the id is free
  };
  using Posting = std::pmr::vector<std::uint32_t>;

  void withdraw(std::uint32_t id, std::uint64_t hash) noexcept;

  std::pmr::unordered_map<std::uint64_t, Posting> postings_;  ///< ids, oldest first
  std::pmr::vector<Entry> entries_;                           ///< by id
  std::pmr::vector<std::uint32_t> counts_;                    ///< by id; zero between calls
  std::size_t held_ = 0;
};

}  // namespace llmcache
