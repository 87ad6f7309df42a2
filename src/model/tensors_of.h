// Tensors inside a model's result: one tensor, or tuples, lists and dictionaries of them, nested.
#pragma once

#include <ATen/core/ivalue.h>

#include <functional>
#include <vector>

namespace llmcache {

/// Every defined tensor in `value`, in order. `pure` (if given) is set to false if there is anything
/// else than tensors and None.
std::vector<at::Tensor> tensors_of(const c10::IValue& value, bool* pure = nullptr);

/// `value` with every defined tensor replaced by what `change` makes of it, called in the same order.
c10::IValue map_tensors(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change);

}  // namespace llmcache
