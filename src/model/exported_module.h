// An exported program as a TorchScript module in memory. Internal to model/exported*.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <map>
#include <string>

#include "model/exported_program.h"

namespace llmcache::exported {

/// Name of an attribute of the outermost module: the largest number of tokens that it was exported for. There is none
/// where it was exported for any.
inline constexpr const char* kMostTokens = "llmcache_most_tokens";

/// A module for each that the program calls, with its weights, and a method for each of its calls. Weights must be on
/// `device`. Throws Refused, DamagedData, and what LibTorch throws for a program that it cannot hold.
torch::jit::Module make_module(const Program& program, const std::map<std::string, at::Tensor>& weights,
                               at::Device device);

}  // namespace llmcache::exported
