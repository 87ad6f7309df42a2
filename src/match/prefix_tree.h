// A prefix tree (radix tree) over sequences of tokens, each a tuple of numbers.
#pragma once

#include <xxhash.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <memory_resource>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace llmcache {

/// Nodes have small dense numbers (slots), tokens and a payload; those of a node follow those of its parent. Spaces
/// never see each other. Tokens are compared, hashes only find: the child that continues a sequence is found in O(1) on
/// average, however many there are.
///
/// All memory is taken from the resource given, which may throw std::bad_alloc; then nothing has changed. Not
/// thread-safe.
template <class Payload>
class PrefixTree {
 public:
  using Slot = std::uint32_t;
  static constexpr Slot kNone = std::numeric_limits<Slot>::max();

  /// `width`: numbers a token.
  PrefixTree(std::size_t width, std::pmr::memory_resource* memory)
      : width_(width), memory_(memory), nodes_(memory), children_(memory), spaces_(memory) {}

  struct Step {
    Slot slot = kNone;
    std::size_t tokens = 0;  ///< how many of the node's are the sequence's
  };
  /// The nodes along the longest known prefix of `tokens`, from the root; all but the last are matched whole.
  [[nodiscard]] std::vector<Step> walk(std::string_view space, std::span<const std::int64_t> tokens) const {
    std::vector<Step> steps;
    const auto found = spaces_.find(space);
    if (found == spaces_.end()) return steps;
    Slot at = found->second;
    while (tokens.size() >= width_) {
      at = child(at, tokens.first(width_));
      if (at == kNone) break;
      const auto& own = nodes_[at].tokens;
      const auto limit = std::min(own.size(), tokens.size());
      const auto end =
          std::mismatch(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(limit), tokens.begin()).first;
      const auto same = static_cast<std::size_t>(end - own.begin()) / width_;
      steps.push_back({at, same});
      if (same * width_ < own.size()) break;
      tokens = tokens.subspan(own.size());
    }
    return steps;
  }

  /// The slot that add() or split() will give to the next node.
  [[nodiscard]] Slot next_slot() const noexcept { return free_ != kNone ? free_ : static_cast<Slot>(nodes_.size()); }

  /// The node under which the sequences of a space begin. It has no tokens, and its payload stays empty.
  Slot root(std::string_view space) {
    if (const auto found = spaces_.find(space); found != spaces_.end()) return found->second;
    const Slot slot = make(kNone, {});
    try {
      nodes_[slot].space = spaces_.emplace(space, slot).first;
    } catch (...) {
      give_back(slot);
      throw;
    }
    nodes_[slot].is_root = true;
    return slot;
  }

  /// A child of `parent` with these tokens (at least one), none of whose children begins with the same token.
  Slot add(Slot parent, std::span<const std::int64_t> tokens, Payload payload) {
    const Slot slot = make(parent, tokens);
    try {
      children_.emplace(key(parent, tokens.first(width_)), slot);
    } catch (...) {
      give_back(slot);
      throw;
    }
    link(parent, slot);
    nodes_[slot].payload = std::move(payload);
    return slot;
  }

