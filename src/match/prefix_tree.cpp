#include "match/prefix_tree.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

namespace llmcache {

// The containers start empty and allocate nothing until the first root.
PrefixTree::PrefixTree(std::size_t ids_per_token, std::pmr::memory_resource* memory)
    : ids_per_token_(ids_per_token), memory_(memory), partitions_(memory), index_(memory) {}

PrefixTree::Match PrefixTree::match(std::string_view partition, std::span<const std::int64_t> tokens) const noexcept {
  const auto it = partitions_.find(partition);
  if (it == partitions_.end()) return {};
  Match match{it->second, 0, 0};
  const std::size_t count = tokens.size() / ids_per_token_;
  while (match.tokens < count) {
    const std::int64_t* rest = tokens.data() + match.tokens * ids_per_token_;
    const std::uint32_t next = child(match.node, rest);
    if (next == kNone) break;
    const auto& own = at(next).tokens;
    const std::size_t most = std::min(own.size(), (count - match.tokens) * ids_per_token_);
    const auto end = std::mismatch(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(most), rest).first;
    match.node = next;
    match.in_node = static_cast<std::size_t>(end - own.begin()) / ids_per_token_;
    match.tokens += match.in_node;
    if (match.in_node < size(next)) break;
  }
  return match;
}

std::uint32_t PrefixTree::next_slot() {
  if (free_ == kNone) {
    if (!nodes_) nodes_.emplace(memory_);
    nodes_->emplace_back(memory_);
    free_ = static_cast<std::uint32_t>(nodes_->size() - 1);
  }
  return free_;
}

std::uint32_t PrefixTree::root(std::string_view partition) {
  if (const auto it = partitions_.find(partition); it != partitions_.end()) return it->second;
  const std::uint32_t slot = next_slot();
  at(slot).partition = partitions_.try_emplace(std::pmr::string(partition, memory_), slot).first;
  return take_slot();
}

std::uint32_t PrefixTree::attach(std::uint32_t parent, std::span<const std::int64_t> tokens) {
  const std::uint32_t slot = next_slot();
  std::pmr::vector<std::int64_t> own(tokens.begin(), tokens.end(), memory_);
  index_.emplace(hash(parent, own.data()), slot);
  // Nothing fails from here on.
  take_slot();
  Node& node = at(slot);
  node.tokens.swap(own);
  node.parent = parent;
  node.previous = at(parent).last_child;
  (node.previous == kNone ? at(parent).first_child : at(node.previous).next) = slot;
  at(parent).last_child = slot;
  return slot;
}

std::uint32_t PrefixTree::split(std::uint32_t node, std::size_t count) {
  const std::uint32_t slot = next_slot();
  Node& lower = at(node);
  const auto cut = lower.tokens.begin() + static_cast<std::ptrdiff_t>(count * ids_per_token_);
  std::pmr::vector<std::int64_t> head(lower.tokens.begin(), cut, memory_);
  std::pmr::vector<std::int64_t> tail(cut, lower.tokens.end(), memory_);
  std::uint32_t& place = indexed(node)->second;  // stays where it is when the index grows
  index_.emplace(hash(slot, tail.data()), node);
  // Nothing fails from here on. The new node takes the old one's place in the index and among its siblings.
  place = take_slot();
  Node& upper = at(slot);
  upper.tokens.swap(head);
  upper.parent = lower.parent;
  upper.first_child = upper.last_child = node;
  upper.previous = lower.previous;
  upper.next = lower.next;
  Node& above = at(upper.parent);
  (upper.previous == kNone ? above.first_child : at(upper.previous).next) = slot;
  (upper.next == kNone ? above.last_child : at(upper.next).previous) = slot;
  lower.tokens.swap(tail);
  lower.parent = slot;
  lower.previous = lower.next = kNone;
  return slot;
}

void PrefixTree::extend(std::uint32_t leaf, std::span<const std::int64_t> tokens) {
  auto& own = at(leaf).tokens;
  own.insert(own.end(), tokens.begin(), tokens.end());
}

void PrefixTree::remove(std::uint32_t leaf) noexcept {
  index_.erase(indexed(leaf));
  const Node& node = at(leaf);
  const std::uint32_t above = node.parent;
  (node.previous == kNone ? at(above).first_child : at(node.previous).next) = node.next;
  (node.next == kNone ? at(above).last_child : at(node.next).previous) = node.previous;
  free_slot(leaf);
  if (is_root(above)) drop_if_empty(at(above).partition);
}

void PrefixTree::drop_if_empty(std::string_view partition) noexcept {
  if (const auto it = partitions_.find(partition); it != partitions_.end()) {
    drop_if_empty(it);
  } else if (empty()) {
    clear();
  }
}

void PrefixTree::drop_if_empty(Partitions::iterator partition) noexcept {
  if (!is_leaf(partition->second)) return;
  free_slot(partition->second);
  partitions_.erase(partition);
  if (empty()) clear();
}

void PrefixTree::clear() noexcept {
  // New containers, so that these give back their memory too.
  Index(memory_).swap(index_);
  nodes_.reset();
  partitions_.clear();
  free_ = kNone;
  used_ = 0;
}

std::uint64_t PrefixTree::hash(std::uint32_t parent, const std::int64_t* token) const noexcept {
  return XXH3_64bits_withSeed(token, ids_per_token_ * sizeof *token, parent);
}

std::uint32_t PrefixTree::child(std::uint32_t parent, const std::int64_t* token) const noexcept {
  const auto [first, last] = index_.equal_range(hash(parent, token));
  for (auto it = first; it != last; ++it) {
    const Node& node = at(it->second);
    if (node.parent == parent && std::equal(token, token + ids_per_token_, node.tokens.begin())) return it->second;
  }
  return kNone;
}

PrefixTree::Index::iterator PrefixTree::indexed(std::uint32_t node) noexcept {
  auto it = index_.find(hash(at(node).parent, at(node).tokens.data()));
  while (it->second != node) ++it;
  return it;
}

std::uint32_t PrefixTree::take_slot() noexcept {
  const std::uint32_t slot = free_;
  free_ = std::exchange(at(slot).parent, kNone);
  ++used_;
  return slot;
}

void PrefixTree::free_slot(std::uint32_t slot) noexcept {
  Node& node = at(slot);
  std::pmr::vector<std::int64_t>(memory_).swap(node.tokens);
  node.first_child = node.last_child = node.previous = node.next = kNone;
  node.parent = free_;
  free_ = slot;
  --used_;
}

}  // namespace llmcache
