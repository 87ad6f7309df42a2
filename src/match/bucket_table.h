// A table of buckets that hold ids and, beside each other, a few words by which most of them are ruled out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory_resource>
#include <new>
#include <vector>

#include "fingerprint/kernels.h"

namespace llmcache {

/// Bucket b holds items 0 ... size - 1; item i has kWords words (one after the other: words of item 0,
/// words of item 1, ...) and an id. Whoever adds an item keeps its position; removing one moves the
/// last item of the bucket to its place, and says so.
template <std::size_t kWords>
class BucketTable {
 public:
  struct Bucket {
    std::uint64_t* words = nullptr;  ///< [capacity * kWords], then uint32 ids [capacity]
    std::uint32_t size = 0;
    std::uint32_t capacity = 0;

    [[nodiscard]] std::uint32_t* ids() const noexcept {
      return reinterpret_cast<std::uint32_t*>(words + std::size_t{capacity} * kWords);
    }
  };
  /// A bucket's capacity is a multiple of this, and all its words may be read: those behind the last item are zero, or
  /// left over.
  static constexpr std::uint32_t kGroup = 4;
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  explicit BucketTable(std::pmr::memory_resource* memory) : buckets_(memory) {}
  ~BucketTable() { clear(); }
  BucketTable(const BucketTable&) = delete;
  BucketTable& operator=(const BucketTable&) = delete;

  /// Makes `count` empty buckets, where there were none. May throw; then there are none.
  void create(std::size_t count) { buckets_.resize(count); }
  [[nodiscard]] bool created() const noexcept { return !buckets_.empty(); }
  [[nodiscard]] const Bucket* data() const noexcept { return buckets_.data(); }

  /// Makes sure that the next `append` to this bucket finds room. May throw; then nothing has changed.
  void reserve(std::size_t bucket) {
    Bucket& entry = buckets_[bucket];
    if (entry.size == entry.capacity) resize(entry, entry.capacity + entry.capacity / 2 + 1);
  }
  /// The position of the new item. The room must have been reserved.
  std::uint32_t append(std::size_t bucket, const std::uint64_t* words, std::uint32_t id) noexcept {
    Bucket& entry = buckets_[bucket];
    std::memcpy(entry.words + std::size_t{entry.size} * kWords, words, kWords * sizeof *words);
    entry.ids()[entry.size] = id;
    return entry.size++;
  }
  /// The id of the item that is at this position now, or kNone if it was the last one.
  std::uint32_t remove(std::size_t bucket, std::uint32_t position) noexcept {
    Bucket& entry = buckets_[bucket];
    const std::uint32_t last = --entry.size;
    std::uint32_t moved = kNone;
    if (position != last) {
      std::memcpy(entry.words + std::size_t{position} * kWords, entry.words + std::size_t{last} * kWords,
                  kWords * sizeof *entry.words);
      moved = entry.ids()[position] = entry.ids()[last];
    }
    shrink(entry);
    return moved;
  }

  void clear() noexcept {
    for (Bucket& entry : buckets_) free(entry);
    std::pmr::vector<Bucket>(buckets_.get_allocator()).swap(buckets_);
  }

 private:
  static constexpr std::size_t kAlignment = 16;
  static constexpr std::size_t kItemBytes = kWords * sizeof(std::uint64_t) + sizeof(std::uint32_t);

  [[nodiscard]] std::pmr::memory_resource* resource() const { return buckets_.get_allocator().resource(); }
  void free(Bucket& entry) noexcept {
    if (entry.words) resource()->deallocate(entry.words, entry.capacity * kItemBytes, kAlignment);
    entry = {};
  }
  void resize(Bucket& entry, std::uint32_t capacity) {
    capacity = (capacity + kGroup - 1) / kGroup * kGroup;
    Bucket next;
    next.words = static_cast<std::uint64_t*>(resource()->allocate(capacity * kItemBytes, kAlignment));
    next.capacity = capacity;
    next.size = entry.size;
    std::memset(next.words + entry.size * kWords, 0, (capacity - entry.size) * kWords * sizeof *next.words);
    if (entry.size > 0) {
      std::memcpy(next.words, entry.words, entry.size * kWords * sizeof *entry.words);
      std::memcpy(next.ids(), entry.ids(), entry.size * sizeof(std::uint32_t));
    }
    free(entry);
    entry = next;
  }
  /// Gives memory back where most of it is unused; keeps it if there is none for the smaller copy.
  void shrink(Bucket& entry) noexcept {
    if (entry.size == 0) return free(entry);
    if (entry.size > entry.capacity / 4 || entry.capacity <= 8) return;
    try {
      resize(entry, entry.capacity / 2);
    } catch (...) {  // the bucket stays as it was, larger than it needs to be
      return;
    }
  }

  std::pmr::vector<Bucket> buckets_;
};

}  // namespace llmcache
