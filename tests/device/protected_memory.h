// Memory that no program can touch through the address it is known by: the memory of the protected device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace llmcache::test {

/// One block of memory mapped twice. What is handed out are addresses of a mapping that may be neither read nor
/// written, ever: a host that uses one dies by SIGSEGV. Kernels find the same bytes in a second mapping, by shadow().
/// Thread-safe.
class ProtectedMemory {
 public:
  /// Reserves addresses for `bytes`; memory is taken as it is used. Throws std::runtime_error.
  explicit ProtectedMemory(std::size_t bytes);
  ProtectedMemory(const ProtectedMemory&) = delete;
  ProtectedMemory& operator=(const ProtectedMemory&) = delete;
  ~ProtectedMemory();

  /// An address for `bytes` > 0. Throws std::runtime_error when the reserve is used up.
  void* allocate(std::size_t bytes);
  void free(void* address);
  /// Where a kernel reads and writes what `address` stands for.
  [[nodiscard]] void* shadow(const void* address) const;
  [[nodiscard]] bool contains(const void* address) const;
  /// Taken now, in whole steps of the allocator.
  [[nodiscard]] std::size_t bytes_in_use() const;

 private:
  std::size_t size_;
  std::uint8_t* guarded_ = nullptr;
  std::uint8_t* open_ = nullptr;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  ///< offset to size, no two adjacent
  std::map<std::size_t, std::size_t> used_;
  std::size_t bytes_in_use_ = 0;
};

}  // namespace llmcache::test
