// Counting what a bank holds, and refusing to hold more.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory_resource>
#include <new>
#include <optional>
#include <utility>

namespace llmcache {

/// Bytes in use against a fixed limit. Thread-safe. Whoever takes bytes reserves them first, so the
/// limit holds at every moment, not only between operations.
///
/// An account may be part of a total, which sees all that is reserved and released in its parts, at once: its peak is
/// the most that they ever held together, which the sum of their own peaks is not. At every moment the total is at most
/// the sum of its parts.
class MemoryAccount {
 public:
  /// `total`: must outlive the account; null: it is part of none.
  explicit MemoryAccount(std::size_t limit, MemoryAccount* total = nullptr) : limit_(limit), total_(total) {}
  MemoryAccount(const MemoryAccount&) = delete;
  MemoryAccount& operator=(const MemoryAccount&) = delete;

  /// False, and nothing taken, if the limit would be passed, or that of the total.
  bool try_reserve(std::size_t bytes) noexcept;
  void release(std::size_t bytes) noexcept;

  [[nodiscard]] std::size_t limit() const noexcept { return limit_; }
  /// What can still be reserved, if nobody else does.
  [[nodiscard]] std::size_t left() const noexcept;
  [[nodiscard]] std::size_t used() const noexcept { return used_.load(); }
  [[nodiscard]] std::size_t peak() const noexcept { return peak_.load(); }

 private:
  const std::size_t limit_;
  MemoryAccount* const total_;
  std::atomic<std::size_t> used_{0};
  std::atomic<std::size_t> peak_{0};
};

/// Bytes of an account, released at its end. Whoever holds tensors has it as a member before them, so that it goes
/// after them. They may be charged to somebody else beside that (a tenant). Movable.
class Reservation {
 public:
  Reservation() = default;  ///< of nothing
  Reservation(Reservation&& other) noexcept
      : account_(std::exchange(other.account_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        charged_(std::exchange(other.charged_, nullptr)),
        charged_bytes_(std::exchange(other.charged_bytes_, 0)) {}
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation() { release(); }

  /// Empty if the account has not so many left.
  [[nodiscard]] static std::optional<Reservation> of(MemoryAccount& account, std::size_t bytes) noexcept;
  /// Releases what is more than that, also of what is charged.
  void shrink_to(std::size_t bytes) noexcept;
  /// Goes with these bytes of another account, bytes() or more, which were reserved there.
  void charge_to(MemoryAccount& account, std::size_t bytes) noexcept;

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] bool is_in(const MemoryAccount& account) const noexcept { return account_ == &account; }

 private:
  void release() noexcept;

  MemoryAccount* account_ = nullptr;
  std::size_t bytes_ = 0;
  MemoryAccount* charged_ = nullptr;
  std::size_t charged_bytes_ = 0;
};

/// Memory for containers, counted in an account; throws std::bad_alloc at its limit.
class AccountedResource final : public std::pmr::memory_resource {
 public:
  explicit AccountedResource(MemoryAccount& account) : account_(account) {}

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override;
  void do_deallocate(void* pointer, std::size_t bytes, std::size_t alignment) override;
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

  MemoryAccount& account_;
};

}  // namespace llmcache
