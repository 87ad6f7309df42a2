#include <fmt/core.h>
#include <torch/csrc/jit/serialization/import.h>

#include <new>
#include <system_error>

#include "llmcache/model/torchscript.h"
#include "model/probe.h"

namespace llmcache {

TorchScriptCache load(const std::filesystem::path& path, Options options, at::Device device) {
  const auto refuse = [&](const std::string& what) {
    throw Error(ErrorCode::kInvalidFile, fmt::format("{}: {}", path.string(), what));
  };
  options.validate();
  std::error_code error;
  if (!std::filesystem::exists(path, error)) refuse("there is no such file");
  if (std::filesystem::is_directory(path, error)) refuse("it is a folder");
  if (!std::filesystem::is_regular_file(path, error)) refuse("it is no ordinary file");  // a pipe would be waited for
  torch::jit::Module module;
  try {
    module = torch::jit::load(path.string(), device);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& failure) {
    refuse("it cannot be loaded as a TorchScript module (torch.jit.trace(...).save(path) writes one): " +
           reason_of(failure));
  }
  return TorchScriptCache(std::move(module), std::move(options));
}

}  // namespace llmcache
