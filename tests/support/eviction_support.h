// What the tests of eviction policies and of the TTL queue share. No model and no LibTorch.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory_resource>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/bank/eviction.h"
#include "llmcache/error.h"

namespace llmcache::test {

using Slot = std::uint32_t;

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr EntryCost kPlain{1000, 1.0};

/// Counts bytes, and refuses allocations when told to.
class CountingResource final : public std::pmr::memory_resource {
 public:
  std::size_t used = 0;
  std::size_t allocations = 0;
  std::optional<std::size_t> allocations_left;  ///< before std::bad_alloc

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (allocations_left) {
      if (*allocations_left == 0) throw std::bad_alloc();
      --*allocations_left;
    }
    void* memory = std::pmr::new_delete_resource()->allocate(bytes, alignment);
    used += bytes;
    ++allocations;
    return memory;
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    used -= bytes;
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

inline void expect_error(const std::function<void()>& function, const std::string& part) {
  try {
    function();
    FAIL() << "no Error; expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidOptions);
    EXPECT_THAT(error.what(), ::testing::HasSubstr(part));
  }
}

/// Evicts everything; the slots in order.
template <typename Policy>
std::vector<Slot> drain(Policy& policy, double now_s) {
  std::vector<Slot> order;
  while (const auto slot = policy.victim(now_s)) {
    order.push_back(*slot);
    policy.erase(*slot);
    if (order.size() > 10'000'000) break;
  }
  return order;
}

/// Evicts one; fails the test if nothing is held.
template <typename Policy>
Slot evict(Policy& policy, double now_s = 0) {
  const auto slot = policy.victim(now_s);
  EXPECT_TRUE(slot.has_value());
  if (!slot) return kNoSlot;
  policy.erase(*slot);
  return *slot;
}

}  // namespace llmcache::test
