// Weights::kFastest: which format multiplies fastest on this CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "llmcache/options.h"
#include "model/int8_recipe.h"

namespace llmcache {

/// Linear layers of one shape in a model.
struct LayerShape {
  at::Tensor weight;  ///< `[out, in]`, of one of them
  std::int64_t layers = 0;
  const Int8Recipe* recipe = nullptr;  ///< with which kPackedInt8 would pack it; null: without
};

/// A format, and in one sentence how fast it is.
struct RankedFormat {
  Weights weights = Weights::kAsLoaded;
  std::string reason;
};

/// The formats that are available for all of `shapes`, fastest first, by the time of one product for each layer with 1,
/// 4 and 16 rows, and with 64 and 128. Few and many rows count alike. kAsLoaded is always among them.
std::vector<RankedFormat> rank_formats(const std::vector<LayerShape>& shapes, bool may_be_int8);

}  // namespace llmcache
