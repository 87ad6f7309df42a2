#include "model/torchscript_weight_release.h"

#include <algorithm>
#include <set>

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;

using Places = std::set<std::pair<const Node*, std::size_t>>;

/// Is the value read at these places only, as it is or transposed?
bool only_read_at(const Value* value, const Places& places) {
  const auto& uses = value->uses();
  return std::all_of(uses.begin(), uses.end(), [&](const torch::jit::Use& use) {
    return transposes(use.user) ? only_read_at(use.user->output(), places) : places.contains({use.user, use.offset});
  });
}

}  // namespace

const void* memory_of(const at::Tensor& tensor) {
  return tensor.defined() && tensor.has_storage() ? tensor.storage().data() : nullptr;
}

WeightRelease::WeightRelease(const Analysis& analysis, const std::vector<WeightRead>& reads)
    : object_(analysis.module._ivalue()) {
  const auto& slots = object_->slots();
  if (std::any_of(slots.begin(), slots.end(), [](const c10::IValue& slot) { return slot.isModule(); })) return;
  Places places;
  for (const WeightRead& read : reads) {
    places.emplace(read.node, read.input);
    ++weights_[read.memory].reads;
  }
  visit_nodes(analysis.flat.graph->block(), [&](Node* node) {
    if (node->kind() != prim::GetAttr || only_read_at(node->output(), places)) return;
    weights_.erase(memory_of(attribute_tensor(node->output(), analysis.flat.self(), analysis.module)));
  });
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const auto found = slots[i].isTensor() ? weights_.find(memory_of(slots[i].toTensor())) : weights_.end();
    if (found != weights_.end()) found->second.slots.push_back(i);
  }
}

void WeightRelease::replaced(const WeightRead& read) {
  const auto found = weights_.find(read.memory);
  if (found == weights_.end() || --found->second.reads > 0) return;
  for (const std::size_t slot : found->second.slots) object_->setSlot(slot, at::Tensor());
  weights_.erase(found);
}

}  // namespace llmcache::ts
