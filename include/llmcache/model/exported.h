// LayerCache for programs of torch.export, which PyTorch offers in TorchScript's place.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "llmcache/layer_cache.h"

namespace llmcache {

/// A program that torch.export.save() has written, read back.
///
/// It is copied cheaply: copies share the weights. Thread safety: const members may be called from many threads at
/// once.
class ExportedProgram {
 public:
  /// Runs it as it is, with nothing cached: inputs as LayerCacheBase::forward() takes them, and what the model
  /// returned, a tensor or a tuple of such and of None. Throws what LibTorch throws. Sizes and types are not checked:
  /// for others than the program was exported for it may return anything.
  [[nodiscard]] c10::IValue forward(const Inputs& inputs) const;

  /// The same as a TorchScript module in memory, whose modules, weights and calls have the names that they had in
  /// Python. It is what is wrapped.
  [[nodiscard]] const torch::jit::Module& module() const noexcept { return module_; }
  /// The largest number of tokens of a row that it was exported for; 0: any. Where sources and targets of an
  /// encoder-decoder have limits of their own, the smaller one.
  [[nodiscard]] std::int64_t most_tokens() const;
  /// Version of the PyTorch that wrote it, such as "2.13.0"; empty if it does not say.
  [[nodiscard]] const std::string& torch_version() const noexcept { return torch_version_; }

 private:
  friend ExportedProgram load_exported(const std::filesystem::path& path, at::Device device);
  friend ExportedProgram load_exported_bytes(std::string_view bytes, at::Device device);
  ExportedProgram(torch::jit::Module module, std::string torch_version)
      : module_(std::move(module)), torch_version_(std::move(torch_version)) {}

  torch::jit::Module module_;
  std::string torch_version_;
};

/// Reads a file of torch.export.save(), by convention NAME.pt2, onto `device`. The model must have been exported in
/// eval() mode with dynamic batch and tokens, and saved as it was exported: docs/exported-programs.md has the recipe,
/// and what is refused.
///
/// One row, and one token, are taken though torch.export takes every size to be unlike 1, and does not say what a model
/// would have done otherwise for it: compare program and model for them when you export.
///
/// Every number of the weights is as in the file; weights that were one tensor share memory again. Devices that the
/// program names become `device`. LibTorch does not look at the archive's checksums: a file that was damaged among its
/// weights may be read.
///
/// Throws Error: kInvalidFile if the file is missing, damaged, or is no such archive; kUnsupportedModel if the library
/// does not take the program, with the node and module, and what to change in the export.
[[nodiscard]] ExportedProgram load_exported(const std::filesystem::path& path, at::Device device = at::kCPU);

/// The same of an archive in memory, which need not outlive the call.
[[nodiscard]] ExportedProgram load_exported_bytes(std::string_view bytes, at::Device device = at::kCPU);

template <>
struct ModelTraits<ExportedProgram> {
  /// As wrap_torchscript() of ExportedProgram::module().
  static std::unique_ptr<Model> wrap(const ExportedProgram& program, const Options& options);
};

using ExportedCache = LayerCache<ExportedProgram>;

}  // namespace llmcache
