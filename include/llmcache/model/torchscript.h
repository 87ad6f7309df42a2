// LayerCache for a loaded TorchScript module.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <filesystem>
#include <memory>

#include "llmcache/layer_cache.h"

namespace llmcache {

/// Finds the chain of layers of `module` (or takes it from Options::layers), cuts its graph at the
/// layers and at their attention operators, and returns it as a Model. The module object is shared, its
/// graphs are copied before they are changed: the caller's module stays as it was.
///
/// Throws Error(kUnsupportedModel): no forward, no chain of layers, frozen, in training mode, keeps
/// state between calls, an unsupported dtype.
std::unique_ptr<Model> wrap_torchscript(const torch::jit::Module& module, const Options& options);

template <>
struct ModelTraits<torch::jit::Module> {
  static std::unique_ptr<Model> wrap(const torch::jit::Module& module, const Options& options) {
    return wrap_torchscript(module, options);
  }
};

using TorchScriptCache = LayerCache<torch::jit::Module>;

/// Loads a file onto `device` and wraps what is in it: torch::jit::load(), or load_exported() of a program of
/// torch.export, and the constructor in one. Which of the two it is, its content tells, not its name.
/// Throws Error(kInvalidFile) if the file is missing or holds neither, and what load_exported() and the constructor
/// throw.
[[nodiscard]] TorchScriptCache load(const std::filesystem::path& path, Options options = {},
                                    at::Device device = at::kCPU);

}  // namespace llmcache
