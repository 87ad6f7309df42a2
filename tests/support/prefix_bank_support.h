// Passes over a PrefixBank whose contents tell which prefix they were written for. No model.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bank/prefix_bank.h"
#include "match/size_class.h"
#include "token_ids.h"

namespace llmcache::test {

/// Two places of a model: [1, 2, tokens, 3] and [tokens, 2].
inline std::vector<KeySpec> specs() {
  return {{{1, 2, 1, 3}, 2, at::TensorOptions().dtype(at::kLong)}, {{1, 2}, 0, at::TensorOptions().dtype(at::kInt)}};
}
inline constexpr std::size_t kTokenBytes = 2 * 3 * 8 + 2 * 4;

/// A number for each token of a sequence that follows from all tokens up to it, and from the partition.
inline std::vector<std::int64_t> marks(const std::string& partition, const Tokens& tokens, std::size_t width) {
  std::vector<std::int64_t> result;
  auto state = static_cast<std::uint64_t>(std::hash<std::string>()(partition));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    state = (state ^ static_cast<std::uint64_t>(tokens[i])) * 0x9E3779B97F4A7C15U;
    state ^= state >> 29U;
    if (i % width == width - 1) result.push_back(static_cast<std::int64_t>(state));
  }
  return result;
}

inline void write(const KeyRange& range, const std::int64_t* values) {
  const at::Tensor first = range.block->tensor(0).narrow(2, range.offset, range.tokens);
  const at::Tensor second = range.block->tensor(1).narrow(0, range.offset, range.tokens);
  auto a = first.accessor<std::int64_t, 4>();
  auto b = second.accessor<std::int32_t, 2>();
  for (std::int64_t i = 0; i < range.tokens; ++i) {
    for (std::int64_t j = 0; j < 6; ++j) a[0][j / 3][i][j % 3] = values[i] + j;
    for (std::int64_t j = 0; j < 2; ++j) b[i][j] = static_cast<std::int32_t>(values[i] >> (32 * j));
  }
}

inline bool holds(const KeyRange& range, const std::int64_t* values) {
  const at::Tensor first = range.block->tensor(0).narrow(2, range.offset, range.tokens);
  const at::Tensor second = range.block->tensor(1).narrow(0, range.offset, range.tokens);
  const auto a = first.accessor<std::int64_t, 4>();
  const auto b = second.accessor<std::int32_t, 2>();
  for (std::int64_t i = 0; i < range.tokens; ++i) {
    for (std::int64_t j = 0; j < 6; ++j) {
      if (a[0][j / 3][i][j % 3] != values[i] + j) return false;
    }
    for (std::int64_t j = 0; j < 2; ++j) {
      if (b[i][j] != static_cast<std::int32_t>(values[i] >> (32 * j))) return false;
    }
  }
  return true;
}

/// True if the lease's known prefix has the contents of this sequence.
inline bool contents_right(const PrefixLease& lease, const std::string& partition, const Tokens& tokens,
                           std::size_t width = 1) {
  const auto values = marks(partition, tokens, width);
  std::int64_t at = 0;
  for (const KeyRange& range : lease.known()) {
    if (range.tokens <= 0 || range.offset < 0 || range.offset + range.tokens > range.block->room()) return false;
    if (at + range.tokens > static_cast<std::int64_t>(values.size())) return false;
    if (!holds(range, values.data() + at)) return false;
    at += range.tokens;
  }
  return at == lease.known_tokens();
}

/// One pass: find, reserve, write. Ready to be committed, which also counts it if there was no room.
struct Pass {
  PrefixLease lease;
  std::string partition;
  Tokens tokens;
  std::vector<KeyRange> ranges;
  bool complete = false;  ///< there was room for all
  bool committed = false;

  Pass(PrefixBank& bank, std::string partition_of, Tokens tokens_of, double now_s = 0, std::int64_t room = 0,
       std::size_t width = 1)
      : partition(std::move(partition_of)), tokens(std::move(tokens_of)) {
    lease = bank.find(partition, tokens, now_s);
    EXPECT_TRUE(contents_right(lease, partition, tokens, width));
    ranges = lease.known();
    const auto count = static_cast<std::int64_t>(tokens.size() / width);
    const KeyRange* after = ranges.empty() ? nullptr : &ranges.back();
    complete = bank.reserve(lease, after, count - lease.known_tokens(), room, size_class(count));
    if (!complete) return;
    const auto values = marks(partition, tokens, width);
    std::int64_t at = lease.known_tokens();
    for (const KeyRange& range : lease.reserved()) {
      write(range, values.data() + at);
      at += range.tokens;
      ranges.push_back(range);
    }
    EXPECT_EQ(at, count);
  }
  void commit(PrefixBank& bank, double now_s = 0, double saved_ms = 1) {
    bank.commit(lease, partition, tokens, ranges, saved_ms, now_s);
    committed = true;
  }
};

class PrefixBanks : public ::testing::Test {
 protected:
  static PrefixBank::Settings settings(std::size_t capacity = 1 << 20, Eviction policy = Eviction::kLru,
                                       std::size_t width = 1) {
    PrefixBank::Settings settings;
    settings.capacity_bytes = capacity;
    settings.eviction.policy = policy;
    settings.ids_per_token = width;
    settings.specs = specs();
    return settings;
  }

  static void add(PrefixBank& bank, const std::string& partition, const Tokens& tokens, double now_s = 0,
                  std::int64_t room = 0) {
    Pass pass(bank, partition, tokens, now_s, room);
    pass.commit(bank, now_s);
  }
  /// Length of the known prefix, whose contents must be right.
  static std::int64_t known(PrefixBank& bank, const std::string& partition, const Tokens& tokens, double now_s = 0) {
    const PrefixLease lease = bank.find(partition, tokens, now_s);
    EXPECT_TRUE(contents_right(lease, partition, tokens));
    return lease.known_tokens();
  }
};

}  // namespace llmcache::test
