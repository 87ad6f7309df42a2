// A wrapped model as the examples use it.
#pragma once

#include <ATen/ATen.h>
#include <llmcache/llmcache.h>

#include <exception>
#include <filesystem>
#include <memory>
#include <string>

namespace llmcache::examples {

using Cache = LayerCache<torch::jit::Module>;

/// Throws std::runtime_error if there is no such file or it holds no TorchScript module.
torch::jit::Module load_module(const std::filesystem::path& path);

/// The model's inputs for a batch: ids and mask where it takes them, zeros elsewhere (token types).
Inputs inputs_for(const ModelProfile& profile, const at::Tensor& ids, const at::Tensor& mask);

/// The tensor in a result; of a tuple, the first.
at::Tensor first_tensor(const c10::IValue& result);

/// The first line of an error, without LibTorch's backtrace.
std::string one_line(const std::exception& error);

}  // namespace llmcache::examples
