#include "bank/tensor_bytes.h"

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COW.h>

namespace llmcache {

bool owns_memory(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.use_count() != 1 || tensor.layout() != at::kStrided || !tensor.has_storage()) {
    return false;
  }
  const c10::Storage& storage = tensor.storage();
  if (storage.nbytes() != tensor.nbytes() || !tensor.is_non_overlapping_and_dense()) return false;
  if (c10::impl::cow::is_cow_data_ptr(storage.data_ptr())) return false;
  // A view holds what it is a view of; nobody else may.
  if (!tensor.is_view()) return storage.use_count() == 1;
  return storage.use_count() == 2 && tensor._base().use_count() == 1;
}

}  // namespace llmcache
