// The tensors of what a TorchScript module returns.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <vector>

namespace llmcache::bench {

/// In the order of the result, tuples opened, None left out. Throws Failure for anything else.
std::vector<at::Tensor> tensors_of(const c10::IValue& value);

}  // namespace llmcache::bench
