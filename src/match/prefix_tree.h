// Which sequences have a prefix in common: a radix tree over tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory_resource>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace llmcache {

/// A radix tree for each partition. A token is a tuple of `ids_per_token` numbers; a node holds one token or more, the
/// root of a partition none. The children of a node differ in their first token. A root exists as long as it has
/// children.
///
/// Nodes are named by slots: small dense numbers, used again when the node is gone. What a node stands for is the
/// caller's affair; he keeps it by slot.
///
/// Cost: finding a child is O(1) on average, however many there are; a match is O(tokens) and every change O(tokens of
/// the node).
///
/// Memory: all of it comes from the resource given, which must outlive the tree and may throw std::bad_alloc; then
/// nothing has changed. It is given back when the tree is empty.
///
/// Thread safety: none; the bank locks.
class PrefixTree {
 public:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  /// The longest known prefix of a sequence.
  struct Match {
    std::uint32_t node = kNone;  ///< where it ends; the root if it is empty, kNone if the partition is not known
    std::size_t in_node = 0;     ///< how many tokens of that node belong to it: at least one, but for the root
    std::size_t tokens = 0;      ///< length of the prefix
  };

  PrefixTree(std::size_t ids_per_token, std::pmr::memory_resource* memory);
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  [[nodiscard]] Match match(std::string_view partition, std::span<const std::int64_t> tokens) const noexcept;

  /// The slot that the next new node will get (a root too), so that the caller can make room beside it. May throw.
  std::uint32_t next_slot();
  /// The root of the partition, made if there is none. May throw. Whoever makes one attaches a child to it, or calls
  /// drop_if_empty.
  std::uint32_t root(std::string_view partition);
  /// A new child. No child of `parent` may begin with the first of these tokens. May throw.
  std::uint32_t attach(std::uint32_t parent, std::span<const std::int64_t> tokens);
  /// Cuts a node behind its first `count` tokens, some but not all of them. They move to a new node above; the rest
  /// keeps the slot and the children. Returns the new node. May throw.
  std::uint32_t split(std::uint32_t node, std::size_t count);
  /// Adds tokens to the end of a leaf. May throw.
  void extend(std::uint32_t leaf, std::span<const std::int64_t> tokens);
  /// Removes a leaf, and the root above it if that has no other child.
  void remove(std::uint32_t leaf) noexcept;
  /// Removes the root of the partition if it has no child. To be called when a change has failed.
  void drop_if_empty(std::string_view partition) noexcept;
  void clear() noexcept;

  /// True if there is neither a node nor a root.
  [[nodiscard]] bool empty() const noexcept { return used_ == 0; }
  /// All slots in use are below this.
  [[nodiscard]] std::size_t slots() const noexcept { return nodes_ ? nodes_->size() : 0; }

  // Of a slot in use; for the last two kNone if there is none.
  [[nodiscard]] bool is_root(std::uint32_t node) const noexcept { return at(node).parent == kNone; }
  [[nodiscard]] bool is_leaf(std::uint32_t node) const noexcept { return at(node).first_child == kNone; }
  [[nodiscard]] std::size_t size(std::uint32_t node) const noexcept { return at(node).tokens.size() / ids_per_token_; }
  [[nodiscard]] std::span<const std::int64_t> tokens(std::uint32_t node) const noexcept { return at(node).tokens; }
  /// Of a root.
  [[nodiscard]] std::string_view partition(std::uint32_t root) const noexcept { return at(root).partition->first; }
  [[nodiscard]] std::uint32_t parent(std::uint32_t node) const noexcept { return at(node).parent; }
  /// In the order in which they were attached.
  [[nodiscard]] std::uint32_t first_child(std::uint32_t node) const noexcept { return at(node).first_child; }
  [[nodiscard]] std::uint32_t next_sibling(std::uint32_t node) const noexcept { return at(node).next; }

 private:
  using Partitions = std::pmr::map<std::pmr::string, std::uint32_t, std::less<>>;
  using Index = std::pmr::unordered_multimap<std::uint64_t, std::uint32_t>;

  struct Node {
    explicit Node(std::pmr::memory_resource* memory) : tokens(memory) {}
    std::pmr::vector<std::int64_t> tokens;  ///< token after token, ids_per_token numbers each
    Partitions::iterator partition;         ///< of a root
    std::uint32_t parent = kNone;           ///< of a free slot: the next free one
    std::uint32_t first_child = kNone;
    std::uint32_t last_child = kNone;
    std::uint32_t previous = kNone;  ///< sibling
    std::uint32_t next = kNone;      ///< sibling
  };

  [[nodiscard]] Node& at(std::uint32_t slot) noexcept { return (*nodes_)[slot]; }
  [[nodiscard]] const Node& at(std::uint32_t slot) const noexcept { return (*nodes_)[slot]; }
  [[nodiscard]] std::uint64_t hash(std::uint32_t parent, const std::int64_t* token) const noexcept;
  [[nodiscard]] std::uint32_t child(std::uint32_t parent, const std::int64_t* token) const noexcept;
  [[nodiscard]] Index::iterator indexed(std::uint32_t node) noexcept;
  std::uint32_t take_slot() noexcept;
  void free_slot(std::uint32_t slot) noexcept;
  void drop_if_empty(Partitions::iterator partition) noexcept;

  const std::size_t ids_per_token_;
  std::pmr::memory_resource* const memory_;
  Partitions partitions_;  ///< roots
  /// By slot. None while the tree is empty: an empty one takes memory. It grows without being copied.
  std::optional<std::pmr::deque<Node>> nodes_;
  Index index_;                 ///< all nodes but the roots, by the hash of their parent and their first token
  std::uint32_t free_ = kNone;  ///< the first free slot
  std::size_t used_ = 0;        ///< slots in use
};

}  // namespace llmcache