  /// Gives the first `count` tokens of a node to a new one between it and its parent. Returns the new one.
  Slot split(Slot slot, std::size_t count, Payload upper, Payload lower) {
    const Slot parent = nodes_[slot].parent;
    const auto cut = count * width_;
    const Slot made = make(parent, std::span(nodes_[slot].tokens).first(cut));
    const auto old = entry(parent, slot);
    try {
      children_.emplace(key(made, std::span(nodes_[slot].tokens).subspan(cut, width_)), slot);
    } catch (...) {
      give_back(made);
      throw;
    }
    old->second = made;
    auto& tokens = nodes_[slot].tokens;
    tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(cut));
    unlink(slot);
    link(parent, made);
    link(made, slot);
    nodes_[slot].parent = made;
    nodes_[made].payload = std::move(upper);
    nodes_[slot].payload = std::move(lower);
    return made;
  }

  /// Appends tokens to a node without children.
  void extend(Slot slot, std::span<const std::int64_t> tokens) {
    nodes_[slot].tokens.insert(nodes_[slot].tokens.end(), tokens.begin(), tokens.end());
  }

  /// Removes a node without children; a space goes with its last one.
  void remove(Slot slot) noexcept {
    const Slot parent = nodes_[slot].parent;
    children_.erase(entry(parent, slot));
    unlink(slot);
    give_back(slot);
    drop_if_empty(parent);
  }
  /// Forgets a space without nodes.
  void drop_if_empty(Slot root) noexcept {
    if (!nodes_[root].is_root || nodes_[root].first_child != kNone) return;
    spaces_.erase(nodes_[root].space);
    give_back(root);
  }

  [[nodiscard]] bool is_root(Slot slot) const noexcept { return nodes_[slot].is_root; }
  [[nodiscard]] Slot parent(Slot slot) const noexcept { return nodes_[slot].parent; }
  [[nodiscard]] Slot first_child(Slot slot) const noexcept { return nodes_[slot].first_child; }
  [[nodiscard]] Slot next_sibling(Slot slot) const noexcept { return nodes_[slot].next; }
  [[nodiscard]] std::size_t tokens(Slot slot) const noexcept { return nodes_[slot].tokens.size() / width_; }
  [[nodiscard]] Payload& payload(Slot slot) noexcept { return nodes_[slot].payload; }

 private:
  using Spaces = std::pmr::map<std::pmr::string, Slot, std::less<>>;

  struct Node {
    explicit Node(std::pmr::memory_resource* memory) : tokens(memory) {}
    Slot parent = kNone;  ///< of a free slot: the next free one
    Slot first_child = kNone, next = kNone, previous = kNone;
    bool is_root = false;
    typename Spaces::iterator space;  ///< of a root
    std::pmr::vector<std::int64_t> tokens;
    Payload payload;
  };

  [[nodiscard]] std::uint64_t key(Slot parent, std::span<const std::int64_t> token) const noexcept {
    return XXH3_64bits_withSeed(token.data(), token.size_bytes(), parent);
  }

  [[nodiscard]] Slot child(Slot parent, std::span<const std::int64_t> token) const {
    const auto [begin, end] = children_.equal_range(key(parent, token));
    for (auto it = begin; it != end; ++it) {
      const Node& node = nodes_[it->second];
      if (node.parent == parent && std::equal(token.begin(), token.end(), node.tokens.begin())) return it->second;
    }
    return kNone;
  }

  [[nodiscard]] auto entry(Slot parent, Slot slot) noexcept {
    auto [it, end] = children_.equal_range(key(parent, std::span(nodes_[slot].tokens).first(width_)));
    while (it != end && it->second != slot) ++it;
    return it;
  }

  Slot make(Slot parent, std::span<const std::int64_t> tokens) {
    const Slot slot = next_slot();
    if (free_ == kNone) {
      nodes_.emplace_back(memory_);
      nodes_[slot].parent = kNone;
      free_ = slot;
    }
    // `tokens` may be another node's, whose place may have changed.
    nodes_[slot].tokens.assign(tokens.begin(), tokens.end());
    free_ = nodes_[slot].parent;
    nodes_[slot].parent = parent;
    return slot;
  }

  void give_back(Slot slot) noexcept {
    Node& node = nodes_[slot];
    std::pmr::vector<std::int64_t>(memory_).swap(node.tokens);
    node.payload = {};
    node.is_root = false;
    node.first_child = node.next = node.previous = kNone;
    node.parent = free_;
    free_ = slot;
  }

  void link(Slot parent, Slot slot) noexcept {
    const Slot first = nodes_[parent].first_child;
    nodes_[slot].next = first;
    nodes_[slot].previous = kNone;
    if (first != kNone) nodes_[first].previous = slot;
    nodes_[parent].first_child = slot;
  }
  void unlink(Slot slot) noexcept {
    const Node& node = nodes_[slot];
    if (node.previous != kNone) {
      nodes_[node.previous].next = node.next;
    } else {
      nodes_[node.parent].first_child = node.next;
    }
    if (node.next != kNone) nodes_[node.next].previous = node.previous;
  }

  const std::size_t width_;
  std::pmr::memory_resource* memory_;
  std::pmr::vector<Node> nodes_;
  std::pmr::unordered_multimap<std::uint64_t, Slot> children_;
  Spaces spaces_;
  Slot free_ = kNone;
};

}  // namespace llmcache
