#include "model/torchscript_sites.h"

#include <fmt/core.h>

#include <algorithm>

namespace llmcache::ts {
namespace {

namespace aten = c10::aten;
using Kind = Label::Kind;

const c10::Symbol kSdpa = c10::Symbol::fromQualString("aten::scaled_dot_product_attention");

/// Attention scores and the like: one entry for each pair of tokens.
bool pairs_tokens(const Analysis& analysis, const Value* value) {
  const auto info = analysis.infos.find(value);
  return info != analysis.infos.end() && info->second.is_tensor() && analysis.dependent.count(value) &&
         info->second.count(Kind::kTokens) >= 2;
}

int token_dim(const ValueInfo& info) {
  const int dim = info.only(Kind::kTokens);
  if (dim != -1) return dim;
  return info.only(Kind::kBatchTokens);
}

bool works_on_hidden(const Analysis& analysis, const Node* node) {
  const auto inputs = all_inputs(node);
  return std::any_of(inputs.begin(), inputs.end(), [&](const Value* v) { return analysis.dependent.count(v) > 0; });
}

/// reach[i][j]: node j uses, directly or not, something that node i made.
std::vector<std::vector<char>> reachability(const std::vector<Node*>& nodes) {
  std::unordered_map<const Value*, std::size_t> maker;
  std::vector<std::vector<char>> reach(nodes.size(), std::vector<char>(nodes.size(), 0));
  for (std::size_t j = 0; j < nodes.size(); ++j) {
    for (const Value* input : all_inputs(nodes[j])) {
      const auto it = maker.find(input);
      if (it == maker.end()) continue;
      reach[it->second][j] = 1;
      for (std::size_t i = 0; i < it->second; ++i) {
        if (reach[i][it->second]) reach[i][j] = 1;
      }
    }
    for (const Value* output : nodes[j]->outputs()) maker[output] = j;
  }
  return reach;
}

/// Groups of nodes that exchange values over pairs of tokens; each sdpa node is one of its own.
std::vector<std::vector<std::size_t>> core_groups(const Analysis& analysis, const std::vector<Node*>& nodes) {
  std::vector<std::size_t> group(nodes.size());
  for (std::size_t i = 0; i < nodes.size(); ++i) group[i] = i;
  const std::function<std::size_t(std::size_t)> root = [&](std::size_t i) {
    return group[i] == i ? i : group[i] = root(group[i]);
  };
  std::vector<char> core(nodes.size(), 0);
  std::unordered_map<const Value*, std::size_t> maker;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i]->kind() == kSdpa) core[i] = 1;
    for (const Value* input : all_inputs(nodes[i])) {
      if (!pairs_tokens(analysis, input)) continue;
      core[i] = 1;
      if (const auto it = maker.find(input); it != maker.end()) group[root(i)] = root(it->second);
    }
    for (const Value* output : nodes[i]->outputs()) {
      maker[output] = i;
      if (pairs_tokens(analysis, output)) core[i] = 1;
    }
  }
  std::map<std::size_t, std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (core[i]) groups[root(i)].push_back(i);
  }
  std::vector<std::vector<std::size_t>> result;
  for (auto& [_, members] : groups) result.push_back(std::move(members));
  std::sort(result.begin(), result.end());
  return result;
}

