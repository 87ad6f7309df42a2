// Rows of numbers under small ids, in blocks that come and go with the ids in them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <type_traits>
#include <vector>

namespace llmcache {

/// kRows consecutive ids share a block of `elements` numbers, whose layout is the caller's affair. A
/// block is allocated when the first of its ids is used, and freed with the last. Growing never moves a block.
template <class T, std::uint32_t kRows>
class IdChunks {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  static constexpr std::size_t kAlignment = 64;

  explicit IdChunks(std::pmr::memory_resource* memory) : chunks_(memory) {}
  ~IdChunks() { clear(); }
  IdChunks(const IdChunks&) = delete;
  IdChunks& operator=(const IdChunks&) = delete;

  /// Numbers of a block. May be changed while there are no blocks.
  void set_elements(std::size_t elements) noexcept { elements_ = elements; }

  /// Makes sure that the id has a block, filled with zeros if it is new. May throw; then nothing has changed.
  void reserve(std::uint32_t id) {
    const std::size_t number = id / kRows;
    if (number < chunks_.size() && chunks_[number].data) return;
    const std::size_t old_size = chunks_.size();
    if (number >= old_size) chunks_.resize(number + 1);
    try {
      chunks_[number].data = static_cast<T*>(resource()->allocate(elements_ * sizeof(T), kAlignment));
    } catch (...) {
      chunks_.resize(old_size);
      if (old_size == 0) release_table();
      throw;
    }
    std::fill_n(chunks_[number].data, elements_, T{});
  }
  /// Counts a reserved id as used.
  void take(std::uint32_t id) noexcept { ++chunks_[id / kRows].used; }
  /// Undoes `take`.
  void drop(std::uint32_t id) noexcept {
    --chunks_[id / kRows].used;
    cancel(id);
  }
  /// Undoes `reserve` of an id that was not taken.
  void cancel(std::uint32_t id) noexcept {
    const std::size_t number = id / kRows;
    if (number >= chunks_.size() || chunks_[number].used != 0 || !chunks_[number].data) return;
    free(chunks_[number]);
    while (!chunks_.empty() && !chunks_.back().data) chunks_.pop_back();
    if (chunks_.empty()) release_table();
  }

  /// The block of an id, or null.
  [[nodiscard]] T* find(std::uint32_t id) const noexcept {
    const std::size_t number = id / kRows;
    return number < chunks_.size() ? chunks_[number].data : nullptr;
  }
  /// The block of an id that has one.
  [[nodiscard]] T* operator[](std::uint32_t id) const noexcept { return chunks_[id / kRows].data; }

  /// Blocks are numbered 0 to count() - 1; some may be null.
  [[nodiscard]] std::size_t count() const noexcept { return chunks_.size(); }
  [[nodiscard]] T* chunk(std::size_t number) const noexcept { return chunks_[number].data; }

  void clear() noexcept {
    for (Chunk& chunk : chunks_) free(chunk);
    chunks_.clear();
    release_table();
  }

 private:
  struct Chunk {
    T* data = nullptr;
    std::uint32_t used = 0;
  };

  [[nodiscard]] std::pmr::memory_resource* resource() const { return chunks_.get_allocator().resource(); }
  void free(Chunk& chunk) noexcept {
    if (chunk.data) resource()->deallocate(chunk.data, elements_ * sizeof(T), kAlignment);
    chunk = {};
  }
  void release_table() noexcept { std::pmr::vector<Chunk>(chunks_.get_allocator()).swap(chunks_); }

  std::size_t elements_ = 0;
  std::pmr::vector<Chunk> chunks_;
};

/// One bit for each id of a block of 64 * kWords ids.
inline bool bit_at(const std::uint64_t* words, std::uint32_t row) noexcept {
  return (words[row / 64] >> (row % 64)) & 1;
}
inline void flip_bit(std::uint64_t* words, std::uint32_t row) noexcept {
  words[row / 64] ^= std::uint64_t{1} << (row % 64);
}

}  // namespace llmcache
