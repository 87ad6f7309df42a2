#include "match/block_hash_index.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

namespace llmcache {
namespace {

/// Of the polynomial that the rolling hash is, modulo 2^64.
constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15;

std::uint64_t mixed(std::uint64_t hash, std::uint64_t seed) { return XXH3_64bits_withSeed(&hash, sizeof hash, seed); }

std::uint64_t seed_of(std::string_view partition) { return XXH3_64bits(partition.data(), partition.size()); }

}  // namespace

// The tables start empty and allocate nothing until the first insertion.
BlockHashIndex::BlockHashIndex(std::size_t ids_per_token, std::size_t block, Tokens tokens,
                               std::pmr::memory_resource* memory)
    : ids_per_token_(ids_per_token),
      block_(block),
      tokens_(std::move(tokens)),
      memory_(memory),
      blocks_(memory),
      prefixes_(memory) {}

std::uint64_t BlockHashIndex::token_hash(const std::int64_t* token) const noexcept {
  return XXH3_64bits(token, ids_per_token_ * sizeof *token);
}

/// Calls visit(first token, hash of the block, hash of all tokens up to its end) for each whole block.
template <class Visit>
void BlockHashIndex::each_block(const Sequence& sequence, Visit visit) const {
  const std::uint64_t seed = seed_of(sequence.partition);
  std::uint64_t all = seed;
  for (std::size_t begin = 0; begin + block_ <= count(sequence); begin += block_) {
    std::uint64_t hash = 0;
    for (std::size_t t = begin; t < begin + block_; ++t) {
      hash = hash * kFactor + token_hash(sequence.tokens.data() + t * ids_per_token_);
    }
    all = mixed(hash, all);
    if (!visit(begin, mixed(hash, seed), all)) return;
  }
}

void BlockHashIndex::insert(std::uint32_t slot) {
  const Sequence sequence = tokens_(slot);
  try {
    each_block(sequence, [&](std::size_t begin, std::uint64_t block, std::uint64_t all) {
      const Place place{slot, static_cast<std::uint32_t>(begin)};
      blocks_.emplace(block, place);
      prefixes_.emplace(all, place);
      return true;
    });
  } catch (...) {
    erase(slot);
    throw;
  }
}

void BlockHashIndex::erase(std::uint32_t slot) noexcept {
  each_block(tokens_(slot), [&](std::size_t begin, std::uint64_t block, std::uint64_t all) {
    const Place place{slot, static_cast<std::uint32_t>(begin)};
    erase_from(blocks_, block, place);
    erase_from(prefixes_, all, place);
    return true;
  });
  if (blocks_.empty() && prefixes_.empty()) clear();
}

void BlockHashIndex::erase_from(Table& table, std::uint64_t hash, const Place& place) noexcept {
  const auto [first, last] = table.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    if (it->second.slot != place.slot || it->second.begin != place.begin) continue;
    table.erase(it);
    return;
  }
}

void BlockHashIndex::clear() noexcept {
  // New tables, so that these give back their memory too.
  Table(memory_).swap(blocks_);
  Table(memory_).swap(prefixes_);
}

/// Tokens that two sequences have in common from these on.
std::size_t BlockHashIndex::common(const Sequence& a, std::size_t a_begin, const Sequence& b,
                                   std::size_t b_begin) const {
  const auto left = a.tokens.subspan(a_begin * ids_per_token_);
  const auto right = b.tokens.subspan(b_begin * ids_per_token_);
  const auto end = std::mismatch(left.begin(), left.end(), right.begin(), right.end()).first;
  return static_cast<std::size_t>(end - left.begin()) / ids_per_token_;
}

BlockMatch BlockHashIndex::prefix(const Sequence& request) const {
  BlockMatch best;
  const auto consider = [&](std::uint64_t all) {
    const auto [first, last] = prefixes_.equal_range(all);
    std::size_t looked_at = 0;
    for (auto it = first; it != last && looked_at < kCandidates; ++it, ++looked_at) {
      const Sequence known = tokens_(it->second.slot);
      if (known.partition != request.partition) continue;
      const std::size_t tokens = common(request, 0, known, 0);
      if (tokens > best.tokens) best = {0, it->second.slot, 0, tokens};
    }
    return first != last;
  };
  std::vector<std::uint64_t> known;
  each_block(request, [&](std::size_t, std::uint64_t, std::uint64_t all) {
    if (!prefixes_.contains(all)) return false;
    known.push_back(all);
    return true;
  });
  // The last one has the longest; earlier ones only where hashes were equal and tokens were not.
  for (std::size_t i = known.size(); i-- > 0 && best.tokens < (i + 1) * block_;) consider(known[i]);
  return best;
}

/// The longest run that covers the request's block at `begin`, whose hash this is, and nothing before `taken`.
BlockMatch BlockHashIndex::longest(const Sequence& request, std::size_t begin, std::size_t taken, std::uint64_t hash,
                                   bool moved) const {
  BlockMatch best;
  const auto [first, last] = blocks_.equal_range(hash);
  std::size_t looked_at = 0;
  for (auto it = first; it != last && looked_at < kCandidates; ++it) {
    const auto [slot, place] = it->second;
    if (!moved && place != begin) continue;
    ++looked_at;
    const Sequence known = tokens_(slot);
    if (known.partition != request.partition) continue;
    const std::size_t right = common(request, begin, known, place);
    if (right < block_) continue;
    const auto same = [&](std::size_t a, std::size_t b) {
      const auto own = request.tokens.subspan(a * ids_per_token_, ids_per_token_);
      return std::equal(own.begin(), own.end(), known.tokens.subspan(b * ids_per_token_, ids_per_token_).begin());
    };
    std::size_t left = 0;
    const std::size_t most = std::min<std::size_t>(begin - taken, place);
    while (left < most && same(begin - left - 1, place - left - 1)) ++left;
    const std::size_t tokens = left + right;
    if (tokens > best.tokens || (tokens == best.tokens && place == begin)) {
      best = {begin - left, slot, place - left, tokens};
    }
  }
  return best;
}

std::vector<BlockMatch> BlockHashIndex::segments(const Sequence& request, const Wanted& wanted) const {
  std::vector<BlockMatch> found;
  const std::size_t total = count(request);
  std::size_t begin = wanted.from;
  if (blocks_.empty() || total < begin + block_) return found;
  std::uint64_t leaving = 1;  // factor of the token that leaves the window
  for (std::size_t i = 1; i < block_; ++i) leaving *= kFactor;
  std::vector<std::uint64_t> hashes(total);
  for (std::size_t t = begin; t < total; ++t) hashes[t] = token_hash(request.tokens.data() + t * ids_per_token_);
  const auto window = [&](std::size_t first) {
    std::uint64_t hash = 0;
    for (std::size_t t = first; t < first + block_; ++t) hash = hash * kFactor + hashes[t];
    return hash;
  };
  const std::uint64_t seed = seed_of(request.partition);
  std::size_t taken = begin;  // what is before belongs to a run already
  std::uint64_t hash = window(begin);
  for (;;) {
    const BlockMatch run = longest(request, begin, taken, mixed(hash, seed), wanted.moved);
    if (run.tokens > 0 && run.tokens >= wanted.least) {
      found.push_back(run);
      taken = begin = run.begin + run.tokens;
      if (begin + block_ > total) return found;
      hash = window(begin);
    } else {
      if (begin + block_ >= total) return found;
      hash = (hash - hashes[begin] * leaving) * kFactor + hashes[begin + block_];
      ++begin;
    }
  }
}

}  // namespace llmcache
