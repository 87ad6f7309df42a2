#include "reuse/prefix/stored_prefixes.h"

#include <algorithm>
#include <utility>

#include "reuse/prefix/prefix_part.h"
#include "reuse/tiers/snapshot_outcome.h"
#include "store/damaged_data.h"

namespace llmcache {

StoredPrefixes::StoredPrefixes(PrefixBank& bank, std::string layers, std::function<double()> now,
                               std::function<bool(const Call&)> accepts)
    : bank_(bank), now_(std::move(now)), accepts_(std::move(accepts)) {
  const PrefixPart part(bank_, std::move(layers), now_);
  layout_ = part.layout();
  token_bytes_ = part.bytes_of_token();
}

std::vector<StoredRow> StoredPrefixes::rows(const Call& call) const {
  std::vector<StoredRow> rows;
  if (!accepts_(call)) return rows;
  for (RowKey& key : call.batch.keys(call.request.tenant)) {
    rows.push_back({key.row, key.span.tokens, call.request.tenant, std::move(key.partition), std::move(key.tokens),
                    key.ids_per_token, false});
  }
  return rows;
}

std::vector<StoredPiece> StoredPrefixes::pieces(const StoredRow& row, std::int64_t block_tokens, TierKeys& keys) const {
  std::vector<StoredPiece> pieces;
  keys.begin(row.partition);
  const std::size_t ids = static_cast<std::size_t>(block_tokens) * row.ids_per_token;
  for (std::int64_t begin = 0; begin + block_tokens <= row.tokens; begin += block_tokens) {
    const auto* first = row.ids.data() + static_cast<std::size_t>(begin) * row.ids_per_token;
    pieces.push_back({begin, begin + block_tokens, keys.next(first, ids)});
  }
  return pieces;
}

std::int64_t StoredPrefixes::known(const StoredRow& row) const {
  return bank_.peek(row.partition, row.ids).known_tokens();
}

std::size_t StoredPrefixes::bytes(std::int64_t tokens) const { return static_cast<std::size_t>(tokens) * token_bytes_; }

StoredPart::Outcome StoredPrefixes::take(const StoredRow& row, const StoredPiece& piece, std::string_view entry) const {
  PrefixPart part(bank_, {}, now_);
  static_cast<void>(part.check(entry));
  const PrefixRecord record = read_prefix(entry);
  const auto ids = static_cast<std::size_t>(piece.end) * row.ids_per_token;
  const bool same = record.partition == row.partition && record.begin == static_cast<std::uint64_t>(piece.begin) &&
                    record.tokens.size() == ids &&
                    std::equal(record.tokens.begin(), record.tokens.end(), row.ids.begin());
  if (!same) throw DamagedData("it has the states of other tokens");
  SnapshotPartReport report;
  return stored_outcome(part.take(entry, report));
}

bool StoredPrefixes::append(std::string& to, const StoredRow& row, const StoredPiece& piece) const {
  const PrefixPart part(bank_, {}, now_);
  return part.append_piece(to, row.partition, row.ids, static_cast<std::size_t>(piece.begin),
                           static_cast<std::size_t>(piece.end));
}

}  // namespace llmcache
