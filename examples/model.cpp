#include "model.h"

#include <torch/csrc/jit/serialization/import.h>

#include <stdexcept>

namespace llmcache::examples {

torch::jit::Module load_module(const std::filesystem::path& path) {
  if (!std::filesystem::is_regular_file(path)) {
    throw std::runtime_error("there is no model " + path.string() + "; tools/export_models.py makes some");
  }
  try {
    return torch::jit::load(path.string(), at::kCPU);
  } catch (const std::exception& error) {
    throw std::runtime_error(path.string() + " cannot be loaded as TorchScript (" + one_line(error) + ")");
  }
}

Inputs inputs_for(const ModelProfile& profile, const at::Tensor& ids, const at::Tensor& mask) {
  Inputs inputs;
  for (int i = 0; i < static_cast<int>(profile.inputs.size()); ++i) {
    inputs.emplace_back(i == profile.ids_argument ? ids : i == profile.mask_argument ? mask : at::zeros_like(ids));
  }
  return inputs;
}

at::Tensor first_tensor(const c10::IValue& result) {
  if (result.isTensor()) return result.toTensor();
  if (result.isTuple() && !result.toTupleRef().elements().empty()) {
    return first_tensor(result.toTupleRef().elements()[0]);
  }
  throw std::runtime_error("the model returns no tensor");
}

std::string one_line(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace llmcache::examples
