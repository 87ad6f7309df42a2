// An exported program as a TorchScript module in memory. Internal to model/exported*.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <map>
#include <string>

#include "model/exported_program.h"

namespace llmcache::exported {

/// Names of attributes of the outermost module, lists of whole numbers with one entry an input: its
/// TokenRange::most, and its TokenRange::group.
inline constexpr const char* kMostTokens = "llmcache_most_tokens";
inline constexpr const char* kTokenGroups = "llmcache_token_groups";

/// A module for each that the program calls, with its weights, and a method for each of its calls. Weights must be on
/// `device`. Throws Refused, DamagedData, and what LibTorch throws for a program that it cannot hold.
torch::jit::Module make_module(const Program& program, const std::map<std::string, at::Tensor>& weights,
                               at::Device device);

}  // namespace llmcache::exported
