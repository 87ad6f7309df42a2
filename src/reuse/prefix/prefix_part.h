// Keys and values of known prefixes in a snapshot.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bank/prefix_bank.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

class PrefixPart final : public SnapshotPart {
 public:
  /// `layers`: which are kept, as text. `now`: the clock of the bank's owner.
  PrefixPart(PrefixBank& bank, std::string layers, std::function<double()> now)
      : bank_(bank), layers_(std::move(layers)), now_(std::move(now)) {}

  std::string name() const override { return "prefixes"; }
  FrameKind kind() const override { return FrameKind::kPrefix; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return bank_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  std::string reason() const override { return "what comes before it in its sequence was not taken"; }
  void finish() override;

  /// Appends tokens [begin, end) of a sequence to a text, as save() writes them. False if not all of it up to the end
  /// is known. `tokens`: of the sequence, up to `end` at least.
  bool append_piece(std::string& to, std::string_view partition, std::span<const std::int64_t> tokens,
                    std::size_t begin, std::size_t end) const;
  /// What the numbers of one token take.
  [[nodiscard]] std::size_t bytes_of_token() const;

 private:
  struct Piece;
  [[nodiscard]] std::optional<Piece> piece_of(std::string_view partition, std::span<const std::int64_t> tokens,
                                              std::size_t begin, std::size_t end) const;
  bool save_piece(SnapshotWriter& writer, const PrefixBank::Listed& listed, std::size_t begin, std::size_t end) const;
  void keep(PrefixLease& lease, const PrefixRecord& record);

  PrefixBank& bank_;
  const std::string layers_;
  const std::function<double()> now_;
  struct Sequence {
    std::string partition;
    std::vector<std::int64_t> tokens;
  };
  std::vector<Sequence> taken_;  ///< in order
};

}  // namespace llmcache
