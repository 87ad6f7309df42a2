#include "model/torchscript_token_choice.h"

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <functional>

#include "model/torchscript_analysis.h"
#include "model/torchscript_attention_ops.h"
#include "model/torchscript_subgraph.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;
using Kind = Label::Kind;

constexpr Label kRow{Kind::kBatch, 1};
constexpr Label kToken{Kind::kTokens, 1};

const ValueInfo* tensor_info(const Analysis& analysis, const Value* value) {
  const auto it = analysis.infos.find(value);
  return it == analysis.infos.end() || !it->second.is_tensor() ? nullptr : &it->second;
}

/// The value in front of operators that change a shape or a type, and nothing else. `steps`: those allowed.
const Value* origin(const Value* value, const std::unordered_set<c10::Symbol>& steps) {
  while (steps.count(value->node()->kind()) && !value->node()->inputs().empty()) value = value->node()->input(0);
  return value;
}

bool holds_number(const Value* value, std::int64_t number) {
  const auto held = torch::jit::toIValue(value);
  return held && held->isInt() && held->toInt() == number;
}

/// 0, 1, 2, ... one number a row.
bool numbers_rows(const Analysis& analysis, const Value* value) {
  static const std::unordered_set<c10::Symbol> kSame{aten::to, aten::alias, aten::detach, aten::contiguous,
                                                     aten::type_as};
  const Node* node = origin(value, kSame)->node();
  const auto* info = tensor_info(analysis, value);
  if (node->kind() != aten::arange || info == nullptr || info->dims != std::vector<Label>{kRow}) return false;
  const auto* schema = node->maybeSchema();
  for (std::size_t i = 0; schema != nullptr && i < node->inputs().size(); ++i) {
    const auto& name = schema->arguments()[i].name();
    if (name == "start" && !holds_number(node->input(i), 0)) return false;
    if (name == "step" && !holds_number(node->input(i), 1)) return false;
  }
  return schema != nullptr;
}

/// One whole number a row, or one for all rows.
bool is_position(const Analysis& analysis, const Value* value) {
  const auto* info = tensor_info(analysis, value);
  if (info == nullptr || !at::isIntegralType(info->dtype, false)) return false;
  return info->dims.empty() || info->dims == std::vector<Label>{kRow};
}

/// `states[arange(rows), position]`.
const Value* position_of_index(const Analysis& analysis, const Node* node) {
  const Node* list = node->inputs().size() == 2 ? node->input(1)->node() : nullptr;
  if (list == nullptr || list->kind() != prim::ListConstruct || list->inputs().size() != 2) return nullptr;
  if (!numbers_rows(analysis, list->input(0)) || !is_position(analysis, list->input(1))) return nullptr;
  return list->input(1);
}

/// `states.gather(1, index)`, where index `[rows, 1, ...]` repeats one number a row.
const Value* position_of_gather(const Analysis& analysis, const Node* node) {
  static const std::unordered_set<c10::Symbol> kSteps{aten::to,      aten::alias,     aten::detach,   aten::contiguous,
                                                      aten::type_as, aten::unsqueeze, aten::reshape,  aten::view,
                                                      aten::expand,  aten::repeat,    aten::expand_as};
  if (node->inputs().size() != 4 || !holds_number(node->input(1), 1)) return nullptr;
  const auto* states = tensor_info(analysis, node->input(0));
  const auto* index = tensor_info(analysis, node->input(2));
  if (states == nullptr || index == nullptr || index->dims.size() != states->dims.size()) return nullptr;
  auto dims = states->dims;
  dims[1] = Label{Kind::kConstant, 1};
  if (index->dims != dims) return nullptr;
  const Value* value = node->input(2);
  for (; kSteps.count(value->node()->kind()); value = value->node()->input(0)) {
    const auto* info = tensor_info(analysis, value);
    if (info == nullptr || info->dims.empty()) return nullptr;
    // Rows come first, and whatever follows repeats their number.
    const bool of_rows =
        info->dims[0] == kRow && info->count(Kind::kConstant) + 1 == static_cast<int>(info->dims.size());
    if (!of_rows) return nullptr;
    if (info->dims.size() == 1 && is_position(analysis, value)) break;
  }
  const auto* info = tensor_info(analysis, value);
  const bool one_a_row = info != nullptr && !info->dims.empty() && info->dims[0] == kRow &&
                         std::all_of(info->dims.begin() + 1, info->dims.end(), [](const Label& label) {
                           return label == Label{Kind::kConstant, 1};
                         });
  return one_a_row && at::isIntegralType(info->dtype, false) ? value : nullptr;
}

