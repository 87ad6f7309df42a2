#include "bank/memory.h"

#include <algorithm>

namespace llmcache {

bool MemoryAccount::try_reserve(std::size_t bytes) noexcept {
  std::size_t used = used_.load();
  do {
    if (bytes > limit_ || used > limit_ - bytes) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes));
  if (total_ != nullptr && !total_->try_reserve(bytes)) {
    used_.fetch_sub(bytes);
    return false;
  }
  const std::size_t now = used + bytes;
  std::size_t peak = peak_.load();
  while (peak < now && !peak_.compare_exchange_weak(peak, now)) {
  }
  return true;
}

void MemoryAccount::release(std::size_t bytes) noexcept {
  if (total_ != nullptr) total_->release(bytes);
  used_.fetch_sub(bytes);
}

std::size_t MemoryAccount::left() const noexcept {
  const std::size_t own = limit_ - used();
  return total_ == nullptr ? own : std::min(own, total_->left());
}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  if (this == &other) return *this;
  release();
  account_ = std::exchange(other.account_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  charged_ = std::exchange(other.charged_, nullptr);
  charged_bytes_ = std::exchange(other.charged_bytes_, 0);
  return *this;
}

std::optional<Reservation> Reservation::of(MemoryAccount& account, std::size_t bytes) noexcept {
  if (!account.try_reserve(bytes)) return std::nullopt;
  Reservation reserved;
  reserved.account_ = &account;
  reserved.bytes_ = bytes;
  return reserved;
}

void Reservation::shrink_to(std::size_t bytes) noexcept {
  if (bytes >= bytes_) return;
  account_->release(bytes_ - bytes);
  if (charged_ != nullptr) {
    charged_->release(bytes_ - bytes);
    charged_bytes_ -= bytes_ - bytes;
  }
  bytes_ = bytes;
}

void Reservation::charge_to(MemoryAccount& account, std::size_t bytes) noexcept {
  charged_ = &account;
  charged_bytes_ = bytes;
}

void Reservation::release() noexcept {
  shrink_to(0);
  if (MemoryAccount* const charged = std::exchange(charged_, nullptr)) {
    charged->release(std::exchange(charged_bytes_, 0));
  }
}

void* AccountedResource::do_allocate(std::size_t bytes, std::size_t alignment) {
  if (!account_.try_reserve(bytes)) throw std::bad_alloc();
  try {
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  } catch (...) {
    account_.release(bytes);
    throw;
  }
}

void AccountedResource::do_deallocate(void* pointer, std::size_t bytes, std::size_t alignment) {
  std::pmr::new_delete_resource()->deallocate(pointer, bytes, alignment);
  account_.release(bytes);
}

}  // namespace llmcache
