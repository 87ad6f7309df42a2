#include "model/torchscript_attention_ops.h"

#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "model/torchscript_subgraph.h"

namespace llmcache::ts {
namespace {

namespace aten = c10::aten;
using Kind = Label::Kind;

const c10::Symbol kSdpa = c10::Symbol::fromQualString("aten::scaled_dot_product_attention");

/// Attention scores and the like: one entry for each pair of tokens, or of a token and one of the source.
bool pairs_tokens(const Analysis& analysis, const Value* value) {
  const auto info = analysis.infos.find(value);
  return info != analysis.infos.end() && info->second.is_tensor() && analysis.dependent.count(value) &&
         info->second.count(Kind::kTokens) >= 1 &&
         info->second.count(Kind::kTokens) + info->second.count(Kind::kSource) >= 2;
}

/// Does a size of it follow from the source?
bool over_source(const ValueInfo& info) {
  return info.count(Kind::kSource) + info.count(Kind::kBatchSource) > 0 || info.integer.kind == Kind::kSource ||
         info.integer.kind == Kind::kBatchSource;
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

/// Of an input that does not depend on hidden states: where its rows and tokens are. Empty, or what is wrong with it.
std::string describe_side(const ValueInfo& info, AttentionInput& input) {
  input.batch_dim = info.only(Kind::kBatch);
  if (input.batch_dim == -2 || info.count(Kind::kUnknown) > 0 || info.count(Kind::kBatchTokens) > 0 ||
      info.count(Kind::kBatchSource) > 0) {
    return "has a shape that follows no rule";
  }
  const auto rank = static_cast<int>(info.dims.size());
  for (int d = 0; d < rank; ++d) {
    const Label& label = info.dims[static_cast<std::size_t>(d)];
    if (label.kind == Kind::kBatch) input.batch_factor = label.factor;
    if (label.kind != Kind::kTokens) continue;
    if (label.factor != 1) return "has a merged dimension";
    if (info.count(Kind::kTokens) == 1) {
      (d == rank - 1 ? input.key_dim : input.query_dim) = d;
    } else if (input.query_dim == -1) {
      input.query_dim = d;
    } else if (input.key_dim == -1) {
      input.key_dim = d;
    } else {
      return "has three token dimensions";
    }
  }
  const bool fixed = input.batch_dim == -1 && input.query_dim == -1 && input.key_dim == -1;
  input.role = fixed ? Role::kFixed : Role::kSide;
  return {};
}

/// Empty, or what is wrong with it.
std::string describe_input(const Analysis& analysis, AttentionInput& input) {
  const auto found = analysis.infos.find(input.value);
  if (found == analysis.infos.end() || found->second.kind == ValueInfo::Kind::kUnknown) return "has no fixed rank";
  const ValueInfo& info = found->second;
  const bool depends = analysis.dependent.count(input.value) > 0;
  const auto type = input.value->type()->kind();
  if (info.is_scalar() && over_source(info)) {
    return info.integer.kind == Kind::kBatchSource ? "counts the source's tokens of all rows" : "";
  }
  if (info.integer.kind != Kind::kConstant && info.integer.kind != Kind::kUnknown && info.is_scalar()) {
    input.role = Role::kLength;
    input.length = info.integer;
  } else if (info.is_tensor() && depends) {
    input.role = Role::kKey;
    input.token_dim = token_dim(info);
    if (input.token_dim < 0) return "is not per token";
  } else if (info.is_tensor()) {
    return describe_side(info, input);
  } else if (depends && info.kind == ValueInfo::Kind::kOther && type == c10::TypeKind::ListType) {
    return "is a list made from hidden states";
  }
  return {};
}

bool describe_inputs(const Analysis& analysis, Region& region, std::string& reason) {
  for (const Value* value : external_inputs(analysis.flat, region.nodes)) {
    AttentionInput input;
    input.value = value;
    const std::string wrong = describe_input(analysis, input);
    if (!wrong.empty()) {
      reason = fmt::format("'{}', an input of its attention, {}", value->debugName(), wrong);
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

/// Elements of a value for each token.
std::int64_t elements_per_token(const Analysis& analysis, const Value* value) {
  const auto info = analysis.infos.find(value);
  if (info == analysis.infos.end() || !info->second.is_tensor()) return 0;
  std::int64_t elements = 1;
  for (const Label& label : info->second.dims) elements *= label.factor;
  return elements;
}

/// Grouped-query attention: heads of `keys` may be repeated in front of the attention operator. The nodes that do so
/// move into its region, so that keys are kept before. Returns the value that enters them, `keys` if there are none.
const Value* absorb_repetition(const Analysis& analysis, const std::vector<Node*>& nodes, std::vector<int>& region_of,
                               int region, const Value* keys) {
  static const std::unordered_set<c10::Symbol> kRepeating{aten::slice, aten::unsqueeze, aten::expand, aten::reshape,
                                                          aten::view};
  const auto index_of = [&](const Node* node) {
    return static_cast<std::size_t>(std::find(nodes.begin(), nodes.end(), node) - nodes.begin());
  };
  std::vector<std::size_t> chain;
  std::size_t absorbed = 0;
  const Value* source = keys;
  const Value* best = keys;
  for (const Node* user = nullptr;;) {
    const Node* node = source->node();
    const auto i = index_of(node);
    const bool only_here = source->uses().size() == 1 && (user == nullptr || source->uses()[0].user == user);
    if (i == nodes.size() || region_of[i] != -1 || !kRepeating.count(node->kind()) || !only_here) break;
    chain.push_back(i);
    user = node;
    source = node->input(0);
    if (elements_per_token(analysis, source) > 0 &&
        elements_per_token(analysis, source) < elements_per_token(analysis, keys) &&
        elements_per_token(analysis, source) <= elements_per_token(analysis, best)) {
      best = source;
      absorbed = chain.size();
    }
  }
  for (std::size_t i = 0; i < absorbed; ++i) region_of[chain[i]] = region;
  return best;
}

}  // namespace

namespace {

namespace prim = c10::prim;

bool over_tokens(const Label& label) { return label.kind == Kind::kTokens || label.kind == Kind::kBatchTokens; }

/// Is there a prim::If or prim::Loop, in the node or below it, for whose condition `decides` is true?
bool branches(const Node* node, const std::function<bool(const Value*)>& decides) {
  if (node->kind() == prim::If && decides(node->input(0))) return true;
  if (node->kind() == prim::Loop && (decides(node->input(0)) || decides(node->input(1)))) return true;
  for (const torch::jit::Block* block : node->blocks()) {
    for (const Node* inner : block->nodes()) {
      if (branches(inner, decides)) return true;
    }
  }
  return false;
}

/// Does `value` come from a value for which `found` says true? What it says false of is not followed further.
bool comes_from(const Value* value, const std::function<std::optional<bool>(const Value*)>& found) {
  static const std::unordered_set<c10::Symbol> kFixed{prim::dtype,   prim::device, prim::layout,
                                                      prim::is_cuda, aten::dim,    aten::is_floating_point};
  std::unordered_set<const Value*> visited;
  const std::function<bool(const Value*)> visit = [&](const Value* v) {
    if (!visited.insert(v).second || kFixed.count(v->node()->kind())) return false;
    if (const auto answer = found(v)) return *answer;
    const auto inputs = all_inputs(v->node());
    return std::any_of(inputs.begin(), inputs.end(), visit);
  };
  return visit(value);
}

bool is_size(const Value* value) {
  static const std::unordered_set<c10::Symbol> kSizes{aten::size, aten::len, aten::numel};
  return kSizes.count(value->node()->kind()) > 0;
}

const Label* integer_label(const Analysis& analysis, const Value* value) {
  const auto info = analysis.infos.find(value);
  return info == analysis.infos.end() ? nullptr : &info->second.integer;
}

bool is_hidden_data(const Analysis& analysis, const Value* value) {
  return analysis.dependent.count(value) && value->type()->isSubtypeOf(*c10::TensorType::get());
}

bool branches_on_request(const Analysis& analysis, const Node* node) {
  return branches(node, [&](const Value* condition) {
    return comes_from(condition, [&](const Value* value) -> std::optional<bool> {
      const Label* label = integer_label(analysis, value);
      if (label != nullptr && label->kind == Kind::kConstant) return false;
      if (is_size(value)) return true;
      // A counter of a loop is a parameter of its block; those of the graph are the inputs, whose values count alone.
      if (value->node()->kind() == prim::Param) return value->node()->owningBlock() != analysis.flat.graph->block();
      if (is_hidden_data(analysis, value)) return true;
      return std::nullopt;
    });
  });
}

/// A limit that is no limit, or that is made of sizes by sums and products alone.
bool follows_sizes(const Value* limit, bool is_start) {
  static const std::unordered_set<c10::Symbol> kTransparent{
      aten::Int, aten::IntImplicit, aten::ScalarImplicit, prim::NumToTensor, aten::add,     aten::sub,
      aten::mul, aten::neg,         aten::rsub,           aten::to,          prim::Constant};
  if (const auto constant = torch::jit::toIValue(limit)) {
    if (constant->isNone()) return true;
    if (!constant->isInt()) return false;
    return is_start ? constant->toInt() == 0 : constant->toInt() >= std::numeric_limits<std::int32_t>::max();
  }
  return !comes_from(limit, [&](const Value* value) -> std::optional<bool> {
    if (value->node()->kind() == aten::size) return false;
    if (!kTransparent.count(value->node()->kind())) return true;
    return std::nullopt;
  });
}

/// Does the node cut a dimension of tokens to a length that the probes' sequences do not reach?
bool cuts_at_fixed_length(const Analysis& analysis, const Node* node) {
  const bool narrow = node->kind() == aten::narrow;
  if (!narrow && (node->kind() != aten::slice || node->inputs().size() != 5)) return false;
  const auto whole = analysis.infos.find(node->input(0));
  const auto part = analysis.infos.find(node->output());
  auto dim = torch::jit::constant_as<std::int64_t>(node->input(1));
  if (!dim || whole == analysis.infos.end() || part == analysis.infos.end()) return false;
  const auto& dims = whole->second.dims;
  if (*dim < 0) *dim += static_cast<std::int64_t>(dims.size());
  const auto d = static_cast<std::size_t>(*dim);
  if (d >= dims.size() || dims.size() != part->second.dims.size() || !over_tokens(dims[d])) return false;
  if (!(dims[d] == part->second.dims[d])) return false;  // seen by every probe
  return !follows_sizes(node->input(2), true) || !follows_sizes(node->input(3), false);
}

}  // namespace

std::string find_obstacle(const Analysis& analysis) {
  for (const Node* node : analysis.flat.graph->nodes()) {
    if (branches_on_request(analysis, node)) {
      return fmt::format("the model contains {}, whose way depends on sizes or hidden states",
                         node->kind().toQualString());
    }
    if (cuts_at_fixed_length(analysis, node)) {
      return fmt::format("the model cuts sequences at a fixed length ({} of '{}')", node->kind().toQualString(),
                         node->input(0)->debugName());
    }
  }
  return {};
}

bool rows_may_meet(const Analysis& analysis) {
  const auto decides = [&](const Value* condition) {
    return comes_from(condition, [&](const Value* value) -> std::optional<bool> {
      if (is_size(value)) {
        const Label* label = integer_label(analysis, value);
        return label == nullptr || (label->kind != Kind::kTokens && label->kind != Kind::kConstant);
      }
      if (is_hidden_data(analysis, value)) return true;
      // Whether some row is padded is probed; whether some row holds a certain id is not.
      for (std::size_t i = 0; i < analysis.vocabulary.size(); ++i) {
        if (value == analysis.flat.input(i)) return analysis.vocabulary[i] > 0;
      }
      return std::nullopt;
    });
  };
  // A branch that raises or does nothing decides whether there is a result, not what it is.
  const auto only_raises = [](const Node* node) {
    if (node->kind() != prim::If || !node->outputs().empty()) return false;
    const auto harmless = [](const Node* inner) {
      return inner->kind() == prim::RaiseException || is_pure(const_cast<Node*>(inner));
    };
    return std::all_of(node->blocks().begin(), node->blocks().end(), [&](const torch::jit::Block* block) {
      return std::all_of(block->nodes().begin(), block->nodes().end(), harmless);
    });
  };
  const auto nodes = analysis.flat.graph->nodes();
  return std::any_of(nodes.begin(), nodes.end(),
                     [&](const Node* node) { return !only_raises(node) && branches(node, decides); });
}

bool accumulates_over_tokens(const Analysis& analysis, const Node* node) {
  static const std::unordered_set<c10::Symbol> kAccumulating{aten::cumsum, aten::cumprod, aten::cummax, aten::cummin,
                                                             aten::logcumsumexp};
  if (!kAccumulating.count(node->kind()) || node->inputs().size() < 2) return false;
  const auto info = analysis.infos.find(node->input(0));
  auto dim = torch::jit::constant_as<std::int64_t>(node->input(1));
  if (!dim || info == analysis.infos.end()) return true;
  if (*dim < 0) *dim += static_cast<std::int64_t>(info->second.dims.size());
  const auto d = static_cast<std::size_t>(*dim);
  return d >= info->second.dims.size() || info->second.dims[d].kind != Kind::kConstant;
}

namespace {

/// Sizes of repeated keys that are the same for all inputs become constants, so that nothing but attention uses them.
void fix_constant_sizes(Analysis& analysis) {
  auto& graph = *analysis.flat.graph;
  std::vector<Value*> sizes;
  for (Node* node : graph.nodes()) {
    if (node->kind() != kSdpa) continue;
    for (const std::size_t input : {std::size_t{1}, std::size_t{2}}) {
      for (const auto& use : node->input(input)->uses()) {
        const Node* user = use.user;
        if (user->kind() != aten::size || user->outputs().size() != 1 || user->inputs().size() != 2) continue;
        const Label* label = integer_label(analysis, user->output());
        if (label != nullptr && label->kind == Kind::kConstant) sizes.push_back(use.user->output());
      }
    }
  }
  for (Value* size : sizes) {
    const torch::jit::WithInsertPoint guard(*graph.nodes().begin());
    Value* constant = graph.insertConstant(integer_label(analysis, size)->factor);
    analysis.flat.part[constant->node()] = 0;
    analysis.infos[constant] = analysis.infos.at(size);
    size->replaceAllUsesWith(constant);
  }
}

/// The same number once more, computed beside it.
Value* twin_of(Analysis& analysis, Value* size) {
  Node* maker = size->node();
  const torch::jit::WithInsertPoint guard(maker->next());
  Node* copy = analysis.flat.graph->createClone(maker, [](Value* value) { return value; });
  analysis.flat.graph->insertNode(copy);
  analysis.flat.part[copy] = analysis.flat.part.at(maker);
  analysis.infos[copy->output()] = analysis.infos.at(size);
  return copy->output();
}

/// A program of torch.export has one number of tokens, and shapes scores, queries by keys, by that alone. Where it is
/// used twice, what comes second becomes a number of its own, so that there may be fewer queries than keys.
void number_keys_apart(Analysis& analysis) {
  std::unordered_map<Value*, Value*> twins;
  for (Node* list : analysis.flat.graph->nodes()) {
    if (list->kind() != prim::ListConstruct) continue;
    const auto shapes_pairs = [&](const auto& use) {
      return use.user->outputs().size() == 1 && pairs_tokens(analysis, use.user->output());
    };
    if (std::none_of(list->output()->uses().begin(), list->output()->uses().end(), shapes_pairs)) continue;
    for (std::size_t i = 1; i < list->inputs().size(); ++i) {
      Value* size = list->input(i);
      const Label* label = integer_label(analysis, size);
      const auto before = list->inputs().slice(0, i);
      const bool twice = std::find(before.begin(), before.end(), size) != before.end();
      const bool of_input = label != nullptr && label->kind == Kind::kTokens && !analysis.dependent.count(size) &&
                            size->node()->kind() == aten::size && size->node()->outputs().size() == 1;
      if (!twice || !of_input) continue;
      const auto [known, fresh] = twins.try_emplace(size, nullptr);
      if (fresh) known->second = twin_of(analysis, size);
      list->replaceInput(i, known->second);
    }
  }
}

}  // namespace

void detach_region_scalars(Analysis& analysis) {
  fix_constant_sizes(analysis);
  number_keys_apart(analysis);
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

namespace {

/// Splits one layer: regions in which tokens meet, pieces before, between and behind them.
class LayerSplitter {
 public:
  LayerSplitter(const Analysis& analysis, std::int64_t part)
      : analysis_(analysis), part_(part), nodes_(hidden_nodes(analysis, part)) {}

  /// Empty if it cannot be split, and why in `reason`.
  std::optional<SplitLayer> split(std::string& reason) {
    reason = find_regions_();
    if (reason.empty()) {
      absorb_repetitions();
      absorb_scalars();
      collect_region_nodes();
      reason = order_pieces();
    }
    for (std::size_t r = 0; reason.empty() && r < split_.regions.size(); ++r) reason = describe_region(r);
    if (reason.empty()) reason = find_meeting_outside();
    return reason.empty() ? std::optional(std::move(split_)) : std::nullopt;
  }

 private:
  static constexpr int kNone = -1;

  // What each of these returns is the reason why the layer cannot be split; empty: none.

  std::string find_regions_() {
    for (Node* node : analysis_.nodes(part_)) {
      if (is_pure(node)) continue;
      return fmt::format("it contains {}, which writes in place or has other effects", node->kind().toQualString());
    }
    const int regions = find_regions(analysis_, nodes_, region_of_);
    if (regions < 0) return "its attention operators are interwoven";
    split_.regions.resize(static_cast<std::size_t>(regions));
    collect_region_nodes();
    return {};
  }

  void collect_region_nodes() {
    for (Region& region : split_.regions) region.nodes.clear();
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (region_of_[i] != kNone) split_.regions[static_cast<std::size_t>(region_of_[i])].nodes.push_back(nodes_[i]);
    }
  }

  void absorb_repetitions() {
    for (std::size_t r = 0; r < split_.regions.size(); ++r) {
      Region& region = split_.regions[r];
      if (region.nodes.size() != 1 || region.nodes[0]->kind() != kSdpa) continue;
      region.sdpa = region.nodes[0];
      const auto absorb = [&](std::size_t input) {
        return absorb_repetition(analysis_, nodes_, region_of_, static_cast<int>(r), region.sdpa->input(input));
      };
      region.keys = absorb(1);
      region.values = absorb(2);
    }
  }

  /// Scalars that only a region uses, made from sizes of its per-token inputs, move into it: there they are taken of
  /// one sequence, not of all packed rows.
  void absorb_scalars() {
    for (std::size_t i = nodes_.size(); i-- > 0;) {
      if (region_of_[i] != kNone || nodes_[i]->outputs().empty()) continue;
      const auto outputs = nodes_[i]->outputs();
      const bool scalar = std::all_of(outputs.begin(), outputs.end(), [&](const Value* output) {
        const auto info = analysis_.infos.find(output);
        return info != analysis_.infos.end() && info->second.is_scalar();
      });
      if (scalar) region_of_[i] = only_user_of(outputs);
    }
  }

  /// The region that all uses of `outputs` are in; kNone: there is no such.
  int only_user_of(at::ArrayRef<Value*> outputs) const {
    constexpr int kUnused = -2;
    int target = kUnused;
    std::vector<const Value*> pending(outputs.begin(), outputs.end());
    while (!pending.empty()) {
      const Value* value = pending.back();
      pending.pop_back();
      for (const auto& use : value->uses()) {
        const Node* user = use.user;
        while (user->owningBlock() != analysis_.flat.graph->block()) user = user->owningBlock()->owningNode();
        if (user->outputs().size() == 1 && is_rematerialised(user->output(), analysis_.flat.self())) {
          pending.push_back(user->output());
          continue;
        }
        const auto at = std::find(nodes_.begin(), nodes_.end(), user);
        const int home = at == nodes_.end() ? kNone : region_of_[static_cast<std::size_t>(at - nodes_.begin())];
        target = target == kUnused || target == home ? home : kNone;
      }
    }
    return target == kUnused ? kNone : target;
  }

  /// The first piece in which all that a node needs is there.
  std::size_t piece_of(const Node* node, const std::unordered_map<const Value*, std::size_t>& stage) const {
    std::size_t need = 0;
    std::vector<const Value*> pending = all_inputs(node);
    while (!pending.empty()) {
      const Value* value = pending.back();
      pending.pop_back();
      if (const auto it = stage.find(value); it != stage.end()) need = std::max(need, it->second);
      if (is_rematerialised(value, analysis_.flat.self()) && value != analysis_.flat.self()) {
        for (const Value* source : value->node()->inputs()) pending.push_back(source);
      }
    }
    return need;
  }

  std::string order_pieces() {
    const auto regions = split_.regions.size();
    split_.pieces.resize(regions + 1);
    region_stage_.assign(regions, 0);
    std::unordered_map<const Value*, std::size_t> stage;
    std::size_t done = 0;
    std::vector<std::size_t> seen(regions, 0);
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const std::size_t need = piece_of(nodes_[i], stage);
      if (region_of_[i] == kNone) {
        split_.pieces[need].push_back(nodes_[i]);
        for (const Value* output : nodes_[i]->outputs()) stage[output] = need;
        continue;
      }
      const auto r = static_cast<std::size_t>(region_of_[i]);
      region_stage_[r] = std::max(region_stage_[r], need);
      for (const Value* output : nodes_[i]->outputs()) stage[output] = r + 1;
      if (++seen[r] == split_.regions[r].nodes.size()) ++done;
    }
    return done == regions ? "" : "its attention operators could not be ordered";
  }

  std::string describe_region(std::size_t r) {
    Region& region = split_.regions[r];
    const auto outputs = analysis_.escaping(region.nodes);
    if (outputs.size() != 1 || region_stage_[r] > r + 1) {
      std::string names;
      for (const Value* output : outputs) {
        names += fmt::format(" {} ({} of {})", output->debugName(), output->node()->kind().toQualString(),
                             output->node()->inputs().empty() ? "" : output->node()->input(0)->debugName());
      }
      return fmt::format("attention operator {} hands on {} values, 1 expected:{}", r, outputs.size(), names);
    }
    region.output = *outputs.begin();
    region.output_dim = token_dim(analysis_.infos.at(region.output));
    if (region.output_dim < 0) return "the result of its attention is not per token";
    std::string reason;
    return describe_inputs(analysis_, region, reason) ? "" : reason;
  }

  /// Outside attention no value may cover pairs of tokens, and no token may count those before it.
  std::string find_meeting_outside() const {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (region_of_[i] != kNone) continue;
      if (accumulates_over_tokens(analysis_, nodes_[i])) {
        return fmt::format("{} runs over the tokens outside attention", nodes_[i]->kind().toQualString());
      }
      for (const Value* output : nodes_[i]->outputs()) {
        if (!pairs_tokens(analysis_, output)) continue;
        return fmt::format("'{}' covers pairs of tokens outside attention", output->debugName());
      }
    }
    return {};
  }

  const Analysis& analysis_;
  const std::int64_t part_;
  const std::vector<Node*> nodes_;  ///< of the layer, that depend on hidden states
  std::vector<int> region_of_;      ///< by node
  std::vector<std::size_t> region_stage_;
  SplitLayer split_;
};

}  // namespace

std::optional<SplitLayer> split_layer(const Analysis& analysis, std::int64_t part, std::string& reason) {
  return LayerSplitter(analysis, part).split(reason);
}

}  // namespace llmcache::ts
