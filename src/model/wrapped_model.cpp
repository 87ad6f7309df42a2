#include "model/wrapped_model.h"

#include <algorithm>

namespace llmcache {

bool WrappedModel::all_per_token() const noexcept {
  return std::all_of(output.leaves.begin(), output.leaves.end(),
                     [](const TokenDims& dims) { return dims.tokens >= 0; });
}

}  // namespace llmcache
