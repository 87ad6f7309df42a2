#include "bank/evicted_keys.h"

#include <xxhash.h>

#include <algorithm>
#include <new>

namespace llmcache {
namespace {

constexpr std::size_t kEvictedBlockTokens = 16;
constexpr std::uint32_t kCauseBits = 3;

/// What is kept of a hash, without the cause; never 0. The set follows from other bits.
std::uint32_t tag_of(std::uint64_t hash) {
  return std::max(static_cast<std::uint32_t>(hash >> 32) & ~kCauseBits, kCauseBits + 1);
}

/// Calls visit(end, hash) for each prefix that ends with a block or the sequence, until that is false.
template <class Visit>
void each_prefix(std::string_view partition, std::span<const std::int64_t> tokens, std::size_t ids_per_token,
                 const Visit& visit) {
  std::uint64_t hash = XXH3_64bits(partition.data(), partition.size());
  const std::size_t count = tokens.size() / ids_per_token;
  for (std::size_t begin = 0; begin < count; begin += kEvictedBlockTokens) {
    const std::size_t end = std::min(begin + kEvictedBlockTokens, count);
    const auto block = tokens.subspan(begin * ids_per_token, (end - begin) * ids_per_token);
    hash = XXH3_64bits_withSeed(block.data(), block.size_bytes(), hash);
    if (!visit(end, hash)) return;
  }
}

}  // namespace

void EvictedKeys::add(std::uint64_t hash, Cause cause) noexcept {
  if (!table_) table_.reset(new (std::nothrow) std::uint32_t[sets_ * kWays]());
  if (!table_) return;
  std::uint32_t* const set = set_of(hash);
  const std::uint32_t tag = tag_of(hash);
  std::uint32_t* end = std::find_if(set, set + kWays, [&](std::uint32_t held) { return (held & ~kCauseBits) == tag; });
  if (end == set + kWays) --end;  // the oldest is forgotten
  std::move_backward(set, end, end + 1);
  *set = tag | static_cast<std::uint32_t>(cause);
}

std::optional<EvictedKeys::Cause> EvictedKeys::find(std::uint64_t hash) const noexcept {
  if (!table_) return std::nullopt;
  const std::uint32_t* const set = set_of(hash);
  const std::uint32_t tag = tag_of(hash);
  const auto* held = std::find_if(set, set + kWays, [&](std::uint32_t one) { return (one & ~kCauseBits) == tag; });
  if (held == set + kWays) return std::nullopt;
  return static_cast<Cause>(*held & kCauseBits);
}

void add_evicted_prefixes(EvictedKeys& keys, std::string_view partition, std::span<const std::int64_t> tokens,
                          std::size_t ids_per_token, std::size_t begin, EvictedKeys::Cause cause) noexcept {
  each_prefix(partition, tokens, ids_per_token, [&](std::size_t end, std::uint64_t hash) {
    if (end > begin) keys.add(hash, cause);
    return true;
  });
}

EvictedRun count_evicted(const EvictedKeys& keys, std::string_view partition, std::span<const std::int64_t> tokens,
                         std::size_t ids_per_token, std::size_t known) noexcept {
  EvictedRun run;
  if (keys.empty()) return run;
  std::size_t last = known;
  each_prefix(partition, tokens, ids_per_token, [&](std::size_t end, std::uint64_t hash) {
    if (end <= known) return true;
    const auto cause = keys.find(hash);
    if (!cause) return false;
    if (last == known) run.cause = *cause;
    last = end;
    return true;
  });
  run.tokens = static_cast<std::int64_t>(last - known);
  return run;
}

}  // namespace llmcache
