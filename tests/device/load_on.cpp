#include "load_on.h"

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include <algorithm>
#include <map>

namespace llmcache::test {
namespace {

/// A node that makes a tensor of numbers, where no device is named: arange(size), full([size, size], 0.5).
void name_device(torch::jit::Node* node, at::Device device) {
  const auto* schema = node->maybeSchema();
  if (schema == nullptr) return;
  const auto place = schema->argumentIndexWithName("device");
  const auto is_tensor = [](const torch::jit::Value* value) {
    return value->type()->isSubtypeOf(*at::TensorType::get());
  };
  if (!place || std::any_of(node->inputs().begin(), node->inputs().end(), is_tensor) ||
      node->input(static_cast<std::size_t>(*place))->type()->kind() != c10::TypeKind::NoneType) {
    return;
  }
  const torch::jit::WithInsertPoint before(node);
  node->replaceInput(static_cast<std::size_t>(*place), node->owningGraph()->insertConstant(device));
}

void move_constants(torch::jit::Block* block, at::Device device) {
  for (torch::jit::Node* node : block->nodes()) {
    for (torch::jit::Block* inner : node->blocks()) move_constants(inner, device);
    if (node->kind() != torch::jit::prim::Constant) {
      name_device(node, device);
      continue;
    }
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

/// Parameters and buffers. Module::to() changes tensors in place, which LibTorch does not do for every device.
void move_tensors(torch::jit::Module& model, at::Device device) {
  const c10::NoGradGuard no_grad;
  std::map<const c10::TensorImpl*, at::Tensor> moved;  // what is shared stays so
  for (torch::jit::Module each : model.modules()) {
    for (const auto& attribute : each.named_attributes(/*recurse=*/false)) {
      if (!attribute.value.isTensor() || attribute.value.toTensor().device() == device) continue;
      const at::Tensor& own = attribute.value.toTensor();
      at::Tensor& there = moved[own.unsafeGetTensorImpl()];
      if (!there.defined()) there = own.to(device);
      each.setattr(attribute.name, there);
    }
  }
}

}  // namespace

torch::jit::Module load_on(const std::filesystem::path& path, at::Device device) {
  torch::jit::Module model = torch::jit::load(path.string(), device);
  move_to(model, device);
  return model;
}

void move_to(torch::jit::Module& model, at::Device device) {
  if (device.is_cpu()) return;
  move_tensors(model, device);
  for (const torch::jit::Module& each : model.modules()) {
    for (const auto& method : each.get_methods()) {
      move_constants(torch::jit::toGraphFunction(method.function()).graph()->block(), device);
    }
  }
}

}  // namespace llmcache::test
