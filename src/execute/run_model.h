// Telling what the model raises from all other errors.
#pragma once

#include <exception>

#include "llmcache/error.h"

namespace llmcache {

/// Runs the model; what it raises becomes Error(kModelFailed) with the original nested. An Error passes as it is.
template <class Run>
auto run_model(const Run& run) {
  try {
    return run();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(Error(ErrorCode::kModelFailed, error.what()));
  } catch (...) {
    std::throw_with_nested(Error(ErrorCode::kModelFailed, "it threw something that is no std::exception"));
  }
}

}  // namespace llmcache