/// Does it follow from the inputs of the model alone, by operators without effects?
bool follows_from_inputs(const Analysis& analysis, const TokenChoice& choice) {
  if (analysis.dependent.count(choice.position)) return false;
  const auto nodes = nodes_of_position(analysis.flat, choice);
  return std::all_of(nodes.begin(), nodes.end(), [&](Node* node) {
    const auto inputs = all_inputs(node);
    return is_pure(node) && node->blocks().empty() &&
           std::none_of(inputs.begin(), inputs.end(), [&](const Value* v) { return analysis.dependent.count(v) > 0; });
  });
}

/// Everything among `nodes` that is needed for `wanted`, in order.
std::vector<Node*> needed_for(const std::vector<Node*>& nodes, const Value* wanted) {
  std::unordered_set<const Value*> needed{wanted};
  std::vector<Node*> found;
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
    const auto outputs = (*node)->outputs();
    if (std::none_of(outputs.begin(), outputs.end(), [&](const Value* v) { return needed.count(v) > 0; })) continue;
    found.push_back(*node);
    for (const Value* input : all_inputs(*node)) needed.insert(input);
  }
  std::reverse(found.begin(), found.end());
  return found;
}

}  // namespace

TokenChoice find_token_choice(const Analysis& analysis) {
  TokenChoice found;
  if (!analysis.source.empty()) return found;
  const auto behind_layers = static_cast<int>(analysis.flat.layers) + 1;
  for (Node* node : analysis.flat.graph->nodes()) {
    const bool gathers = node->kind() == aten::gather;
    if (analysis.flat.part.at(node) != behind_layers || !(gathers || node->kind() == aten::index)) continue;
    const auto* states = tensor_info(analysis, node->input(0));
    if (states == nullptr || !analysis.dependent.count(node->input(0)) || states->dims.size() < 2) continue;
    if (!(states->dims[0] == kRow) || !(states->dims[1] == kToken)) continue;
    if (states->count(Kind::kConstant) + 2 != static_cast<int>(states->dims.size())) continue;
    TokenChoice choice;
    choice.node = node;
    choice.keeps_dimension = gathers;
    choice.position = gathers ? position_of_gather(analysis, node) : position_of_index(analysis, node);
    if (choice.position == nullptr || !follows_from_inputs(analysis, choice)) continue;
    if (found.node != nullptr) return {};  // two places, which need not be the same
    found = choice;
  }
  return found;
}

std::vector<Node*> nodes_of_position(const FlatGraph& flat, const TokenChoice& choice) {
  const std::vector<Node*> all(flat.graph->nodes().begin(), flat.graph->nodes().end());
  return needed_for(all, choice.position);
}

bool split_head(const Analysis& analysis, SplitHead& split) {
  const TokenChoice& choice = analysis.choice;
  const auto nodes = analysis.nodes(analysis.flat.layers + 1);
  split.before = needed_for(nodes, choice.states());
  const std::unordered_set<const Node*> before(split.before.begin(), split.before.end());
  for (Node* node : nodes) {
    if (!is_pure(node)) return false;
    if (before.count(node)) {
      if (node == choice.node || accumulates_over_tokens(analysis, node)) return false;
      for (const Value* output : node->outputs()) {
        const auto info = analysis.infos.find(output);
        const bool hidden = info != analysis.infos.end() && analysis.dependent.count(output);
        if (hidden && info->second.count(Kind::kTokens) > 1) return false;
      }
    } else if (node != choice.node) {
      split.behind.push_back(node);
    }
  }
  // What enters the second part is what was chosen, and what does not come from the layers.
  const Value* chosen = choice.node->output();
  std::vector<const Value*> entering = external_inputs(analysis.flat, split.behind);
  entering.push_back(analysis.flat.graph->outputs()[0]);
  const std::unordered_set<const Node*> behind(split.behind.begin(), split.behind.end());
  return std::all_of(entering.begin(), entering.end(), [&](const Value* value) {
    return value == chosen || !analysis.dependent.count(value) || behind.count(value->node());
  });
}

}  // namespace llmcache::ts
