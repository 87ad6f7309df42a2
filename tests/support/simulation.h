// What tests by simulation share. All draws are seeded.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "llmcache/error.h"

namespace llmcache {

/// In [0, 1).
inline double uniform(std::mt19937_64& generator) { return static_cast<double>(generator() >> 11) * 0x1p-53; }

/// Three standard errors of a share among `draws` whose truth is `limit`.
inline double three_errors(int draws, double limit) { return 3 * std::sqrt(limit * (1 - limit) / draws); }

inline void expect_error(ErrorCode code, const char* text, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error where '" << text << "' was expected";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_THAT(error.what(), ::testing::HasSubstr(text));
  }
}

}  // namespace llmcache
