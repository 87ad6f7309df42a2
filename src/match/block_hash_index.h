// Where a run of tokens stands in known sequences, wherever it stands in a request: content hashes of token blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory_resource>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace llmcache {

/// A run of a request's tokens that a known sequence has too.
struct BlockMatch {
  std::size_t begin = 0;        ///< first token of the request
  std::uint32_t slot = 0;       ///< the known sequence
  std::size_t donor_begin = 0;  ///< first token of it
  std::size_t tokens = 0;
};

/// Known sequences are cut into blocks of `block` tokens from their start, each entered by its hash; those of a request
/// are hashed at every offset by a rolling hash, and what is found is compared and extended to both sides token by
/// token. So a run that both have in common is found if it covers one of the blocks: always from 2 * block - 1 tokens
/// on. The blocks at the start of a sequence are also entered by the hash of all tokens up to their end (as in vLLM's
/// automatic prefix caching), so that the longest prefix is found among many sequences that begin alike. Hashes only
/// find: tokens are compared before anything is called the same.
///
/// A token is a tuple of `ids_per_token` numbers. Sequences live in partitions that never see each other. They are
/// named by slots, small dense numbers of the caller, who also keeps the tokens: `Tokens` returns those of a slot,
/// which must not change while it is in the index.
///
/// Cost: insertion and erasure O(tokens) (erasure also O(sequences with that block)); look-up O(tokens) when each hash
/// has few candidates, of which no more than kCandidates are looked at.
///
/// Memory: all of it from the resource given, which may throw std::bad_alloc; then nothing has changed. Given back when
/// the index is empty. Thread safety: none; the bank locks.
class BlockHashIndex {
 public:
  static constexpr std::size_t kCandidates = 16;
  struct Sequence {
    std::string_view partition;
    std::span<const std::int64_t> tokens;
  };
  using Tokens = std::function<Sequence(std::uint32_t)>;

  BlockHashIndex(std::size_t ids_per_token, std::size_t block, Tokens tokens, std::pmr::memory_resource* memory);

  /// Enters the sequence of `slot`. May throw.
  void insert(std::uint32_t slot);
  /// Removes a sequence whose tokens can still be asked for.
  void erase(std::uint32_t slot) noexcept;
  void clear() noexcept;

  /// The longest known prefix of a request (donor_begin 0), to the token; tokens 0 if it is shorter than a block.
  [[nodiscard]] BlockMatch prefix(const Sequence& request) const;
  /// Which runs segments() looks for.
  struct Wanted {
    std::size_t from = 0;   ///< first token of the request that may belong to one
    std::size_t least = 1;  ///< shortest run, tokens; those below a block are never found
    bool moved = true;      ///< false: only where request and known sequence have them at the same place
  };
  /// Runs, ascending, without overlap: from left to right each time the longest one, and of equal ones one that has not
  /// moved.
  [[nodiscard]] std::vector<BlockMatch> segments(const Sequence& request, const Wanted& wanted) const;

 private:
  struct Place {
    std::uint32_t slot;
    std::uint32_t begin;  ///< token
  };
  using Table = std::pmr::unordered_multimap<std::uint64_t, Place>;

  [[nodiscard]] BlockMatch longest(const Sequence& request, std::size_t begin, std::size_t taken, std::uint64_t hash,
                                   bool moved) const;
  template <class Visit>
  void each_block(const Sequence& sequence, Visit visit) const;
  [[nodiscard]] std::uint64_t token_hash(const std::int64_t* token) const noexcept;
  [[nodiscard]] std::size_t common(const Sequence& a, std::size_t a_begin, const Sequence& b,
                                   std::size_t b_begin) const;
  [[nodiscard]] std::size_t count(const Sequence& sequence) const noexcept {
    return sequence.tokens.size() / ids_per_token_;
  }
  static void erase_from(Table& table, std::uint64_t hash, const Place& place) noexcept;

  const std::size_t ids_per_token_;
  const std::size_t block_;
  const Tokens tokens_;
  std::pmr::memory_resource* const memory_;
  Table blocks_;    ///< by the hash of a block
  Table prefixes_;  ///< by the hash of all tokens up to the end of a block
};

}  // namespace llmcache
