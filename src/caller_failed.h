// What a function of the caller's raised, on its way through code that angles other errors into Error.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "llmcache/error.h"
#include "llmcache/options.h"

namespace llmcache {

/// Nests the original; the public call that the function was given to lets that one out (as_the_caller_threw()).
class CallerFailed : public Error {
 public:
  explicit CallerFailed(const std::string& message) : Error(ErrorCode::kInvalidOptions, message) {}
};

/// Calls a function of the caller's, `name` by its public name.
template <class Call>
auto call_the_callers(const char* name, const Call& call) {
  try {
    return call();
  } catch (const std::exception& error) {
    std::throw_with_nested(CallerFailed(std::string(name) + " raised: " + error.what()));
  } catch (...) {
    std::throw_with_nested(CallerFailed(std::string(name) + " threw something that is no std::exception"));
  }
}

/// Runs it; what a function of the caller's raised passes through as it was.
template <class Run>
auto as_the_caller_threw(const Run& run) {
  try {
    return run();
  } catch (const CallerFailed& failed) {
    std::rethrow_if_nested(failed);
    throw;
  }
}

/// Tells Options::progress, if it is set.
inline void tell(const ProgressFunction& progress, const char* step, std::int64_t done = 0, std::int64_t total = 0) {
  if (progress) call_the_callers("Options.progress", [&] { progress({step, done, total}); });
}

}  // namespace llmcache
