// Memory that fails at every place of a step, one after another.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <exception>
#include <functional>

#include "failing_allocation.h"

namespace llmcache::test {

/// Runs `step` with the first, the second, ... allocation failing, until none does. `check` after each.
inline void at_every_allocation(const std::function<void()>& step, const std::function<void(bool threw)>& check) {
  for (std::size_t number = 0;; ++number) {
    SCOPED_TRACE(::testing::Message() << "allocation " << number);
    bool fired = false;
    bool threw = false;
    {
      const FailingAllocation failing(number);
      try {
        step();
      } catch (const std::exception&) {
        threw = true;
      }
      fired = failing.fired();
    }
    check(threw);
    if (::testing::Test::HasFailure()) return;
    if (!fired) return;
    ASSERT_LT(number, 100000u);
  }
}

}  // namespace llmcache::test
