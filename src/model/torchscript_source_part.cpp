#include "model/torchscript_source_part.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>

#include "llmcache/error.h"
#include "model/torchscript_operators.h"
#include "model/torchscript_source.h"

namespace llmcache::ts {
namespace {

namespace aten = c10::aten;
using Kind = Label::Kind;

/// What a value follows from. A size counts only where it is one of the target: the rows are the same on both sides.
struct Sides {
  bool source_ids = false;
  bool target = false;
};

class SourceFollower {
 public:
  explicit SourceFollower(const Analysis& analysis) : analysis_(analysis) {
    for (std::size_t i = 0; i < analysis.source.size(); ++i) {
      sides_[analysis.flat.input(i)] = {analysis.source[i] && analysis.vocabulary[i] > 0, !analysis.source[i]};
    }
    for (Node* node : analysis.flat.graph->nodes()) follow(node);
  }

  /// Of the nodes in front of the layers, those that work on the source alone, in order.
  [[nodiscard]] const std::vector<Node*>& nodes() const { return nodes_; }

  /// These, and all that they need, in order.
  [[nodiscard]] std::vector<Node*> with_all_needed() const {
    std::unordered_set<const Node*> needed(nodes_.begin(), nodes_.end());
    const auto& all = analysis_.nodes(0);
    for (auto node = all.rbegin(); node != all.rend(); ++node) {
      if (!needed.count(*node)) continue;
      for (const Value* input : all_inputs(*node)) needed.insert(input->node());
    }
    std::vector<Node*> found;
    std::copy_if(all.begin(), all.end(), std::back_inserter(found), [&](const Node* n) { return needed.count(n) > 0; });
    return found;
  }

 private:
  void follow(Node* node) {
    if (analysis_.flat.part.at(node) != 0) return;
    Sides made;
    if (!is_same_for_all_targets(node)) {
      for (const Value* input : all_inputs(node)) {
        const auto found = sides_.find(input);
        if (found == sides_.end()) continue;
        made.source_ids = made.source_ids || found->second.source_ids;
        made.target = made.target || found->second.target;
      }
    }
    for (const Value* output : node->outputs()) sides_[output] = made;
    const bool remade = node->outputs().size() == 1 && is_rematerialised(node->output(), analysis_.flat.self());
    if (made.source_ids && !made.target && !remade) nodes_.push_back(node);
  }

  /// A number of rows, of tokens of the source, or a type.
  [[nodiscard]] bool is_same_for_all_targets(const Node* node) const {
    if (is_about_the_type(node->kind().toUnqualString())) return true;
    if (node->kind() != aten::size || node->outputs().size() != 1) return false;
    const auto info = analysis_.infos.find(node->output());
    if (info == analysis_.infos.end()) return false;
    const Kind kind = info->second.integer.kind;
    return kind == Kind::kConstant || kind == Kind::kBatch || kind == Kind::kSource;
  }

