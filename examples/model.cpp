#include "model.h"

#include <torch/csrc/jit/serialization/import.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>

namespace llmcache::examples {

torch::jit::Module load_module(const std::filesystem::path& path) {
  if (!std::filesystem::is_regular_file(path)) {
    throw std::runtime_error("there is no model " + path.string() + "; tools/models/export_models.py makes some");
  }
  if (path.extension() == ".pt2") return load_exported(path).module();
  try {
    return torch::jit::load(path.string(), at::kCPU);
  } catch (const std::exception& error) {
    throw std::runtime_error(path.string() + " cannot be loaded as TorchScript (" + one_line(error) + ")");
  }
}

at::Tensor first_tensor(const c10::IValue& result) {
  if (result.isTensor()) return result.toTensor();
  if (result.isTuple() && !result.toTupleRef().elements().empty()) {
    return first_tensor(result.toTupleRef().elements()[0]);
  }
  throw std::runtime_error("the model returns no tensor");
}

ProgressFunction progress_on_terminal() {
  if (isatty(STDERR_FILENO) == 0) return {};
  return [](const Progress& progress) {
    std::fprintf(stderr, "\r\033[K");
    if (progress.step != "done") std::fprintf(stderr, "%s", progress.step.c_str());
    if (progress.step != "done" && progress.total > 0) {
      std::fprintf(stderr, ": %lld of %lld", static_cast<long long>(progress.done),
                   static_cast<long long>(progress.total));
    }
    std::fflush(stderr);
  };
}

std::filesystem::path profile_beside(const std::filesystem::path& model, Weights weights) {
  return model.string() + "." + to_string(weights) + ".profile";
}

std::string one_line(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace llmcache::examples
