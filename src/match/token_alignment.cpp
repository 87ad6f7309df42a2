#include "match/token_alignment.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <queue>

#include "llmcache/error.h"

namespace llmcache {
namespace {

/// The finaliser of SplitMix64: every bit of the input moves every bit of the result.
std::uint64_t mix(std::uint64_t x) noexcept {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// Comparisons spent on extending runs, a token: more are needed only where text repeats itself all the time.
constexpr std::int64_t kBudget = 64;

/// Positions of the donor by the hash of the run that begins there: chains in a table of heads.
class RunTable {
 public:
  explicit RunTable(const std::vector<std::uint64_t>& hashes)
      : hashes_(hashes), heads_(std::bit_ceil(2 * hashes.size() + 1), -1), next_(hashes.size(), -1) {
    for (std::size_t i = hashes.size(); i-- > 0;) {  // so that a chain is in ascending order
      auto& head = heads_[hashes[i] & (heads_.size() - 1)];
      next_[i] = head;
      head = static_cast<std::int32_t>(i);
    }
  }

  /// Calls use(position) for the first kRepeats positions of a hash.
  template <class Use>
  void find(std::uint64_t hash, Use use) const {
    int found = 0;
    for (auto at = heads_[hash & (heads_.size() - 1)]; at >= 0 && found < kRepeats;
         at = next_[static_cast<std::size_t>(at)]) {
      if (hashes_[static_cast<std::size_t>(at)] != hash) continue;
      ++found;
      use(static_cast<std::int64_t>(at));
    }
  }

 private:
  const std::vector<std::uint64_t>& hashes_;
  std::vector<std::int32_t> heads_;
  std::vector<std::int32_t> next_;
};

class Aligner {
 public:
  Aligner(const TokenView& tokens, const TokenView& donor, const AlignmentSettings& settings)
      : tokens_(tokens),
        donor_(donor),
        settings_(settings),
        used_(static_cast<std::size_t>(tokens.size()), 0),
        donor_used_(static_cast<std::size_t>(donor.size()), 0) {}

  TokenAlignment run() {
    in_place(settings_.least_shifted, true);
    if (settings_.shifted) elsewhere();
    in_place(1, false);
    return {tokens_.size(), donor_.size(), joined()};
  }

 private:
  struct Longest {
    bool operator()(const AlignedBlock& a, const AlignedBlock& b) const {
      if (a.tokens != b.tokens) return a.tokens < b.tokens;
      const auto shift = [](const AlignedBlock& block) { return std::abs(block.begin - block.donor_begin); };
      return shift(a) != shift(b) ? shift(a) > shift(b) : a.begin > b.begin;
    }
  };

  [[nodiscard]] bool free(std::int64_t token, std::int64_t donor_token) const {
    return !used_[static_cast<std::size_t>(token)] && !donor_used_[static_cast<std::size_t>(donor_token)];
  }

  void take(const AlignedBlock& block) {
    std::fill_n(used_.begin() + block.begin, block.tokens, char{1});
    std::fill_n(donor_used_.begin() + block.donor_begin, block.tokens, char{1});
    blocks_.push_back(block);
  }

  /// Takes runs in their place that are long enough, and the common beginning if `beginning`.
  void in_place(std::int64_t least, bool beginning) {
    const auto end = std::min(tokens_.size(), donor_.size());
    for (std::int64_t t = 0; t < end;) {
      const auto begin = t;
      while (t < end && free(t, t) && tokens_.same(t, donor_, t)) ++t;
      if (t > begin && (t - begin >= least || (beginning && begin == 0))) take({begin, begin, t - begin});
      if (t == begin) ++t;
    }
  }

  void elsewhere() {
    const auto least = settings_.least_shifted;
    // What is free of the ends: mostly far less than the whole.
    const auto first_free = [](const std::vector<char>& used) {
      return static_cast<std::int64_t>(std::find(used.begin(), used.end(), char{0}) - used.begin());
    };
    const auto from = first_free(used_);
    const auto donor_from = first_free(donor_used_);
    if (tokens_.size() - from < least || donor_.size() - donor_from < least) return;
    common_ending(from, donor_from);
    const auto cut = [](const TokenView& view, std::int64_t begin) {
      return TokenView{view.values.subspan(static_cast<std::size_t>(begin) * view.ids_per_token), view.ids_per_token};
    };
    const auto hashes = shingle_hashes(cut(tokens_, from), least);
    const auto donor_hashes = shingle_hashes(cut(donor_, donor_from), least);
    const RunTable table(donor_hashes);
    std::priority_queue<AlignedBlock, std::vector<AlignedBlock>, Longest> found;
    std::int64_t budget = kBudget * (tokens_.size() + donor_.size());
    for (std::int64_t i = from; i + least <= tokens_.size() && budget > 0; ++i) {
      if (used_[static_cast<std::size_t>(i)]) continue;
      table.find(hashes[static_cast<std::size_t>(i - from)], [&](std::int64_t at) {
        const auto j = at + donor_from;
        // Not where the run goes on from the token before: it was found there.
        if (!free(i, j) || (i > 0 && j > 0 && free(i - 1, j - 1) && tokens_.same(i - 1, donor_, j - 1))) return;
        const auto n = length(i, j);
        budget -= n;
        if (n >= least) found.push({i, j, n});
      });
    }
    while (!found.empty()) {
      const auto block = found.top();
      found.pop();
      take_free(block, found);
    }
  }

  void common_ending(std::int64_t from, std::int64_t donor_from) {
    auto i = tokens_.size();
    auto j = donor_.size();
    while (i > from && j > donor_from && free(i - 1, j - 1) && tokens_.same(i - 1, donor_, j - 1)) --i, --j;
    const auto n = tokens_.size() - i;
    if (n >= settings_.least_shifted) take({i, j, n});
  }

  /// Free tokens from (i, j) on that are the same.
  [[nodiscard]] std::int64_t length(std::int64_t i, std::int64_t j) const {
    std::int64_t n = 0;
    while (i + n < tokens_.size() && j + n < donor_.size() && free(i + n, j + n) &&
           tokens_.same(i + n, donor_, j + n)) {
      ++n;
    }
    return n;
  }

  /// Takes the block if it is free, else puts back what is free of it.
  template <class Queue>
  void take_free(const AlignedBlock& block, Queue& found) {
    std::int64_t t = 0;
    while (t < block.tokens) {
      const auto begin = t;
      while (t < block.tokens && free(block.begin + t, block.donor_begin + t)) ++t;
      if (t - begin == block.tokens) {
        take(block);
      } else if (t - begin >= settings_.least_shifted) {
        found.push({block.begin + begin, block.donor_begin + begin, t - begin});
      }
      if (t == begin) ++t;
    }
  }

  std::vector<AlignedBlock> joined() {
    std::sort(blocks_.begin(), blocks_.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
    std::vector<AlignedBlock> joined;
    for (const AlignedBlock& block : blocks_) {
      if (!joined.empty() && joined.back().begin + joined.back().tokens == block.begin &&
          joined.back().donor_begin + joined.back().tokens == block.donor_begin) {
        joined.back().tokens += block.tokens;
      } else {
        joined.push_back(block);
      }
    }
    return joined;
  }

  const TokenView& tokens_;
  const TokenView& donor_;
  const AlignmentSettings& settings_;
  std::vector<char> used_;
  std::vector<char> donor_used_;
  std::vector<AlignedBlock> blocks_;
};

}  // namespace

std::int64_t TokenAlignment::aligned() const noexcept {
  std::int64_t sum = 0;
  for (const AlignedBlock& block : blocks) sum += block.tokens;
  return sum;
}

double TokenAlignment::edit_fraction() const noexcept {
  const auto all = tokens + donor_tokens;
  return all == 0 ? 0 : 1 - 2 * static_cast<double>(aligned()) / static_cast<double>(all);
}

std::vector<std::int64_t> TokenAlignment::donor_positions() const {
  std::vector<std::int64_t> positions(static_cast<std::size_t>(tokens), -1);
  for (const AlignedBlock& block : blocks) {
    for (std::int64_t t = 0; t < block.tokens; ++t) {
      positions[static_cast<std::size_t>(block.begin + t)] = block.donor_begin + t;
    }
  }
  return positions;
}

std::vector<std::uint64_t> shingle_hashes(const TokenView& tokens, std::int64_t length) {
  std::vector<std::uint64_t> hashes;
  if (length < 1 || tokens.size() < length) return hashes;
  // A polynomial in an odd number, modulo 2^64, rolled along the sequence.
  constexpr std::uint64_t kBase = 0xd1342543de82ef95u;
  std::uint64_t leaving = 1;
  for (std::int64_t i = 0; i < length; ++i) leaving *= kBase;
  std::vector<std::uint64_t> keys(static_cast<std::size_t>(tokens.size()), 0);
  for (std::size_t t = 0; t < keys.size(); ++t) {
    for (std::size_t i = 0; i < tokens.ids_per_token; ++i) {
      keys[t] = mix(keys[t] ^ static_cast<std::uint64_t>(tokens.values[t * tokens.ids_per_token + i]));
    }
  }
  hashes.reserve(keys.size() - static_cast<std::size_t>(length) + 1);
  std::uint64_t rolling = 0;
  for (std::size_t t = 0; t < keys.size(); ++t) {
    rolling = rolling * kBase + keys[t];
    if (t >= static_cast<std::size_t>(length)) rolling -= leaving * keys[t - static_cast<std::size_t>(length)];
    if (t + 1 >= static_cast<std::size_t>(length)) hashes.push_back(mix(rolling));
  }
  return hashes;
}

TokenAlignment align_tokens(const TokenView& tokens, const TokenView& donor, const AlignmentSettings& settings) {
  if (settings.least_shifted < 2) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("least_shifted is {}; at least 2 tokens are expected", settings.least_shifted));
  }
  if (tokens.ids_per_token != donor.ids_per_token || tokens.ids_per_token == 0) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("tokens of {} numbers cannot be aligned to tokens of {}",
                                                        tokens.ids_per_token, donor.ids_per_token));
  }
  return Aligner(tokens, donor, settings).run();
}

}  // namespace llmcache