  const Analysis& analysis_;
  std::unordered_map<const Value*, Sides> sides_;
  std::vector<Node*> nodes_;
};

/// Why values of this kind cannot be kept row by row; empty: they can.
std::string why_not_by_row(const Analysis& analysis, const Value* value) {
  const auto info = analysis.infos.find(value);
  if (info == analysis.infos.end() || !info->second.is_tensor() || info->second.dims.empty()) {
    return fmt::format("'{}' is no tensor", value->debugName());
  }
  const auto& dims = info->second.dims;
  const bool rest = std::all_of(dims.begin() + 1, dims.end(), [](const Label& label) {
    return label.kind == Kind::kConstant || label == Label{Kind::kSource, 1};
  });
  if (dims[0].kind != Kind::kBatch || !rest || info->second.count(Kind::kSource) > 1) {
    return fmt::format("'{}' is not made of one entry a row", value->debugName());
  }
  return {};
}

/// Of `all`, the nodes that nothing but `all` needs.
std::unordered_set<const Node*> needed_by_no_other(const FlatGraph& flat, const std::vector<Node*>& own,
                                                   const std::vector<Node*>& all) {
  const std::unordered_set<const Node*> own_nodes(own.begin(), own.end());
  const std::unordered_set<const Node*> inside(all.begin(), all.end());
  std::unordered_set<const Node*> alone;
  for (auto node = all.rbegin(); node != all.rend(); ++node) {
    const auto used_outside = [&](const Value* output) {
      return std::any_of(output->uses().begin(), output->uses().end(), [&](const auto& use) {
        const Node* user = use.user;
        while (user->owningBlock() != flat.graph->block()) user = user->owningBlock()->owningNode();
        return !inside.count(user) || !alone.count(user);
      });
    };
    const auto outputs = (*node)->outputs();
    if (own_nodes.count(*node) || std::none_of(outputs.begin(), outputs.end(), used_outside)) alone.insert(*node);
  }
  return alone;
}

}  // namespace

SourcePart find_source_part(const Analysis& analysis) {
  SourcePart part;
  if (analysis.source.empty()) return part;
  const SourceFollower follower(analysis);
  part.nodes = follower.with_all_needed();
  part.values = analysis.escaping(follower.nodes());
  if (part.values.empty()) part.obstacle = "nothing that the layers read follows from the source alone";
  for (Node* node : part.nodes) {
    if (is_pure(node) || !part.obstacle.empty()) continue;
    part.obstacle = fmt::format("the work on the source contains {}, which writes in place or has other effects",
                                node->kind().toQualString());
  }
  for (const Value* value : part.values) {
    if (part.obstacle.empty()) part.obstacle = why_not_by_row(analysis, value);
  }
  if (!part.obstacle.empty()) return {{}, {}, {}, part.obstacle};
  part.own = needed_by_no_other(analysis.flat, follower.nodes(), part.nodes);
  return part;
}

void put_inputs(const Analysis& analysis, const Program& program, const Inputs& inputs, Env& env) {
  for (std::size_t i = 0; i + 1 < analysis.flat.graph->inputs().size(); ++i) {
    const int slot = program.slots.find(analysis.flat.input(i));
    if (slot >= 0 && i < inputs.size()) env[static_cast<std::size_t>(slot)] = inputs[i];
  }
}

namespace {

/// Heads that are merged with the rows.
std::int64_t entries_of_row(const Analysis& analysis, const Value* value) {
  return analysis.infos.at(value).dims[0].factor;
}

}  // namespace

void put_source(const Analysis& analysis, const Program& program, const c10::IValue& self, const Inputs& inputs,
                Env& env) {
  const auto& values = analysis.source_part.values;
  if (values.empty()) return;
  if (inputs.size() < analysis.flat.graph->inputs().size()) return program.source.run(self, env);
  const auto given = inputs.back().toTensorVector();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const bool merged = entries_of_row(analysis, values[i]) != 1;
    env[static_cast<std::size_t>(program.source.out()[i])] = merged ? given[i].flatten(0, 1) : given[i];
  }
}

SourceSubgraph::SourceSubgraph(std::shared_ptr<const Analysis> analysis, const Program& program)
    : analysis_(std::move(analysis)), program_(program) {
  const auto& part = analysis_->source_part;
  for (const Value* value : part.values) {
    const bool merged = entries_of_row(*analysis_, value) != 1;
    const int dim = analysis_->infos.at(value).only(Kind::kSource);
    token_dims_.push_back(dim < 0 ? -1 : dim + (merged ? 1 : 0));
  }
  // Nothing writes to the values, and the result has none of them.
  auto nodes = analysis_->flat.graph->nodes();
  const bool pure = std::all_of(nodes.begin(), nodes.end(), [&](Node* node) {
    return part.own.count(node) > 0 || is_pure(node) || node->kind() == c10::prim::Constant;
  });
  const bool of_tokens = std::none_of(token_dims_.begin(), token_dims_.end(), [](int dim) { return dim < 0; });
  const auto& result = analysis_->result;
  shareable_ = pure && of_tokens && result && std::none_of(result->begin(), result->end(), [](const ValueInfo& info) {
                 return info.count(Kind::kSource) + info.count(Kind::kBatchSource) + info.count(Kind::kUnknown) > 0;
               });
}

std::vector<at::Tensor> SourceSubgraph::run(const Inputs& inputs) const {
  const auto& source = analysis_->source;
  const auto& ids = inputs.at(static_cast<std::size_t>(source_argument(*analysis_))).toTensor();
  Inputs given = inputs;
  for (std::size_t i = 0; i < source.size(); ++i) {
    // Of the target no more than the number of rows counts.
    if (!source[i] && inputs[i].isTensor()) given[i] = at::ones({ids.size(0), 1}, inputs[i].toTensor().options());
  }
  Env env(program_.slots.size());
  put_inputs(*analysis_, program_, given, env);
  program_.source.run(analysis_->module._ivalue(), env);
  std::vector<at::Tensor> values;
  for (std::size_t i = 0; i < token_dims_.size(); ++i) {
    const auto factor = entries_of_row(*analysis_, analysis_->source_part.values[i]);
    const auto value = env[static_cast<std::size_t>(program_.source.out()[i])].toTensor();
    values.push_back(factor == 1 ? value : value.unflatten(0, {ids.size(0), factor}));
  }
  return values;
}

}  // namespace llmcache::ts
