// What the eviction policies and the TTL queue are made of: a node for each slot that is held, and lists of slots that
// are linked through the nodes.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <memory_resource>
#include <type_traits>
#include <vector>

namespace llmcache {

/// No slot. Slots are numbers below this one.
inline constexpr std::uint32_t kNoSlot = std::numeric_limits<std::uint32_t>::max();

/// Nodes by slot. Slots are small dense numbers that are used again after `remove`, so this is an array and not a hash
/// table: pages of 128 nodes, made when their first slot is added and given back with their last one. Nodes never move.
///
/// All operations are O(1); `add` grows a directory of 8 bytes a page, amortised O(1). All memory comes from the
/// resource given, and all of it is given back when the table is empty.
/// Thread safety: none; one thread at a time.
template <typename Node>
class SlotTable {
  static_assert(std::is_trivially_copyable_v<Node> && std::is_trivially_destructible_v<Node>);

 public:
  /// `memory` must outlive the table. Takes no memory yet.
  explicit SlotTable(std::pmr::memory_resource* memory) : pages_(memory) {}
  ~SlotTable() { clear(); }
  SlotTable(const SlotTable&) = delete;
  SlotTable& operator=(const SlotTable&) = delete;

  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// Null if the slot is not held.
  [[nodiscard]] Node* find(std::uint32_t slot) noexcept {
    Page* page = page_of(slot);
    return page != nullptr && page->holds(slot % kPageSlots) ? &page->nodes[slot % kPageSlots] : nullptr;
  }
  [[nodiscard]] const Node* find(std::uint32_t slot) const noexcept {
    const Page* page = page_of(slot);
    return page != nullptr && page->holds(slot % kPageSlots) ? &page->nodes[slot % kPageSlots] : nullptr;
  }

  /// The node of a slot that is held; undefined for any other.
  [[nodiscard]] Node& at(std::uint32_t slot) noexcept { return pages_[slot / kPageSlots]->nodes[slot % kPageSlots]; }

  /// A value-initialised node for a slot that is not held. Throws what the resource throws (std::bad_alloc); then
  /// nothing has changed.
  Node& add(std::uint32_t slot) {
    const std::size_t number = slot / kPageSlots;
    if (page_of(slot) == nullptr) {
      try {
        if (number >= pages_.size()) pages_.resize(number + 1, nullptr);
        std::pmr::polymorphic_allocator<Page> allocator(pages_.get_allocator().resource());
        pages_[number] = std::construct_at(allocator.allocate(1));
      } catch (...) {
        trim();
        throw;
      }
    }
    Page& page = *pages_[number];
    page.mark(slot % kPageSlots);
    ++size_;
    Node& node = page.nodes[slot % kPageSlots];
    node = Node{};
    return node;
  }

  /// Forgets a slot that is held.
  void remove(std::uint32_t slot) noexcept {
    Page*& page = pages_[slot / kPageSlots];
    page->unmark(slot % kPageSlots);
    --size_;
    if (page->used == 0) {
      release(page);
      trim();
    }
  }

  void clear() noexcept {
    for (Page*& page : pages_) {
      if (page != nullptr) release(page);
    }
    size_ = 0;
    trim();
  }

  /// Calls `function(node)` for every slot held, in the order of slots.
  template <typename Function>
  void for_each(Function&& function) {
    for (Page* page : pages_) {
      if (page == nullptr) continue;
      for (std::uint32_t word = 0; word < page->held.size(); ++word) {
        for (std::uint64_t bits = page->held[word]; bits != 0; bits &= bits - 1) {
          function(page->nodes[word * 64 + static_cast<std::uint32_t>(std::countr_zero(bits))]);
        }
      }
    }
  }

 private:
  static constexpr std::uint32_t kPageSlots = 128;

  struct Page {
    std::array<std::uint64_t, kPageSlots / 64> held{};
    std::uint32_t used = 0;
    std::array<Node, kPageSlots> nodes{};

    [[nodiscard]] bool holds(std::uint32_t i) const noexcept { return (held[i / 64] >> (i % 64) & 1U) != 0; }
    void mark(std::uint32_t i) noexcept {
      held[i / 64] |= std::uint64_t{1} << (i % 64);
      ++used;
    }
    void unmark(std::uint32_t i) noexcept {
      held[i / 64] &= ~(std::uint64_t{1} << (i % 64));
      --used;
    }
  };

  [[nodiscard]] Page* page_of(std::uint32_t slot) const noexcept {
    const std::size_t number = slot / kPageSlots;
    return number < pages_.size() ? pages_[number] : nullptr;
  }

  void release(Page*& page) noexcept {
    std::pmr::polymorphic_allocator<Page>(pages_.get_allocator().resource()).deallocate(page, 1);
    page = nullptr;
  }

  /// Drops the end of the directory that points nowhere; of an empty directory the memory too.
  void trim() noexcept {
    while (!pages_.empty() && pages_.back() == nullptr) pages_.pop_back();
    if (pages_.empty()) std::pmr::vector<Page*>(pages_.get_allocator()).swap(pages_);
  }

  std::pmr::vector<Page*> pages_;
  std::size_t size_ = 0;
};

/// A doubly linked list of slots. The links are members `previous` and `next` of the nodes, so a list costs 8 bytes and
/// allocates nothing. All operations are O(1). A node is in one list at most; the caller knows in which.
struct SlotList {
  std::uint32_t first = kNoSlot;
  std::uint32_t last = kNoSlot;

  [[nodiscard]] bool empty() const noexcept { return first == kNoSlot; }

  template <typename Node>
  void push_back(SlotTable<Node>& table, std::uint32_t slot) noexcept {
    Node& node = table.at(slot);
    node.previous = last;
    node.next = kNoSlot;
    (last == kNoSlot ? first : table.at(last).next) = slot;
    last = slot;
  }

  template <typename Node>
  void unlink(SlotTable<Node>& table, std::uint32_t slot) noexcept {
    const Node& node = table.at(slot);
    (node.previous == kNoSlot ? first : table.at(node.previous).next) = node.next;
    (node.next == kNoSlot ? last : table.at(node.next).previous) = node.previous;
  }

  /// Appends the slots of the list, first to last.
  template <typename Node>
  void append_to(const SlotTable<Node>& table, std::vector<std::uint32_t>& slots) const {
    for (std::uint32_t slot = first; slot != kNoSlot; slot = table.find(slot)->next) slots.push_back(slot);
  }

  /// Moves all of `other` behind the last slot of this list, in order.
  template <typename Node>
  void splice_back(SlotTable<Node>& table, SlotList& other) noexcept {
    if (other.empty()) return;
    if (empty()) {
      first = other.first;
    } else {
      table.at(last).next = other.first;
      table.at(other.first).previous = last;
    }
    last = other.last;
    other = SlotList{};
  }
};

}  // namespace llmcache
