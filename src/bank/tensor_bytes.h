// What tensors take beside their data.
#pragma once

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <cstddef>

namespace llmcache {

/// Bytes of the objects behind a tensor with a storage of its own.
inline constexpr std::size_t kTensorOverhead = sizeof(c10::TensorImpl) + sizeof(c10::StorageImpl);

}  // namespace llmcache
