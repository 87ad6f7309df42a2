#include "model/torchscript_repeated_layers.h"

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <cstdint>
#include <string_view>

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
using Kind = Label::Kind;

bool is_leaf(const Node* node) { return node->kind() == prim::GetAttr || node->kind() == prim::Constant; }

/// Does the number of elements of what the operator makes follow from what tensors hold?
bool sizes_follow_data(const Node* node) {
  const std::string_view name = node->kind().toUnqualString();
  return name == "nonzero" || name == "nonzero_numpy" || name == "masked_select" || name == "argwhere" ||
         name == "bincount" || name.find("unique") != std::string_view::npos;
}

bool same_shape(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return a.scalar_type() == b.scalar_type() && a.layout() == b.layout() && a.sizes() == b.sizes() &&
         (a.layout() != at::kStrided || a.strides() == b.strides());
}

class RepetitionFinder {
 public:
  RepetitionFinder(const FlatGraph& flat, const Module& module)
      : flat_(flat), module_(module), nodes_(static_cast<std::size_t>(flat.layers) + 1) {}

  std::optional<RepeatedLayers> run() {
    constexpr std::int64_t kFewest = 3;  // below that there is nothing to leave out
    if (flat_.layers < kFewest) return std::nullopt;
    for (const Node* node : flat_.graph->nodes()) {
      const int part = flat_.part.at(node);
      if (part < 1 || part > flat_.layers || is_leaf(node)) continue;
      auto& own = nodes_[static_cast<std::size_t>(part)];
      for (const Value* output : node->outputs()) places_[output] = {part, own.size(), output->offset()};
      own.push_back(node);
    }
    for (std::size_t l = 2; l < nodes_.size(); ++l) {
      if (!repeats(l)) return std::nullopt;
    }
    pair_values();
    return std::move(found_);
  }

 private:
  struct Place {
    int layer = 0;
    std::size_t node = 0, output = 0;
    [[nodiscard]] bool is_before(const Place& other) const {
      return layer + 1 == other.layer && node == other.node && output == other.output;
    }
  };

  bool repeats(std::size_t l) {
    const auto& own = nodes_[l];
    const auto& before = nodes_[l - 1];
    if (own.size() != before.size()) return false;
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (!same_operator(own[i], before[i])) return false;
      for (std::size_t k = 0; k < own[i]->inputs().size(); ++k) {
        if (!same_input(own[i]->input(k), before[i]->input(k), static_cast<int>(l))) return false;
      }
    }
    return true;
  }

  static bool same_operator(const Node* a, const Node* b) {
    return a->kind() == b->kind() && a->inputs().size() == b->inputs().size() &&
           a->outputs().size() == b->outputs().size() && a->blocks().empty() && b->blocks().empty() &&
           a->attributeNames().empty() && b->attributeNames().empty() && !sizes_follow_data(a);
  }

  /// `a` is read by layer l, `b` by the one before it in the same place.
  bool same_input(const Value* a, const Value* b, int l) {
    if (is_leaf(a->node()) || is_leaf(b->node())) return same_leaf(a, b);
    const auto one = places_.find(a);
    const auto other = places_.find(b);
    if (one == places_.end()) return a == b;  // of before the layers
    if (one->second.layer == l) return other != places_.end() && other->second.is_before(one->second);
    if (one->second.layer != l - 1) return false;
    if (other != places_.end()) return other->second.is_before(one->second);
    if (l != 2) return false;
    found_.entering.emplace_back(b, a);
    return true;
  }

  bool same_leaf(const Value* a, const Value* b) const {
    if (a == b) return true;
    if (a->node()->kind() != b->node()->kind()) return false;
    if (a->node()->kind() == prim::Constant) {
      const auto one = torch::jit::toIValue(a);
      const auto other = torch::jit::toIValue(b);
      return one && other && same_constant(*one, *other);
    }
    const auto one = attribute_value(a, flat_.self(), module_);
    const auto other = attribute_value(b, flat_.self(), module_);
    return one.isTensor() && other.isTensor() && same_shape(one.toTensor(), other.toTensor());
  }

  static bool same_constant(const c10::IValue& a, const c10::IValue& b) {
    if (a.isTensor() && b.isTensor()) {
      constexpr std::int64_t kMostCompared = 64;  // of larger ones the numbers are no sizes
      const at::Tensor& one = a.toTensor();
      if (!same_shape(one, b.toTensor())) return false;
      return !one.defined() || one.numel() > kMostCompared || at::equal(one, b.toTensor());
    }
    const bool plain = a.isNone() || a.isInt() || a.isBool() || a.isDouble() || a.isString() || a.isDevice() ||
                       a.isIntList() || a.isDoubleList() || a.isBoolList();
    return plain && a.tagKind() == b.tagKind() && a == b;
  }

  void pair_values() {
    const auto pair = [](const std::vector<const Node*>& from, const std::vector<const Node*>& to, auto& pairs) {
      for (std::size_t i = 0; i < from.size(); ++i) {
        for (std::size_t k = 0; k < from[i]->outputs().size(); ++k) pairs[from[i]->output(k)] = to[i]->output(k);
      }
    };
    pair(nodes_[2], nodes_[1], found_.in_first);
    for (std::size_t l = 3; l < nodes_.size(); ++l) pair(nodes_[l], nodes_[2], found_.in_second);
  }

  const FlatGraph& flat_;
  const Module& module_;
  std::vector<std::vector<const Node*>> nodes_;  ///< of each layer, without attributes and constants
  std::unordered_map<const Value*, Place> places_;
  RepeatedLayers found_;
};

bool follows_a_rule(const ValueInfo& info) {
  if (info.kind == ValueInfo::Kind::kUnknown || info.nested) return false;
  return info.kind == ValueInfo::Kind::kInteger ? info.integer.kind != Kind::kUnknown : info.count(Kind::kUnknown) == 0;
}

}  // namespace

std::optional<RepeatedLayers> find_repetition(const FlatGraph& flat, const Module& module) {
  return RepetitionFinder(flat, module).run();
}

std::optional<ValueInfos> label_repeated(const FlatGraph& flat, const Module& module, const std::vector<Inputs>& inputs,
                                         bool with_source, std::vector<Values>& runs) {
  const auto layers = find_repetition(flat, module);
  if (!layers) return std::nullopt;
  for (const Inputs& given : inputs) runs.push_back(run_instead(flat, module, given, layers->in_second));
  ValueInfos infos = label_values(runs, with_source);
  const auto same = [&](const Value* a, const Value* b) { return infos.at(a) == infos.at(b); };
  for (const auto& [second, first] : layers->in_first) {
    if (!follows_a_rule(infos.at(second)) || !same(second, first)) return std::nullopt;
  }
  for (const auto& [first, second] : layers->entering) {
    if (!same(first, second)) return std::nullopt;
  }
  const Value* result = flat.graph->outputs()[0];
  if (const auto found = layers->in_second.find(result); found != layers->in_second.end()) {
    for (Values& run : runs) run[result] = c10::IValue(run.at(found->second));
  }
  for (const auto& [later, second] : layers->in_second) {
    ValueInfo info = infos.at(second);
    infos[later] = std::move(info);
  }
  return infos;
}

}  // namespace llmcache::ts
