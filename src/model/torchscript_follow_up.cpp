#include "model/torchscript_follow_up.h"

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace llmcache::ts {
namespace {

namespace aten = c10::aten;
using Kind = Label::Kind;

bool is_near(const Value* value, double wanted) {
  const auto found = constant_number(value);
  return found && std::abs(*found - wanted) <= 1e-6;
}

/// The other operand of a node of two, if `value` is the one.
Value* other_operand(Node* node, const Value* value) {
  if (node->input(0) == value) return node->input(1);
  return node->input(1) == value ? node->input(0) : nullptr;
}

/// Is it the sum of two operands as they are?
bool is_sum(const Node* node) {
  return node->kind() == aten::add && node->inputs().size() == 3 && is_near(node->input(2), 1);
}

/// The value times a number, or plus one.
bool is_with_number(Node* node, c10::Symbol kind, const Value* value, double number) {
  if (node->kind() != kind || (kind == aten::add && !is_sum(node))) return false;
  const Value* other = other_operand(node, value);
  return other != nullptr && is_near(other, number);
}

/// Goes along the nodes behind a product.
class FollowUpFinder {
 public:
  FollowUpFinder(Value* product, bool has_bias, const Analysis& analysis)
      : analysis_(analysis), first_(product->node()), at_(product), has_bias_(has_bias) {}

  FollowUp run() {
    while (look_through() || take_bias() || take_activation() || take_residual()) {
    }
    return std::move(found_);
  }

 private:
  [[nodiscard]] bool inside(const Node* node) const {
    if (node->owningBlock() != first_->owningBlock()) return false;
    const auto& part = analysis_.flat.part;
    const auto own = part.find(node);
    const auto first = part.find(first_);
    return own == part.end() ? first == part.end() : first != part.end() && own->second == first->second;
  }

  [[nodiscard]] bool is_boundary(const Value* value) const {
    return std::find(analysis_.hidden.begin(), analysis_.hidden.end(), value) != analysis_.hidden.end();
  }

  /// The only node that uses a value and may be taken; else null.
  Node* only_user(const Value* value) const {
    if (value->uses().size() != 1 || is_boundary(value)) return nullptr;
    Node* user = value->uses()[0].user;
    return inside(user) ? user : nullptr;
  }

  /// Puts the nodes that end with `last` among those that are replaced, with what was looked through before them.
  void take(std::vector<Node*> nodes) {
    found_.reshaping.insert(found_.reshaping.end(), reshaping_.begin(), reshaping_.end());
    found_.replaced.insert(found_.replaced.end(), passed_.begin(), passed_.end());
    found_.replaced.insert(found_.replaced.end(), nodes.begin(), nodes.end());
    reshaping_.clear();
    passed_.clear();
    at_ = nodes.back()->output();
  }

  /// Other shapes, and dropout that does nothing.
  bool look_through() {
    Node* node = only_user(at_);
    if (node == nullptr || node->input(0) != at_) return false;
    if (node->kind() == aten::view || node->kind() == aten::reshape) {
      reshaping_.push_back(node);
    } else if (node->kind() == aten::dropout && torch::jit::constant_as<bool>(node->input(2)) == false) {
      passed_.push_back(node);
    } else {
      return false;
    }
    at_ = node->output();
    return true;
  }

  bool take_bias() {
    if (has_bias_ || found_.activation != Activation::kNone || found_.residual != nullptr) return false;
    Node* node = only_user(at_);
    if (node == nullptr || !is_sum(node)) return false;
    Value* other = other_operand(node, at_);
    const auto bias = attribute_tensor(other, analysis_.flat.self(), analysis_.module);
    const ValueInfo* info = info_of(at_);
    if (!bias.defined() || bias.dim() != 1 || info == nullptr || bias.scalar_type() != info->dtype) return false;
    if (info->dims.empty() || info->dims.back() != Label{Kind::kConstant, bias.size(0)}) return false;
    found_.bias = other;
    has_bias_ = true;
    take({node});
    return true;
  }

  bool take_activation() {
    if (found_.activation != Activation::kNone || found_.residual != nullptr) return false;
    Node* node = only_user(at_);
    if (node == nullptr) return take_written_out_gelu();
    if (node->kind() == aten::relu) {
      found_.activation = Activation::kRelu;
    } else if (node->kind() == aten::silu) {
      found_.activation = Activation::kSilu;
    } else if (node->kind() == aten::gelu && node->inputs().size() == 2) {
      const auto kind = torch::jit::constant_as<std::string>(node->input(1));
      if (kind != "none" && kind != "tanh") return false;
      found_.activation = kind == "none" ? Activation::kGelu : Activation::kGeluTanh;
    } else {
      return false;
    }
    take({node});
    return true;
  }

  /// 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) in eight nodes, as older models have it.
  bool take_written_out_gelu() {
    if (at_->uses().size() != 3 || is_boundary(at_)) return false;
    Node* half = nullptr;
    Node* cube = nullptr;
    Node* sum = nullptr;
    for (const auto& use : at_->uses()) {
      Node* user = use.user;
      if (!inside(user)) return false;
      if (is_with_number(user, aten::mul, at_, 0.5)) half = user;
      if (user->kind() == aten::pow && user->input(0) == at_ && is_near(user->input(1), 3)) cube = user;
      if (is_sum(user)) sum = user;
    }
    if (half == nullptr || cube == nullptr || sum == nullptr) return false;
    Node* small = only_user(cube->output());
    if (small == nullptr || !is_with_number(small, aten::mul, cube->output(), 0.044715)) return false;
    if (only_user(small->output()) != sum || other_operand(sum, at_) != small->output()) return false;
    Node* scaled = only_user(sum->output());
    if (scaled == nullptr || !is_with_number(scaled, aten::mul, sum->output(), std::sqrt(2 / M_PI))) return false;
    Node* tanh = only_user(scaled->output());
    if (tanh == nullptr || tanh->kind() != aten::tanh) return false;
    Node* one = only_user(tanh->output());
    if (one == nullptr || !is_with_number(one, aten::add, tanh->output(), 1)) return false;
    Node* last = only_user(one->output());
    if (last == nullptr || last->kind() != aten::mul || only_user(half->output()) != last) return false;
    found_.activation = Activation::kGeluTanh;
    take({half, cube, small, sum, scaled, tanh, one, last});
    return true;
  }

  /// A sum with a tensor of the same shape, whatever that is.
  bool take_residual() {
    if (found_.residual != nullptr) return false;
    Node* node = only_user(at_);
    if (node == nullptr || !is_sum(node)) return false;
    Value* other = other_operand(node, at_);
    const ValueInfo* own = info_of(at_);
    const ValueInfo* its = info_of(other);
    if (own == nullptr || its == nullptr || own->dtype != its->dtype || own->dims != its->dims) return false;
    if (own->count(Kind::kUnknown) > 0 || own->dims.empty()) return false;
    found_.residual = other;
    take({node});
    return true;
  }

  [[nodiscard]] const ValueInfo* info_of(const Value* value) const {
    const auto found = analysis_.infos.find(value);
    return found == analysis_.infos.end() || !found->second.is_tensor() ? nullptr : &found->second;
  }

  const Analysis& analysis_;
  const Node* first_;
  Value* at_;  ///< how far it went
  bool has_bias_;
  FollowUp found_;
  std::vector<Node*> reshaping_;  ///< looked through since something was taken
  std::vector<Node*> passed_;     ///< likewise, nodes that do nothing
};

}  // namespace

std::optional<double> constant_number(const Value* value) {
  const auto constant = torch::jit::toIValue(value);
  if (!constant) return std::nullopt;
  if (constant->isInt()) return static_cast<double>(constant->toInt());
  if (constant->isDouble()) return constant->toDouble();
  if (constant->isTensor() && constant->toTensor().defined() && constant->toTensor().dim() == 0) {
    return constant->toTensor().item().toDouble();
  }
  return std::nullopt;
}

FollowUp follow_up_of(Value* product, bool has_bias, const Analysis& analysis) {
  return FollowUpFinder(product, has_bias, analysis).run();
}

}  // namespace llmcache::ts
