// Errors for what a caller gave, in one word.
#pragma once

#include <string>

#include "llmcache/error.h"

namespace llmcache {

[[noreturn]] inline void refuse_input(const std::string& message) { throw Error(ErrorCode::kInvalidInput, message); }
[[noreturn]] inline void refuse_file(const std::string& message) { throw Error(ErrorCode::kInvalidFile, message); }
[[noreturn]] inline void refuse_options(const std::string& message) {
  throw Error(ErrorCode::kInvalidOptions, message);
}

}  // namespace llmcache
