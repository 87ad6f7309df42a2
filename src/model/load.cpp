#include <fmt/core.h>
#include <torch/csrc/jit/serialization/import.h>

#include <new>

#include "llmcache/model/exported.h"
#include "llmcache/model/torchscript.h"
#include "model/exported_archive.h"
#include "model/file_check.h"
#include "model/probe.h"

namespace llmcache {
namespace {

torch::jit::Module read_module(const std::filesystem::path& path, at::Device device) {
  if (exported::is_exported_archive(path)) return load_exported(path, device).module();
  try {
    return torch::jit::load(path.string(), device);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& failure) {
    refuse_file(
        fmt::format("{}: it cannot be loaded as a TorchScript module (torch.jit.trace(...).save(path) writes "
                    "one), nor as an exported program (torch.export.save(program, path) does): {}",
                    path.string(), reason_of(failure)));
  }
}

}  // namespace

TorchScriptCache load(const std::filesystem::path& path, Options options, at::Device device) {
  options.validate();
  check_is_file(path);
  return ModelTraits<torch::jit::Module>::own([&] { return read_module(path, device); }, std::move(options));
}

}  // namespace llmcache
