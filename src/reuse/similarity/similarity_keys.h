// What tells sequences apart in the banks of the paper's mode.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "execute/batch.h"

namespace llmcache {

/// Rows of other partitions share nothing with those of this one: tenant, types of the inputs.
std::string similarity_partition(const Batch& batch, std::string_view tenant);

/// Hash of what a sequence's entries are made from, in its partition. `inputs`: of the model, some undefined.
std::uint64_t similarity_key(const std::string& partition, const std::vector<at::Tensor>& inputs);

}  // namespace llmcache
