#include "model/torchscript_layer_kinds.h"

#include <fmt/core.h>
#include <fmt/ranges.h>
#include <torch/csrc/jit/ir/constants.h>

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

#include "model/torchscript_packed_weights.h"

namespace llmcache::ts {
namespace {

std::string text_of_tensor(const at::Tensor& tensor) {
  if (!tensor.defined()) return "undefined";
  return fmt::format("{} {} {}", c10::toString(tensor.scalar_type()), fmt::join(tensor.sizes().vec(), "x"),
                     fmt::join(tensor.strides().vec(), "x"));
}

/// Gives values numbers that are equal where they are computed alike.
class Numbering {
 public:
  explicit Numbering(const Analysis& analysis) : analysis_(analysis) {}

  std::size_t of_layer(std::size_t l) {
    entering_ = analysis_.hidden[l];
    return of(analysis_.hidden[l + 1]);
  }

 private:
  std::size_t of(const Value* value) {
    if (value == entering_) return 0;
    if (const auto known = numbers_.find(value); known != numbers_.end()) return known->second;
    return numbers_[value] = std::hash<std::string>{}(text_of(value));
  }

  /// A value that is like no other gets its own address.
  std::string text_of(const Value* value) {
    const Node* node = value->node();
    const FlatGraph& flat = analysis_.flat;
    const std::string own = fmt::format("{}", static_cast<const void*>(value));
    if (node->kind() == c10::prim::Param) return own;
    if (const auto held = attribute_value(value, flat.self(), analysis_.module); held.isTensor()) {
      return "weight " + text_of_tensor(held.toTensor());
    }
    if (node->kind() == c10::prim::Constant) return text_of_constant(value, own);
    if (!node->blocks().empty() || !node->attributeNames().empty()) return own;
    std::string text = fmt::format("{} {}", node->kind().toQualString(), value->offset());
    for (const Value* input : node->inputs()) text += fmt::format(" {}", of(input));
    return text;
  }

  static std::string text_of_constant(const Value* value, const std::string& own) {
    constexpr std::int64_t kMostElements = 64;
    const auto held = torch::jit::toIValue(value);
    if (!held) return own;
    if (const auto number = number_of_packed(value)) {
      const PackedLinear& packed = PackedLinear::find(*number);
      return fmt::format("packed {} {} {}", packed.inputs(), packed.outputs(), packed.bytes());
    }
    if (!held->isTensor()) return "constant " + held->tagKind() + " " + c10::str(*held);
    const at::Tensor& tensor = held->toTensor();
    if (!tensor.defined() || tensor.numel() > kMostElements) return own;
    return "constant " + text_of_tensor(tensor) + c10::str(tensor);
  }

  const Analysis& analysis_;
  const Value* entering_ = nullptr;  ///< the layer whose value is numbered
  std::unordered_map<const Value*, std::size_t> numbers_;
};

}  // namespace

LayerKinds layer_kinds(const Analysis& analysis, const std::vector<AttentionOp>& attention_ops) {
  const auto layers = static_cast<std::size_t>(analysis.flat.layers);
  std::vector<std::string> kinds;
  Numbering numbering(analysis);
  for (std::size_t l = 0; l < layers; ++l) kinds.push_back(std::to_string(numbering.of_layer(l)));
  for (const AttentionOp& attention_op : attention_ops) {
    kinds.at(static_cast<std::size_t>(attention_op.layer)) +=
        fmt::format(" {} {} {}", attention_op.kind, attention_op.query_inputs, attention_op.key_inputs);
  }
  std::map<std::string, std::size_t> first;
  LayerKinds found;
  for (std::size_t l = 0; l < layers; ++l) {
    const auto [known, fresh] = first.emplace(kinds[l], found.distinct.size());
    found.like.push_back(l + 1 == layers && !fresh ? found.distinct.size() : known->second);
    if (fresh || l + 1 == layers) found.distinct.push_back(static_cast<std::int64_t>(l));
  }
  return found;
}

}  // namespace llmcache::ts
