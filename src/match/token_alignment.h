// Aligning a sequence to a cached one: which of its tokens stand there too, in runs of neighbours. Model-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// Tokens of one sequence, each of `ids_per_token` numbers (one a token-level input of the model), token after token.
/// Two tokens are the same if all their numbers are. A view.
struct TokenView {
  std::span<const std::int64_t> values;
  std::size_t ids_per_token = 1;

  [[nodiscard]] std::int64_t size() const noexcept { return static_cast<std::int64_t>(values.size() / ids_per_token); }
  [[nodiscard]] bool same(std::int64_t token, const TokenView& other, std::int64_t other_token) const noexcept {
    const auto* a = values.data() + static_cast<std::size_t>(token) * ids_per_token;
    const auto* b = other.values.data() + static_cast<std::size_t>(other_token) * ids_per_token;
    for (std::size_t i = 0; i < ids_per_token; ++i) {
      if (a[i] != b[i]) return false;
    }
    return true;
  }
};

/// Neighbouring tokens that stand, in the same order, in the donor.
struct AlignedBlock {
  std::int64_t begin = 0;        ///< first token
  std::int64_t donor_begin = 0;  ///< first token in the donor
  std::int64_t tokens = 0;

  [[nodiscard]] bool shifted() const noexcept { return begin != donor_begin; }
  friend bool operator==(const AlignedBlock&, const AlignedBlock&) = default;
};

/// Blocks in the order of `begin`, without overlap, neither here nor in the donor. Moved text makes the order of
/// `donor_begin` another one. Blocks that follow each other in both sequences are one.
struct TokenAlignment {
  std::int64_t tokens = 0;        ///< of the sequence
  std::int64_t donor_tokens = 0;  ///< of the donor
  std::vector<AlignedBlock> blocks;

  [[nodiscard]] std::int64_t aligned() const noexcept;
  /// Tokens of both sequences that are in no block, divided by all tokens of both: 0 for the same sequence, 1 for
  /// sequences with nothing in common.
  [[nodiscard]] double edit_fraction() const noexcept;
  /// For each token its position in the donor, -1 where it has none.
  [[nodiscard]] std::vector<std::int64_t> donor_positions() const;
};

struct AlignmentSettings {
  /// Shortest block that may stand elsewhere in the donor, tokens, at least 2. Shorter ones are mostly chance (study:
  /// six). Blocks in their place may have any length.
  std::int64_t least_shifted = 6;
  bool shifted = true;  ///< false: only blocks in their place
};

/// Aligns in three steps: runs of at least `least_shifted` tokens in their place (the common beginning of any length);
/// then, longest first, what stands elsewhere, found by the hashes of all runs of `least_shifted` tokens (the common
/// ending included); last what is left of short runs in their place. Runs that repeat in the donor more than kRepeats
/// times are looked for among their first kRepeats places. Linear in the number of tokens but for the sorting of runs.
/// Throws Error(kInvalidOptions).
TokenAlignment align_tokens(const TokenView& tokens, const TokenView& donor, const AlignmentSettings& settings = {});

/// Places of a repeated run that are tried.
inline constexpr int kRepeats = 8;

/// Hashes of all runs of `length` neighbouring tokens, in order; none if the sequence is shorter.
std::vector<std::uint64_t> shingle_hashes(const TokenView& tokens, std::int64_t length);

}  // namespace llmcache