bool describe_inputs(const Analysis& analysis, Region& region, std::string& reason) {
  for (const Value* value : external_inputs(analysis.flat, region.nodes)) {
    SiteInput input;
    input.value = value;
    const auto found = analysis.infos.find(value);
    if (found == analysis.infos.end() || found->second.kind == ValueInfo::Kind::kUnknown) {
      reason = fmt::format("'{}', an input of its attention, has no fixed rank", value->debugName());
      return false;
    }
    const ValueInfo& info = found->second;
    const bool depends = analysis.dependent.count(value) > 0;
    if (info.integer.kind != Kind::kConstant && info.integer.kind != Kind::kUnknown && info.is_scalar()) {
      input.role = Role::kLength;
      input.length = info.integer;
    } else if (info.is_tensor() && depends) {
      const int dim = token_dim(info);
      if (dim < 0) {
        reason = fmt::format("'{}', an input of its attention, is not per token", value->debugName());
        return false;
      }
      input.role = Role::kKey;
      input.token_dim = dim;
    } else if (info.is_tensor()) {
      input.batch_dim = info.only(Kind::kBatch);
      if (input.batch_dim == -2 || info.count(Kind::kUnknown) > 0 || info.count(Kind::kBatchTokens) > 0) {
        reason = fmt::format("'{}', an input of its attention, has a shape that follows no rule", value->debugName());
        return false;
      }
      const auto rank = static_cast<int>(info.dims.size());
      for (int d = 0; d < rank; ++d) {
        const Label& label = info.dims[static_cast<std::size_t>(d)];
        if (label.kind != Kind::kTokens && label.kind != Kind::kBatch) continue;
        if (label.kind == Kind::kBatch) input.batch_factor = label.factor;
        if (label.kind == Kind::kTokens && label.factor != 1) {
          reason = fmt::format("'{}', an input of its attention, has a merged dimension", value->debugName());
          return false;
        }
        if (label.kind != Kind::kTokens) continue;
        if (info.count(Kind::kTokens) == 1) {
          (d == rank - 1 ? input.key_dim : input.query_dim) = d;
        } else if (input.query_dim == -1) {
          input.query_dim = d;
        } else if (input.key_dim == -1) {
          input.key_dim = d;
        } else {
          reason = fmt::format("'{}', an input of its attention, has three token dimensions", value->debugName());
          return false;
        }
      }
      const bool fixed = input.batch_dim == -1 && input.query_dim == -1 && input.key_dim == -1;
      input.role = fixed ? Role::kFixed : Role::kSide;
    } else if (depends && info.kind == ValueInfo::Kind::kOther && value->type()->kind() == c10::TypeKind::ListType) {
      reason = fmt::format("'{}', an input of its attention, is a list made from hidden states", value->debugName());
      return false;
    }
    region.inputs.push_back(input);
  }
  return true;
}

/// For each node its region, -1 outside all of them; the number of regions, or -1 if two overlap.
int find_regions(const Analysis& analysis, const std::vector<Node*>& nodes, std::vector<int>& region_of) {
  const auto reach = reachability(nodes);
  region_of.assign(nodes.size(), -1);
  int regions = 0;
  for (const auto& core : core_groups(analysis, nodes)) {
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      const bool in_core = std::find(core.begin(), core.end(), i) != core.end();
      // What lies between two nodes of a region belongs to it.
      const bool between = std::any_of(core.begin(), core.end(), [&](std::size_t c) { return c < i && reach[c][i]; }) &&
                           std::any_of(core.begin(), core.end(), [&](std::size_t c) { return i < c && reach[i][c]; });
      if (!in_core && !between) continue;
      if (region_of[i] != -1) return -1;
      region_of[i] = regions;
    }
    ++regions;
  }
  return regions;
}

/// Nodes of a layer that work on hidden states; lists are left to be made again where they are used.
std::vector<Node*> hidden_nodes(const Analysis& analysis, std::int64_t part) {
  std::vector<Node*> nodes;
  for (Node* node : analysis.nodes(part)) {
    if (node->outputs().size() == 1 && is_rematerialised(node->output(), analysis.flat.self())) continue;
    if (works_on_hidden(analysis, node)) nodes.push_back(node);
  }
  return nodes;
}

}  // namespace

