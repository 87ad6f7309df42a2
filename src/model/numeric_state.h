// What decides a model's numbers beside its weights and inputs.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <string>

namespace llmcache {

/// Settings of the calling thread and of the process that change results: kept ones hold under those only that they
/// were computed under. Number of threads, gradients and inference mode are none.
struct NumericState {
  bool autocast = false;
  at::ScalarType autocast_type = at::kFloat;  ///< if `autocast`
  at::ScalarType default_type = at::kFloat;   ///< of new tensors
  bool deterministic = false;
  int matmul_precision = 0;  ///< at::Float32MatmulPrecision
  bool onednn = true;

  bool operator==(const NumericState&) const = default;
};

/// Those of now, of this thread, for a model on `device`. Cheap.
NumericState numeric_state(at::Device device);

/// All of it in one line: the same in every process with the same settings.
std::string to_string(const NumericState& state);

/// What is other in `now`, for people.
std::string what_changed(const NumericState& then, const NumericState& now);

}  // namespace llmcache
