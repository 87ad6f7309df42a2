// What of one bank is kept in a store below the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llmcache/report.h"
#include "reuse/call.h"
#include "store/tier_value.h"

namespace llmcache {

/// A row of a call, by all that decides what a bank keeps of it.
struct StoredRow {
  std::int64_t row = 0;     ///< of the call
  std::int64_t tokens = 0;  ///< real ones
  std::string tenant;
  std::string partition;
  std::vector<std::int64_t> ids;  ///< `ids_per_token` numbers a token; none where the partition says all
  std::size_t ids_per_token = 1;
  bool exact = false;  ///< only what the model made as it is
};

/// A part of a row that has a key of its own: tokens [begin, end).
struct StoredPiece {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::string key;

  [[nodiscard]] std::int64_t tokens() const noexcept { return end - begin; }
};

/// Thread-safe. Lives as long as the strategy that it is of.
class StoredPart {
 public:
  enum class Outcome { kTaken, kKnown, kNoRoom };

  virtual ~StoredPart() = default;

  [[nodiscard]] virtual TierDomain domain() const = 0;
  /// What entries hold: they are found only where it is the same.
  [[nodiscard]] virtual std::string layout() const = 0;
  /// The rows of a call that the bank may keep something of, or have kept.
  [[nodiscard]] virtual std::vector<StoredRow> rows(const Call& call) const = 0;
  /// The parts of a row, in their order; each is of use only with those before it.
  [[nodiscard]] virtual std::vector<StoredPiece> pieces(const StoredRow& row, std::int64_t block_tokens,
                                                        TierKeys& keys) const = 0;
  /// Tokens from the row's first on that the bank knows.
  [[nodiscard]] virtual std::int64_t known(const StoredRow& row) const = 0;
  /// Tokens of the row that it knew before a call.
  [[nodiscard]] virtual std::int64_t known_before(const SequenceReport& made) const { return made.reused_tokens; }
  /// True: of a row that is known whole nothing else is needed.
  [[nodiscard]] virtual bool answers_rows() const { return true; }
  /// About what a value of so many tokens takes.
  [[nodiscard]] virtual std::size_t bytes(std::int64_t tokens) const = 0;
  /// Makes an entry known, for which others may be evicted. Throws DamagedData unless it is that of the piece.
  virtual Outcome take(const StoredRow& row, const StoredPiece& piece, std::string_view entry) const = 0;
  /// Appends the entry of a piece; false if the bank does not have it any more.
  virtual bool append(std::string& to, const StoredRow& row, const StoredPiece& piece) const = 0;
};

}  // namespace llmcache