bool branches_on_request(const Analysis& analysis, const Node* node) {
  namespace prim = c10::prim;
  static const std::unordered_set<c10::Symbol> kFixed{prim::dtype,   prim::device, prim::layout,
                                                      prim::is_cuda, aten::dim,    aten::is_floating_point};
  static const std::unordered_set<c10::Symbol> kSizes{aten::size, aten::len, aten::numel};
  std::unordered_set<const Value*> visited;
  const std::function<bool(const Value*)> varies = [&](const Value* value) {
    if (!visited.insert(value).second) return false;
    const Node* maker = value->node();
    const auto info = analysis.infos.find(value);
    if (kFixed.count(maker->kind())) return false;
    if (info != analysis.infos.end() && info->second.integer.kind == Kind::kConstant) return false;
    if (kSizes.count(maker->kind())) return true;
    // A counter of a loop is a parameter of its block; those of the graph are the inputs, whose values count alone.
    if (maker->kind() == prim::Param) return maker->owningBlock() != analysis.flat.graph->block();
    if (analysis.dependent.count(value) && value->type()->isSubtypeOf(*c10::TensorType::get())) return true;
    const auto inputs = all_inputs(maker);
    return std::any_of(inputs.begin(), inputs.end(), varies);
  };
  if (node->kind() == prim::If && varies(node->input(0))) return true;
  if (node->kind() == prim::Loop && (varies(node->input(0)) || varies(node->input(1)))) return true;
  for (const torch::jit::Block* block : node->blocks()) {
    for (const Node* inner : block->nodes()) {
      if (branches_on_request(analysis, inner)) return true;
    }
  }
  return false;
}

void detach_region_scalars(Analysis& analysis) {
  for (std::int64_t part = 1; part <= analysis.flat.layers; ++part) {
    const auto nodes = hidden_nodes(analysis, part);
    std::vector<int> region_of;
    if (find_regions(analysis, nodes, region_of) <= 0) continue;
    std::unordered_map<const Node*, int> home;
    for (std::size_t i = 0; i < nodes.size(); ++i) home[nodes[i]] = region_of[i];
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (region_of[i] == -1) continue;
      for (Value* output : nodes[i]->outputs()) {
        const auto twin = analysis.detached.find(output);
        if (twin == analysis.detached.end()) continue;
        const auto uses = output->uses();
        for (const auto& use : uses) {
          // A list is made again for each of its users: look at those.
          const Node* user = use.user;
          bool inside = false;
          if (user->outputs().size() == 1 && is_rematerialised(user->output(), analysis.flat.self())) {
            for (const auto& list_use : user->output()->uses()) {
              const auto at = home.find(list_use.user);
              inside = inside || (at != home.end() && at->second == region_of[i]);
            }
          } else {
            const auto at = home.find(user);
            inside = at != home.end() && at->second == region_of[i];
          }
          if (!inside && twin->second->node()->isBefore(use.user)) use.user->replaceInput(use.offset, twin->second);
        }
      }
    }
  }
  analysis.dependent = dependants(analysis.flat, analysis.hidden[0]);
}

