#include "reuse/similarity/similarity_keys.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include "bank/tenant_key.h"

namespace llmcache {

std::string similarity_partition(const Batch& batch, std::string_view tenant) {
  std::string partition;
  append_tenant(partition, tenant);
  return partition + batch.types;
}

std::uint64_t similarity_key(const std::string& partition, const std::vector<at::Tensor>& inputs) {
  std::uint64_t hash = XXH3_64bits(partition.data(), partition.size());
  for (const at::Tensor& input : inputs) {
    if (!input.defined()) continue;
    const auto own = input.cpu();
    hash = XXH3_64bits_withSeed(own.const_data_ptr(), own.nbytes(), hash);
  }
  return hash;
}

}  // namespace llmcache
