#include "reuse/prefix/prefix_part.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <span>

#include "bank/tensor_record.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// Tensors of one frame together: longer nodes are written in pieces, so that little is copied at once.
constexpr std::size_t kMostPieceBytes = std::size_t{32} << 20;

std::vector<std::int64_t> sizes_for(const KeySpec& spec, std::size_t tokens) {
  std::vector<std::int64_t> sizes = spec.sizes;
  sizes[static_cast<std::size_t>(spec.token_dim)] = static_cast<std::int64_t>(tokens);
  return sizes;
}

std::size_t token_bytes(const std::vector<KeySpec>& specs) {
  std::size_t bytes = 0;
  for (const KeySpec& spec : specs) {
    bytes += static_cast<std::size_t>(c10::multiply_integers(sizes_for(spec, 1))) * spec.options.dtype().itemsize();
  }
  return bytes;
}

/// Tokens [begin, end) of tensor i of ranges that follow one another.
at::Tensor tokens_in_ranges(const std::vector<KeyRange>& ranges, std::size_t i, std::int64_t dim, std::int64_t begin,
                            std::int64_t end) {
  std::vector<at::Tensor> pieces;
  std::int64_t at = 0;
  for (const KeyRange& range : ranges) {
    const auto from = std::max(begin, at);
    const auto to = std::min(end, at + range.tokens);
    if (from < to) pieces.push_back(range.block->tensor(i).narrow(dim, range.offset + from - at, to - from));
    at += range.tokens;
  }
  return pieces.size() == 1 ? pieces[0] : at::cat(pieces, dim);
}

}  // namespace

std::string PrefixPart::layout() const {
  std::string text = fmt::format("layers {}; {} numbers a token;", layers_, bank_.ids_per_token());
  for (const KeySpec& spec : bank_.specs()) {
    text += fmt::format(" {} [{}] over {};", c10::toString(c10::typeMetaToScalarType(spec.options.dtype())),
                        fmt::join(sizes_for(spec, 1), ", "), spec.token_dim);
  }
  return text;
}

void PrefixPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  const std::size_t step =
      std::max<std::size_t>(1, kMostPieceBytes / std::max<std::size_t>(1, token_bytes(bank_.specs())));
  for (const PrefixBank::Listed& listed : bank_.listed()) {
    const std::size_t end = listed.tokens.size() / bank_.ids_per_token();
    for (std::size_t begin = listed.begin; begin < end; begin += step) {
      const std::size_t stop = std::min(begin + step, end);
      if (!save_piece(writer, listed, begin, stop)) break;
      ++report.entries;
      report.tokens += stop - begin;
    }
  }
}

/// Tokens [begin, end) of a sequence, and what holds them.
struct PrefixPart::Piece {
  PrefixLease lease;  ///< nothing of it is evicted or moved while this lives
  PrefixRecord record;
  std::vector<at::Tensor> tensors;
};

/// None if these tokens are no longer there.
std::optional<PrefixPart::Piece> PrefixPart::piece_of(std::string_view partition, std::span<const std::int64_t> tokens,
                                                      std::size_t begin, std::size_t end) const {
  const auto known = tokens.first(end * bank_.ids_per_token());
  std::optional<Piece> piece(std::in_place, Piece{bank_.peek(partition, known), {}, {}});
  const PrefixLease& lease = piece->lease;
  if (lease.known_tokens() < static_cast<std::int64_t>(end)) return std::nullopt;
  for (std::size_t i = 0; i < bank_.specs().size(); ++i) {
    piece->tensors.push_back(tokens_in_ranges(lease.known(), i, bank_.specs()[i].token_dim,
                                              static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)));
  }
  PrefixRecord& record = piece->record;
  record.partition = partition;
  record.ids_per_token = static_cast<std::uint32_t>(bank_.ids_per_token());
  record.begin = begin;
  record.tokens.assign(known.begin(), known.end());
  record.shortest = lease.shortest();
  record.longest = lease.longest();
  for (const KeyRange& range : lease.known()) record.saved_ms = std::max(record.saved_ms, range.saved_ms);
  record.tensors = records_of(piece->tensors).value();
  return piece;
}

