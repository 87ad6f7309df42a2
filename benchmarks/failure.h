// The one kind of error that the benchmark shows to its user.
#pragma once

#include <stdexcept>

namespace llmcache::bench {

/// Bad arguments, a missing or damaged file, a model that fails. The text is one line: what was
/// found, what was expected, what to do.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace llmcache::bench
