#include <fmt/core.h>
#include <torch/csrc/jit/serialization/import.h>

#include <new>

#include "llmcache/model/exported.h"
#include "llmcache/model/torchscript.h"
#include "model/exported_archive.h"
#include "model/file_check.h"
#include "model/probe.h"

namespace llmcache {

TorchScriptCache load(const std::filesystem::path& path, Options options, at::Device device) {
  options.validate();
  check_is_file(path);
  if (exported::is_exported_archive(path)) {
    return TorchScriptCache(load_exported(path, device).module(), std::move(options));
  }
  torch::jit::Module module;
  try {
    module = torch::jit::load(path.string(), device);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& failure) {
    refuse_file(
        fmt::format("{}: it cannot be loaded as a TorchScript module (torch.jit.trace(...).save(path) writes "
                    "one), nor as an exported program (torch.export.save(program, path) does): {}",
                    path.string(), reason_of(failure)));
  }
  return TorchScriptCache(std::move(module), std::move(options));
}

}  // namespace llmcache
