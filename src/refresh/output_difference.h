// How far a served answer is from the full computation.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "llmcache/refresh/options.h"
#include "refresh/divergence_monitor.h"

namespace llmcache {

/// Tensors of one sequence's output, in order and of equal shapes. Not finite: infinitely far.
OutputDifference difference_of_outputs(const std::vector<at::Tensor>& served, const std::vector<at::Tensor>& full,
                                       const DecisionFunction& decision);

}  // namespace llmcache
