// A small adapter for each bank: entries by number, each of some tokens, whose states all hold that number.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bank/layer_bank.h"
#include "bank/output_bank.h"
#include "bank/prefix_bank.h"
#include "bank/segment_bank.h"
#include "bank/token_bank.h"
#include "match/size_class.h"
#include "token_ids.h"

namespace llmcache::test {

inline constexpr std::int64_t kTokens = 32;
/// Data of an entry of kTokens tokens: eight float32 each, whatever the bank.
inline constexpr std::size_t kEntryBytes = kTokens * 8 * sizeof(float);

/// No two numbers have a token in common.
inline Tokens tokens_of(int number, std::int64_t count = kTokens) {
  Tokens tokens;
  for (std::int64_t t = 0; t < count; ++t) tokens.push_back(100000 * std::int64_t{number} + t);
  return tokens;
}

inline bool all_are(const at::Tensor& states, int number) {
  return states.numel() > 0 && at::equal(states, at::full_like(states, number));
}

/// Holds an entry while it lives; true if its content is right.
using Reader = std::function<bool()>;

// Each adapter has prepared(): what a pass computes, as the step by which the bank takes it over; and read(): null if
// the entry is not found. `owner`: the partition, or what a key begins with.

class Outputs {
 public:
  explicit Outputs(std::size_t capacity, MemoryAccount* total = nullptr) : bank(capacity, total) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens, const std::string& owner = "p") {
    return [this, key = key_of(number, owner), tensors = std::vector{at::full({1, count, 8}, number, at::kFloat)}] {
      bank.insert(key, tensors, true);
    };
  }
  Reader read(int number, const std::string& owner = "p") {
    auto entry = bank.find(key_of(number, owner), true);
    if (!entry) return nullptr;
    return [entry, number] { return all_are(entry->tensors()[0], number); };
  }

  OutputBank bank;

 private:
  static std::string key_of(int number, const std::string& owner) {
    return owner + "the key of number " + std::to_string(number);
  }
};

class Prefixes {
 public:
  explicit Prefixes(std::size_t capacity, MemoryAccount* total = nullptr)
      : bank({.capacity_bytes = capacity, .eviction = {}, .specs = {{{1, 1, 8}, 1, at::kFloat}}, .total = total}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens, const std::string& owner = "p") {
    auto tokens = tokens_of(number, count);
    auto lease = std::make_shared<PrefixLease>(bank.find(owner, tokens, 0));
    auto ranges = lease->known();
    bank.reserve(*lease, nullptr, count - lease->known_tokens(), 0, size_class(count));
    for (const KeyRange& range : lease->reserved()) {
      range.block->tensor(0).narrow(1, range.offset, range.tokens).fill_(number);
      ranges.push_back(range);
    }
    return [this, lease, tokens, ranges, owner] { bank.commit(*lease, owner, tokens, ranges, 1, 0); };
  }
  Reader read(int number, const std::string& owner = "p") {
    auto lease = std::make_shared<PrefixLease>(bank.find(owner, tokens_of(number), 0));
    if (lease->known_tokens() == 0) return nullptr;
    return [lease, number] {
      return lease->known_tokens() == kTokens && std::ranges::all_of(lease->known(), [&](const KeyRange& range) {
               return all_are(range.block->tensor(0).narrow(1, range.offset, range.tokens), number);
             });
    };
  }

  PrefixBank bank;
};

