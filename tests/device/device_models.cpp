#include "device_models.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdlib>

namespace llmcache::test {
namespace {

void move_constants(torch::jit::Block* block, c10::Device device) {
  for (torch::jit::Node* node : block->nodes()) {
    for (torch::jit::Block* inner : node->blocks()) move_constants(inner, device);
    if (node->kind() != torch::jit::prim::Constant) continue;
    const auto type = node->output()->type()->kind();
    if (type == c10::TypeKind::DeviceObjType) {
      node->s_(torch::jit::attr::value, device.str());
    } else if (type == c10::TypeKind::TensorType && node->hasAttribute(torch::jit::attr::value)) {
      node->t_(torch::jit::attr::value, node->t(torch::jit::attr::value).to(device));
    }
  }
}

}  // namespace

void move_whole(Module& module, c10::Device device) {
  module.to(device);
  for (const Module& each : module.modules()) {
    for (const auto& method : each.get_methods()) {
      move_constants(torch::jit::toGraphFunction(method.function()).graph()->block(), device);
    }
  }
}

Module load_model_on(const std::string& name, c10::Device device) {
  if (name.ends_with(".pt2")) {
    return load_exported(std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / name, device).module();
  }
  Module module = load_model(name);
  move_whole(module, device);
  return module;
}

Request moved(Request request, c10::Device device) {
  for (c10::IValue& input : request.inputs) {
    if (input.isTensor()) input = input.toTensor().to(device);
  }
  return request;
}

c10::IValue on_host(const c10::IValue& result) {
  if (result.isTensor()) return result.toTensor().cpu();
  std::vector<c10::IValue> all;
  for (const at::Tensor& leaf : leaves(result)) all.emplace_back(leaf.cpu());
  return c10::ivalue::Tuple::create(std::move(all));
}

}  // namespace llmcache::test
