#include "model/torchscript_shared_code.h"

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/canonicalize.h>

#include <algorithm>
#include <optional>

#include "model/torchscript_packed_weights.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;

/// From the module down to an attribute of it, or of a module in it; nothing: the value is none.
std::optional<std::vector<std::size_t>> slots_to(const Value* value, const Value* self) {
  std::vector<std::size_t> slots;
  while (value != self) {
    const Node* node = value->node();
    if (node->kind() != prim::GetAttr) return std::nullopt;
    const auto type = node->input(0)->type()->cast<c10::ClassType>();
    const auto slot = type ? type->findAttributeSlot(node->s(c10::attr::name)) : std::nullopt;
    if (!slot) return std::nullopt;
    slots.push_back(*slot);
    value = node->input(0);
  }
  std::reverse(slots.begin(), slots.end());
  return slots;
}

void add_bytes(std::string& key, const void* data, std::size_t bytes) {
  key += std::to_string(bytes) + ":";
  key.append(static_cast<const char*>(data), bytes);
}

/// Adds what the graph's text does not say of a constant. False: there is too much of it, or it is of a kind that
/// nothing is known about.
bool add_constant(std::string& key, const c10::IValue& value) {
  constexpr std::size_t kMostBytes = 256;
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined() || !tensor.is_cpu() || tensor.layout() != at::kStrided || tensor.is_quantized()) return false;
    if (!tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg() || tensor.nbytes() > kMostBytes) return false;
    key += c10::str(tensor.scalar_type(), tensor.sizes(), tensor.requires_grad() ? "grad" : "");
    add_bytes(key, tensor.const_data_ptr(), tensor.nbytes());
    return true;
  }
  if (value.isDouble()) {
    const double number = value.toDouble();
    add_bytes(key, &number, sizeof(number));
    return true;
  }
  return value.isNone() || value.isInt() || value.isBool() || value.isString() || value.isDevice() ||
         value.isIntList() || value.isBoolList();
}

bool add_all_constants(std::string& key, const torch::jit::Block* block) {
  for (const Node* node : block->nodes()) {
    if (node->kind() == prim::Constant && !node->outputs().empty()) {
      const auto value = torch::jit::toIValue(node->output());
      if (!value || !add_constant(key, *value)) return false;
    }
    for (const torch::jit::Block* inner : node->blocks()) {
      if (!add_all_constants(key, inner)) return false;
    }
  }
  return true;
}

/// The same for graphs that do the same; nothing: such a graph is like no other.
std::optional<std::string> text_key(const std::shared_ptr<Graph>& graph) {
  std::string key;
  if (!add_all_constants(key, graph->block())) return std::nullopt;
  const auto plain = torch::jit::Canonicalize(graph, /*keep_unique_names=*/false);
  return key + plain->toString(/*print_source_locations=*/false);
}

}  // namespace

std::optional<Lifted> lifted(const Value* value, const FlatGraph& flat) {
  if (value->type()->kind() == c10::TypeKind::TensorType) {
    if (auto slots = slots_to(value, flat.self())) return Lifted(*std::move(slots));
  }
  if (const auto number = number_of_packed(value)) return Lifted(*number);
  return std::nullopt;
}

c10::IValue read_lifted(const Lifted& what, const c10::IValue& self) {
  if (const auto* number = std::get_if<std::int64_t>(&what)) return *number;
  const c10::IValue* at = &self;
  for (const std::size_t slot : std::get<std::vector<std::size_t>>(what)) at = &at->toObjectRef().slots().at(slot);
  return *at;
}

std::shared_ptr<torch::jit::GraphFunction> SharedCode::compile(const std::string& name, const FlatGraph& flat,
                                                               std::shared_ptr<Graph> graph) {
  const auto make = [&] {
    return std::make_shared<torch::jit::GraphFunction>(
        name, std::move(graph), nullptr, executor_ == Executor::kSimple ? executor_of(flat) : std::nullopt);
  };
  const auto key = text_key(graph);
  if (!key) return make();
  auto& found = functions_[*key];
  if (found == nullptr) found = make();
  return found;
}

}  // namespace llmcache::ts
