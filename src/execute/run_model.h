// Telling what the model raises from all other errors.
#pragma once

#include <exception>

#include "llmcache/error.h"
#include "model/probe.h"

namespace llmcache {

/// Runs the model; what it raises becomes Error(kModelFailed) that says the reason in one line, with the original,
/// whose text has the trace too, nested. An Error passes as it is.
template <class Run>
auto run_model(const Run& run) {
  try {
    return run();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(Error(ErrorCode::kModelFailed, reason_of(error)));
  } catch (...) {
    std::throw_with_nested(Error(ErrorCode::kModelFailed, "it threw something that is no std::exception"));
  }
}

}  // namespace llmcache
