// A wrapped model as the examples use it.
#pragma once

#include <ATen/ATen.h>
#include <llmcache/llmcache.h>

#include <exception>
#include <filesystem>
#include <memory>
#include <string>

namespace llmcache::examples {

using Cache = TorchScriptCache;

/// A TorchScript file, or a program of torch.export whose name ends in .pt2. Throws std::runtime_error if there is no
/// such file or it holds no module.
torch::jit::Module load_module(const std::filesystem::path& path);

/// The tensor in a result; of a tuple, the first.
at::Tensor first_tensor(const c10::IValue& result);

/// For Options::progress: steps on one line of the standard error output, which is wiped at the end; nothing where that
/// is no terminal.
ProgressFunction progress_on_terminal();

/// For Options::profile_path: MODEL.pt.WEIGHTS.profile beside the model, so that each format of weights has its own.
/// Where the folder cannot be written to, the model is probed each time.
std::filesystem::path profile_beside(const std::filesystem::path& model, Weights weights = Weights::kAsLoaded);

/// The first line of an error, without LibTorch's backtrace.
std::string one_line(const std::exception& error);

}  // namespace llmcache::examples
