// Makes one allocation of this thread fail, to see what is left behind.
#pragma once

#include <cstddef>

namespace llmcache::test {

/// While it lives the allocation number `number` (0: the next) of this thread by operator new throws std::bad_alloc,
/// once. Other threads are not touched. Link failing_allocation.cpp, which replaces operator new.
class FailingAllocation {
 public:
  explicit FailingAllocation(std::size_t number);
  ~FailingAllocation();
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;
  /// True if there was an allocation of that number.
  [[nodiscard]] bool fired() const;
};

}  // namespace llmcache::test
