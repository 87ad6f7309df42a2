#include "protected_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace llmcache::test {
namespace {

/// As allocators of devices have it: less than this is never taken.
constexpr std::size_t kStep = 512;

std::uint8_t* map_whole(int file, std::size_t size, int protection) {
  void* at = ::mmap(nullptr, size, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (at == MAP_FAILED) throw std::runtime_error("mmap of the protected device's memory failed");
  return static_cast<std::uint8_t*>(at);
}

}  // namespace

ProtectedMemory::ProtectedMemory(std::size_t bytes) : size_(bytes) {
  const int file = ::memfd_create("protected-device", MFD_CLOEXEC);
  if (file < 0 || ::ftruncate(file, static_cast<off_t>(size_)) != 0) {
    throw std::runtime_error("no memory file for the protected device");
  }
  guarded_ = map_whole(file, size_, PROT_NONE);
  open_ = map_whole(file, size_, PROT_READ | PROT_WRITE);
  ::close(file);
  free_.emplace(0, size_);
}

ProtectedMemory::~ProtectedMemory() {
  ::munmap(guarded_, size_);
  ::munmap(open_, size_);
}

void* ProtectedMemory::allocate(std::size_t bytes) {
  const std::size_t size = (bytes + kStep - 1) / kStep * kStep;
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& hole) { return hole.second >= size; });
  if (found == free_.end()) throw std::runtime_error("the protected device is out of memory");
  const auto [offset, hole] = *found;
  free_.erase(found);
  if (hole > size) free_.emplace(offset + size, hole - size);
  used_.emplace(offset, size);
  bytes_in_use_ += size;
  return guarded_ + offset;
}

void ProtectedMemory::free(void* address) {
  const std::lock_guard lock(mutex_);
  const auto used = used_.find(static_cast<std::size_t>(static_cast<std::uint8_t*>(address) - guarded_));
  if (used == used_.end()) std::terminate();  // a deleter has nobody to tell
  auto [offset, size] = *used;
  used_.erase(used);
  bytes_in_use_ -= size;
  if (const auto next = free_.find(offset + size); next != free_.end()) {
    size += next->second;
    free_.erase(next);
  }
  const auto after = free_.lower_bound(offset);
  if (after != free_.begin() && std::prev(after)->first + std::prev(after)->second == offset) {
    std::prev(after)->second += size;
  } else {
    free_.emplace(offset, size);
  }
}

void* ProtectedMemory::shadow(const void* address) const {
  return open_ + (static_cast<const std::uint8_t*>(address) - guarded_);
}

bool ProtectedMemory::contains(const void* address) const {
  const auto* at = static_cast<const std::uint8_t*>(address);
  return at >= guarded_ && at < guarded_ + size_;
}

std::size_t ProtectedMemory::bytes_in_use() const {
  const std::lock_guard lock(mutex_);
  return bytes_in_use_;
}

}  // namespace llmcache::test