/// False if these tokens are no longer there.
bool PrefixPart::save_piece(SnapshotWriter& writer, const PrefixBank::Listed& listed, std::size_t begin,
                            std::size_t end) const {
  auto piece = piece_of(listed.partition, listed.tokens, begin, end);
  if (!piece) return false;
  piece->record.shortest = listed.shortest;
  piece->record.longest = listed.longest;
  piece->record.saved_ms = listed.saved_ms;
  write_entry(writer, kind(), write_prefix(piece->record), piece->tensors);
  return true;
}

bool PrefixPart::append_piece(std::string& to, std::string_view partition, std::span<const std::int64_t> tokens,
                              std::size_t begin, std::size_t end) const {
  const auto piece = piece_of(partition, tokens, begin, end);
  if (piece) append_entry(to, write_prefix(piece->record), piece->tensors);
  return piece.has_value();
}

std::size_t PrefixPart::bytes_of_token() const { return token_bytes(bank_.specs()); }

std::size_t PrefixPart::check(std::string_view entry) const {
  const PrefixRecord record = read_prefix(entry);
  const auto& specs = bank_.specs();
  if (record.ids_per_token != bank_.ids_per_token() || record.tensors.size() != specs.size()) {
    throw DamagedData("it has a prefix of another form");
  }
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const at::ScalarType type = c10::typeMetaToScalarType(specs[i].options.dtype());
    if (!has_form(record.tensors[i], sizes_for(specs[i], record.end() - record.begin), type)) {
      throw DamagedData("it has a prefix with tensors of another form");
    }
  }
  const auto bytes = bank_.bytes_for(record.end() - record.begin);
  return bytes ? *bytes : std::numeric_limits<std::size_t>::max();
}

SnapshotPart::Outcome PrefixPart::take(std::string_view entry, SnapshotPartReport& report) {
  const PrefixRecord record = read_prefix(entry);
  const auto end = static_cast<std::int64_t>(record.end());
  const auto begin = static_cast<std::int64_t>(record.begin);
  PrefixLease lease = bank_.find(record.partition, record.tokens, now_());
  if (lease.known_tokens() >= end) return Outcome::kKnown;
  if (lease.known_tokens() < begin) return Outcome::kOther;
  if (bank_.room_for(record.partition) < check(entry)) return Outcome::kNoRoom;
  if (!bank_.reserve(lease, nullptr, end - begin, 0, record.longest)) return Outcome::kNoRoom;
  keep(lease, record);
  if (bank_.peek(record.partition, record.tokens).known_tokens() < end) return Outcome::kNoRoom;
  report.tokens += static_cast<std::uint64_t>(end - begin);
  taken_.push_back({std::string(record.partition), record.tokens});
  return Outcome::kTaken;
}

/// Writes what was reserved, and makes it known behind what was. Of tokens that another pass has made known meanwhile
/// that pass's states stay.
void PrefixPart::keep(PrefixLease& lease, const PrefixRecord& record) {
  std::vector<KeyRange> ranges;
  std::int64_t left = static_cast<std::int64_t>(record.begin);
  for (const KeyRange& range : lease.known()) {
    if (left == 0) break;
    ranges.push_back(range);
    ranges.back().tokens = std::min(range.tokens, left);
    left -= ranges.back().tokens;
  }
  for (KeyRange range : lease.reserved()) {
    range.shortest = record.shortest;
    range.longest = record.longest;
    for (std::size_t i = 0; i < record.tensors.size(); ++i) {
      copy_record(record.tensors[i],
                  range.block->tensor(i).narrow(bank_.specs()[i].token_dim, range.offset, range.tokens));
    }
    ranges.push_back(std::move(range));
  }
  bank_.commit(lease, record.partition, record.tokens, ranges, record.saved_ms, now_());
}

/// What is below in the tree is older than what is above it.
void PrefixPart::finish() {
  for (auto one = taken_.rbegin(); one != taken_.rend(); ++one) {
    static_cast<void>(bank_.find(one->partition, one->tokens, now_()));
  }
}

}  // namespace llmcache
