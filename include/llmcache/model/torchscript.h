// LayerCache for a loaded TorchScript module. The only public header that includes TorchScript.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <memory>

#include "llmcache/layer_cache.h"

namespace llmcache {

/// Finds the chain of layers of `module` (or takes it from Options::layers), cuts its graph at the
/// layers and at their attention sites, and returns it as a Model. The module object is shared, its
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

}  // namespace llmcache
