#include "bank/state_format.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

namespace llmcache {

std::size_t AsComputed::bytes(const KeySpec& spec, std::int64_t tokens) const {
  std::size_t bytes = spec.options.dtype().itemsize() * static_cast<std::size_t>(tokens);
  for (std::size_t i = 0; i < spec.sizes.size(); ++i) {
    if (static_cast<std::int64_t>(i) != spec.token_dim) bytes *= static_cast<std::size_t>(spec.sizes[i]);
  }
  return bytes + sizeof(c10::TensorImpl) + sizeof(c10::StorageImpl) + sizeof(at::Tensor);
}

std::vector<at::Tensor> AsComputed::encode(const KeySpec& /*spec*/, const at::Tensor& state) const {
  // A tensor made in inference mode could not be used outside of it.
  const c10::InferenceMode normal(false);
  return {state.detach().clone(at::MemoryFormat::Contiguous)};
}

at::Tensor AsComputed::decode(const KeySpec& spec, const std::vector<at::Tensor>& stored, std::int64_t begin,
                              std::int64_t tokens) const {
  return stored[0].narrow(spec.token_dim, begin, tokens);
}

}  // namespace llmcache
