// What tensors take, beside their data too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <cstddef>

namespace llmcache {

/// Bytes of the objects behind a tensor with a storage of its own.
inline constexpr std::size_t kTensorOverhead = sizeof(c10::TensorImpl) + sizeof(c10::StorageImpl);

/// What is taken for `bytes` of data: on a CPU just these; on other devices, whose allocators hand out whole steps,
/// that many steps. 512 bytes are CUDA's.
inline std::size_t taken_bytes(std::size_t bytes, c10::Device device) {
  constexpr std::size_t kStep = 512;
  return device.is_cpu() || device.is_meta() ? bytes : (bytes + kStep - 1) / kStep * kStep;
}

/// For the data of a tensor that has its storage to itself.
inline std::size_t taken_bytes(const at::Tensor& tensor) { return taken_bytes(tensor.nbytes(), tensor.device()); }

/// True if nobody but the caller holds the tensor or its memory, all of which is the tensor's: it may be kept as it is,
/// and takes what a copy would.
bool owns_memory(const at::Tensor& tensor);

}  // namespace llmcache