std::optional<SplitLayer> split_layer(const Analysis& analysis, std::int64_t part, std::string& reason) {
  const auto nodes = hidden_nodes(analysis, part);
  for (Node* node : analysis.nodes(part)) {
    if (is_pure(node)) continue;
    reason = fmt::format("it contains {}, which writes in place or has other effects", node->kind().toQualString());
    return std::nullopt;
  }
  SplitLayer split;
  std::vector<int> region_of;
  const int regions = find_regions(analysis, nodes, region_of);
  if (regions < 0) {
    reason = "its attention sites are interwoven";
    return std::nullopt;
  }
  split.regions.resize(static_cast<std::size_t>(regions));
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (region_of[i] != -1) split.regions[static_cast<std::size_t>(region_of[i])].nodes.push_back(nodes[i]);
  }
  for (Region& region : split.regions) {
    region.sdpa = region.nodes.size() == 1 && region.nodes[0]->kind() == kSdpa;
  }
  // Scalars that only a region uses, made from sizes of its per-token inputs, move into it: there
  // they are taken of one sequence, not of all packed rows.
  for (std::size_t i = nodes.size(); i-- > 0;) {
    if (region_of[i] != -1 || nodes[i]->outputs().empty()) continue;
    int target = -2;
    bool scalar = true;
    for (const Value* output : nodes[i]->outputs()) {
      const auto info = analysis.infos.find(output);
      scalar = scalar && info != analysis.infos.end() && info->second.is_scalar();
      std::vector<const Value*> pending{output};
      while (!pending.empty()) {
        const Value* value = pending.back();
        pending.pop_back();
        for (const auto& use : value->uses()) {
          const Node* user = use.user;
          while (user->owningBlock() != analysis.flat.graph->block()) user = user->owningBlock()->owningNode();
          if (user->outputs().size() == 1 && is_rematerialised(user->output(), analysis.flat.self())) {
            pending.push_back(user->output());
            continue;
          }
          const auto at = std::find(nodes.begin(), nodes.end(), user);
          const int home = at == nodes.end() ? -1 : region_of[static_cast<std::size_t>(at - nodes.begin())];
          target = target == -2 || target == home ? home : -1;
        }
      }
    }
    if (!scalar || target < 0) continue;
    region_of[i] = target;
    split.regions[static_cast<std::size_t>(target)].sdpa = false;
  }
  for (Region& region : split.regions) region.nodes.clear();
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (region_of[i] != -1) split.regions[static_cast<std::size_t>(region_of[i])].nodes.push_back(nodes[i]);
  }

  // Everything else goes into the first piece in which all it needs is there.
  split.pieces.resize(split.regions.size() + 1);
  std::unordered_map<const Value*, std::size_t> stage;
  std::size_t done = 0;
  std::vector<std::size_t> region_stage(split.regions.size(), 0);
  std::vector<std::size_t> seen(split.regions.size(), 0);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    std::size_t need = 0;
    for (const Value* input : all_inputs(nodes[i])) {
      std::vector<const Value*> pending{input};
      while (!pending.empty()) {
        const Value* value = pending.back();
        pending.pop_back();
        if (const auto it = stage.find(value); it != stage.end()) need = std::max(need, it->second);
        if (is_rematerialised(value, analysis.flat.self()) && value != analysis.flat.self()) {
          for (const Value* source : value->node()->inputs()) pending.push_back(source);
        }
      }
    }
    if (region_of[i] == -1) {
      split.pieces[need].push_back(nodes[i]);
      for (const Value* output : nodes[i]->outputs()) stage[output] = need;
      continue;
    }
    const auto r = static_cast<std::size_t>(region_of[i]);
    region_stage[r] = std::max(region_stage[r], need);
    for (const Value* output : nodes[i]->outputs()) stage[output] = r + 1;
    if (++seen[r] == split.regions[r].nodes.size()) ++done;
  }
  if (done != split.regions.size()) {
    reason = "its attention sites could not be ordered";
    return std::nullopt;
  }
  for (std::size_t r = 0; r < split.regions.size(); ++r) {
    Region& region = split.regions[r];
    std::vector<const Value*> outputs;
    for (const Value* value : analysis.escaping(region.nodes)) outputs.push_back(value);
    if (outputs.size() != 1 || region_stage[r] > r + 1) {
      std::string names;
      for (const Value* output : outputs)
        names += fmt::format(" {} ({} of {})", output->debugName(), output->node()->kind().toQualString(),
                             output->node()->inputs().empty() ? "" : output->node()->input(0)->debugName());
      reason = fmt::format("attention site {} hands on {} values, 1 expected:{}", r, outputs.size(), names);
      return std::nullopt;
    }
    region.output = outputs[0];
    region.output_dim = token_dim(analysis.infos.at(region.output));
    if (region.output_dim < 0) {
      reason = "the result of its attention is not per token";
      return std::nullopt;
    }
    if (!describe_inputs(analysis, region, reason)) return std::nullopt;
  }
  // Outside attention no value may cover pairs of tokens.
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (region_of[i] != -1) continue;
    for (const Value* output : nodes[i]->outputs()) {
      if (pairs_tokens(analysis, output)) {
        reason = fmt::format("'{}' covers pairs of tokens outside attention", output->debugName());
        return std::nullopt;
      }
    }
  }
  return split;
}

}  // namespace llmcache::ts