class Layers {
 public:
  explicit Layers(std::size_t capacity, MemoryAccount* total = nullptr)
      : fingerprinter_({.kind = FingerprintKind::kRaw}, 8),
        bank({.capacity_bytes = capacity, .eviction = {}, .total = total}, {&fingerprinter_}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens, const std::string& owner = "p") {
    LayerBank::Candidate candidate;
    candidate.number = static_cast<std::uint64_t>(number);
    candidate.key = candidate.number + 1;
    candidate.hidden = at::full({1, count, 8}, number, at::kFloat);
    candidate.inputs = {at::tensor(tokens_of(number, count))};
    candidate.states = {state_of(number)};
    candidate.fingerprints = {fingerprinter_.make(candidate.states[0], {})};
    return [this, candidate, owner] { bank.insert(owner, candidate, 0); };
  }
  Reader read(int number, const std::string& owner = "p") {
    const auto hit = bank.find(owner, 0, fingerprinter_.make(state_of(number), {}).value(), 0.9999, 0);
    if (!hit) return nullptr;
    return [entry = hit->entry, number] { return all_are(entry->hidden(), number); };
  }

 private:
  static std::vector<float> state_of(int number) {
    std::mt19937 random(static_cast<unsigned>(number));
    std::vector<float> state(8);
    for (float& value : state) value = static_cast<float>(random() % 2000) - 1000;
    return state;
  }
  Fingerprinter fingerprinter_;

 public:
  LayerBank bank;
};

class TokenStates {
 public:
  explicit TokenStates(std::size_t capacity, MemoryAccount* total = nullptr) : bank(settings(capacity, total)) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens, const std::string& owner = "p") {
    auto reserved = bank.reserve(count);
    for (std::size_t i = 0; reserved && i < 3; ++i) reserved->tensor(i).fill_(number);
    const auto pending = std::make_shared<std::unique_ptr<PendingEntry>>(std::move(reserved));
    return [this, pending, owner, tokens = tokens_of(number, count)] {
      bank.keep(owner, {tokens, 1}, std::move(*pending), 1, 0);
    };
  }
  Reader read(int number, const std::string& owner = "p") {
    const auto tokens = tokens_of(number);
    const auto found = bank.find(owner, {tokens, 1}, 0);
    if (!found) return nullptr;
    return [entry = found->entry, number] {
      return all_are(entry->hidden(1), number) && all_are(entry->keys(0, 0, 0), number);
    };
  }

  TokenBank bank;

 private:
  static TokenBank::Settings settings(std::size_t capacity, MemoryAccount* total) {
    TokenBank::Settings settings;
    settings.capacity_bytes = capacity;
    settings.total = total;
    settings.layout.specs = {{{4}, at::kFloat}, {{2}, at::kFloat}, {{2}, at::kFloat}};
    settings.layout.first_key = {{0}};
    settings.layout.hidden = {1, 2};
    return settings;
  }
};

class Segments {
 public:
  explicit Segments(std::size_t capacity, MemoryAccount* total = nullptr)
      : bank({.capacity_bytes = capacity, .eviction = {}, .specs = {{{1, 1, 8}, 1, at::kFloat}}, .total = total}) {}

  std::function<void()> prepared(int number, std::int64_t count = kTokens, const std::string& owner = "p") {
    const auto room = std::make_shared<SegmentBank::Room>(bank.reserve(owner, tokens_of(number, count)));
    if (room->pending) room->pending->set(0, at::full({1, count, 8}, number, at::kFloat));
    return [this, room] { bank.insert(std::move(*room), 1, 0); };
  }
  Reader read(int number, const std::string& owner = "p") {
    const auto hits = bank.find(owner, tokens_of(number), {}, 0);
    if (hits.empty()) return nullptr;
    return [hits, number] {
      return hits.size() == 1 && hits[0].tokens == kTokens && all_are(hits[0].donor->state(0, 0, kTokens), number);
    };
  }

  SegmentBank bank;
};

struct BankNames {
  template <typename Adapter>
  static std::string GetName(int /*number*/) {
    if (std::is_same_v<Adapter, Outputs>) return "Output";
    if (std::is_same_v<Adapter, Prefixes>) return "Prefix";
    if (std::is_same_v<Adapter, Layers>) return "Layer";
    return std::is_same_v<Adapter, TokenStates> ? "Token" : "Segment";
  }
};
using Banks = ::testing::Types<Outputs, Prefixes, Layers, TokenStates, Segments>;

}  // namespace llmcache::test
