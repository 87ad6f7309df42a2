// Values under slots that are used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "llmcache/bank/slot_table.h"

namespace llmcache {

/// Values under small dense numbers, for which it chooses the one that became free last. All operations are O(1),
/// insert amortised. All memory comes from the resource given, and is given back when nothing is held. Thread safety:
/// none; one thread at a time.
template <typename T>
class SlotVector {
 public:
  explicit SlotVector(std::pmr::memory_resource* memory) : cells_(memory) {}
  SlotVector(const SlotVector&) = delete;
  SlotVector& operator=(const SlotVector&) = delete;

  /// Throws std::bad_alloc; then nothing has changed. Moves the values that are held.
  std::uint32_t insert(T value) {
    static_assert(std::is_nothrow_move_constructible_v<T>);
    if (free_ == kNoSlot) {
      cells_.emplace_back();
      free_ = static_cast<std::uint32_t>(cells_.size() - 1);
    }
    const std::uint32_t slot = free_;
    cells_[slot].value.emplace(std::move(value));
    free_ = cells_[slot].next_free;
    ++size_;
    return slot;
  }
  /// Of a slot that is held.
  void erase(std::uint32_t slot) noexcept {
    cells_[slot].value.reset();
    cells_[slot].next_free = free_;
    free_ = slot;
    if (--size_ == 0) clear();
  }
  void clear() noexcept {
    Cells(cells_.get_allocator()).swap(cells_);
    free_ = kNoSlot;
    size_ = 0;
  }

  /// Null if the slot is not held.
  [[nodiscard]] T* find(std::uint32_t slot) noexcept {
    return slot < cells_.size() && cells_[slot].value ? &*cells_[slot].value : nullptr;
  }
  [[nodiscard]] const T* find(std::uint32_t slot) const noexcept {
    return slot < cells_.size() && cells_[slot].value ? &*cells_[slot].value : nullptr;
  }
  /// Of a slot that is held.
  [[nodiscard]] T& operator[](std::uint32_t slot) noexcept { return *cells_[slot].value; }
  [[nodiscard]] const T& operator[](std::uint32_t slot) const noexcept { return *cells_[slot].value; }

  /// Slots held.
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  /// All slots held are below this.
  [[nodiscard]] std::uint32_t end_slot() const noexcept { return static_cast<std::uint32_t>(cells_.size()); }

 private:
  struct Cell {
    std::optional<T> value;
    std::uint32_t next_free = kNoSlot;
  };
  using Cells = std::pmr::vector<Cell>;

  Cells cells_;
  std::uint32_t free_ = kNoSlot;  ///< first of a list through the cells
  std::size_t size_ = 0;
};

}  // namespace llmcache
