#include "llmcache/model/exported.h"

#include <ATen/core/grad_mode.h>
#include <caffe2/serialize/file_adapter.h>
#include <caffe2/serialize/in_memory_adapter.h>
#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>

#include "llmcache/model/torchscript.h"
#include "model/exported_archive.h"
#include "model/exported_json.h"
#include "model/exported_module.h"
#include "model/exported_program.h"
#include "model/file_check.h"
#include "model/probe.h"
#include "refusal.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

struct LoadedProgram {
  torch::jit::Module module;
  std::string torch_version;
};

/// `name` begins the messages.
LoadedProgram load_program(const std::string& name, const std::function<std::shared_ptr<exported::ReadAdapter>()>& open,
                           at::Device device) {
  const at::NoGradGuard no_grad;
  try {
    const exported::Archive archive = exported::read_archive(open(), device);
    const exported::Program program = exported::parse_program(archive.program);
    return {exported::make_module(program, archive.tensors, device), program.torch_version};
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const exported::Refused& refusal) {
    throw Error(ErrorCode::kUnsupportedModel, fmt::format("{}: {}", name, refusal.what()));
  } catch (const DamagedData& damage) {
    refuse_file(fmt::format("{} cannot be read as an exported program: {}", name, damage.what()));
  } catch (const std::exception& failure) {
    refuse_file(
        fmt::format("{} cannot be read as an exported program (torch.export.save(program, path) of PyTorch 2.13 "
                    "writes one): {}",
                    name, reason_of(failure)));
  }
}

}  // namespace

ExportedProgram load_exported(const std::filesystem::path& path, at::Device device) {
  check_is_file(path);
  auto loaded = load_program(
      path.string(), [&] { return std::make_shared<caffe2::serialize::FileAdapter>(path.string()); }, device);
  return {std::move(loaded.module), std::move(loaded.torch_version)};
}

ExportedProgram load_exported_bytes(std::string_view bytes, at::Device device) {
  const auto open = [&] {
    return std::make_shared<caffe2::serialize::MemoryReadAdapter>(bytes.data(), static_cast<off_t>(bytes.size()));
  };
  auto loaded = load_program("the archive", open, device);
  return {std::move(loaded.module), std::move(loaded.torch_version)};
}

c10::IValue ExportedProgram::forward(const Inputs& inputs) const {
  const at::NoGradGuard no_grad;
  auto module = module_;
  return module.forward(inputs);
}

std::int64_t ExportedProgram::most_tokens() const {
  std::int64_t least = 0;
  for (const std::int64_t most : module_.attr(exported::kMostTokens).toIntVector()) {
    if (most > 0) least = least == 0 ? most : std::min(least, most);
  }
  return least;
}

std::unique_ptr<Model> ModelTraits<ExportedProgram>::wrap(const ExportedProgram& program, const Options& options) {
  return wrap_torchscript(program.module(), options);
}

}  // namespace llmcache
