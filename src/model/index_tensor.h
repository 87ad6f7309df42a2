// Numbers of the host, as a tensor where a model runs.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace llmcache {

/// `numbers` as int64 on `device`, by one copy, for which nobody waits: memory that is not pinned has been read when
/// to() returns.
inline at::Tensor index_tensor(at::ArrayRef<std::int64_t> numbers, at::Device device) {
  return at::tensor(numbers, at::TensorOptions().dtype(at::kLong)).to(device, /*non_blocking=*/true);
}

}  // namespace llmcache
