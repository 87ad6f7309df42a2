#include "load_on.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>

namespace llmcache::test {
namespace {

void move_constants(torch::jit::Block* block, at::Device device) {
  for (torch::jit::Node* node : block->nodes()) {
    for (torch::jit::Block* inner : node->blocks()) move_constants(inner, device);
    if (node->kind() != torch::jit::prim::Constant) continue;
    const auto type = node->output()->type()->kind();
    if (type == c10::TypeKind::DeviceObjType) {
      node->s_(torch::jit::attr::value, device.str());
    } else if (type == c10::TypeKind::TensorType && node->hasAttribute(torch::jit::attr::value)) {
      // Numbers are arithmetic on sizes, which is the host's.
      const at::Tensor held = node->t(torch::jit::attr::value);
      node->t_(torch::jit::attr::value, held.to(held.dim() == 0 ? at::Device(at::kCPU) : device));
    }
  }
}

}  // namespace

torch::jit::Module load_on(const std::filesystem::path& path, at::Device device) {
  const torch::jit::Module model = torch::jit::load(path.string(), device);
  if (device.is_cpu()) return model;
  for (const torch::jit::Module& each : model.modules()) {
    for (const auto& method : each.get_methods()) {
      move_constants(torch::jit::toGraphFunction(method.function()).graph()->block(), device);
    }
  }
  return model;
}

}  // namespace llmcache::test
