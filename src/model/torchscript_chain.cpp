// Finds the chain of layers in the call tree of a TorchScript module and flattens the module around
// it. TorchScript keeps one graph a method; a chain is a row of calls, in one graph, of modules that
// live side by side in the same container, each fed by the one before.
#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>
#include <torch/csrc/jit/passes/remove_mutation.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <cctype>
#include <functional>
#include <map>
#include <set>

#include "llmcache/error.h"
#include "model/torchscript_graph.h"
#include "model/torchscript_writes.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;
namespace attr = c10::attr;

bool is_module_call(const Node* node) {
  if (node->kind() != prim::CallMethod || node->inputs().empty()) return false;
  const auto type = node->input(0)->type()->cast<c10::ClassType>();
  return type && type->is_module();
}

std::vector<Node*> module_calls(torch::jit::Block* block) {
  std::vector<Node*> calls;
  for (Node* node : block->nodes()) {
    if (is_module_call(node)) calls.push_back(node);
  }
  return calls;
}

torch::jit::GraphFunction* callee(const Node* call) {
  const auto type = call->input(0)->type()->expect<c10::ClassType>();
  return torch::jit::tryToGraphFunction(type->getMethod(call->s(attr::name)));
}

/// Path of a module value below `self`; empty optional if it is not reached by attributes alone.
std::optional<std::string> module_path(const Value* value, const Value* self, const std::string& self_path) {
  if (value == self) return self_path;
  const Node* node = value->node();
  if (node->kind() != prim::GetAttr) return std::nullopt;
  auto parent = module_path(node->input(0), self, self_path);
  if (!parent) return std::nullopt;
  return parent->empty() ? node->s(attr::name) : *parent + "." + node->s(attr::name);
}

std::pair<std::string, std::string> split_path(const std::string& path) {
  const auto dot = path.rfind('.');
  if (dot == std::string::npos) return {"", path};
  return {path.substr(0, dot), path.substr(dot + 1)};
}

std::optional<Module> module_at(Module module, const std::string& path) {
  std::size_t begin = 0;
  while (begin < path.size()) {
    const auto end = std::min(path.find('.', begin), path.size());
    const auto name = path.substr(begin, end - begin);
    if (!module.hasattr(name)) return std::nullopt;
    const auto value = module.attr(name);
    if (!value.isModule()) return std::nullopt;
    module = value.toModule();
    begin = end + 1;
  }
  return module;
}

std::size_t parameter_bytes(const Module& module) {
  std::size_t bytes = 0;
  for (const at::Tensor& tensor : module.parameters()) bytes += tensor.nbytes();
  return bytes;
}

/// Names of a module's attributes: layers of one kind have the same, whatever their class is called.
std::string signature(const Node* call) {
  std::string text;
  const auto type = call->input(0)->type()->expect<c10::ClassType>();
  for (const auto& attribute : type->getAttributes()) text += attribute.getName() + "\n";
  return text;
}

bool is_number(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

class ChainFinder {
 public:
  ChainFinder(const Module& module, std::string wanted) : module_(module), wanted_(std::move(wanted)) {}

  std::vector<Chain> find() {
    auto& forward = torch::jit::toGraphFunction(module_.get_method("forward").function());
    visit(*forward.graph(), "", {});
    std::stable_sort(chains_.begin(), chains_.end(),
                     [](const Chain& a, const Chain& b) { return a.weight_bytes > b.weight_bytes; });
    return std::move(chains_);
  }

 private:
  struct Call {
    int ordinal;
    Node* node;
    std::string path;
  };

  void visit(Graph& graph, const std::string& self_path, const std::vector<int>& descent) {
    const Value* self = graph.inputs()[0];
    std::map<std::string, std::vector<Call>> groups;
    const auto calls = module_calls(graph.block());
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const auto path = module_path(calls[i]->input(0), self, self_path);
      if (!path) continue;
      const auto [container, name] = split_path(*path);
      const Call call{static_cast<int>(i), calls[i], *path};
      const std::string key = is_number(name) || !wanted_.empty() ? "" : signature(calls[i]);
      groups[container + "\n" + key].push_back(call);
      if (!wanted_.empty() && wanted_ == *path) groups[*path + "\n(itself)"].push_back(call);
      auto* function = callee(calls[i]);
      if (function == nullptr || depth_ > 64) continue;
      auto deeper = descent;
      deeper.push_back(static_cast<int>(i));
      ++depth_;
      visit(*function->graph(), *path, deeper);
      --depth_;
    }
    for (const auto& [key, group] : groups) add_chains(key.substr(0, key.find('\n')), group, descent);
  }

  void add_chains(const std::string& container, const std::vector<Call>& group, const std::vector<int>& descent) {
    if (!wanted_.empty() && container != wanted_) return;
    std::vector<Call> run;
    const auto close = [&] {
      if (run.size() >= 2 || (!run.empty() && !wanted_.empty())) {
        Chain chain{container, descent, {}, 0};
        for (const Call& call : run) {
          chain.calls.push_back(call.ordinal);
          if (const auto layer = module_at(module_, call.path)) chain.weight_bytes += parameter_bytes(*layer);
        }
        chains_.push_back(std::move(chain));
      }
      run.clear();
    };
    for (const Call& call : group) {
      if (!run.empty() && !feeds(run.back().node, call.node)) close();
      run.push_back(call);
    }
    close();
  }

  /// Does an input of `to` depend on an output of `from` (both in the same block)?
  static bool feeds(const Node* from, const Node* to) {
    std::unordered_set<const Value*> reached(from->outputs().begin(), from->outputs().end());
    for (const Node* node = from->next(); node != to; node = node->next()) {
      if (node->kind() == prim::Return) return false;
      for (const Value* input : all_inputs(node)) {
        if (!reached.count(input)) continue;
        reached.insert(node->outputs().begin(), node->outputs().end());
        break;
      }
    }
    return std::any_of(to->inputs().begin(), to->inputs().end(), [&](const Value* v) { return reached.count(v) > 0; });
  }

  const Module& module_;
  std::string wanted_;
  std::vector<Chain> chains_;
  int depth_ = 0;
};

/// A node that no pass moves or removes; it marks where a layer begins and holds on to `arguments`.
Node* insert_marker_before(Node* node, at::ArrayRef<Value*> arguments) {
  Node* marker = node->owningGraph()->create(prim::Print, arguments, 0);
  marker->insertBefore(node);
  return marker;
}

/// Attributes that are numbers, booleans or text (`training` among them) become constants, so that
/// what depends on them can be decided now. The guard of the weights notices if they change.
void fix_scalar_attributes(torch::jit::Block* block, const Value* self, const Module& module) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it++;
    for (torch::jit::Block* inner : node->blocks()) fix_scalar_attributes(inner, self, module);
    if (node->kind() != prim::GetAttr) continue;
    const auto path = module_path(node->input(0), self, "");
    const auto owner = path ? module_at(module, *path) : std::nullopt;
    if (!owner || !owner->hasattr(node->s(attr::name))) continue;
    const auto value = owner->attr(node->s(attr::name));
    if (!value.isBool() && !value.isInt() && !value.isDouble() && !value.isString() && !value.isNone()) continue;
    torch::jit::WithInsertPoint guard(node);
    node->output()->replaceAllUsesWith(node->owningGraph()->insertConstant(value));
    node->destroy();
  }
}

/// Does a tuple or list only hand its parts on to the result?
bool ends_in_result(const Node* node) {
  if (node->kind() == prim::Return) return true;
  if (node->kind() != prim::TupleConstruct && node->kind() != prim::ListConstruct) return false;
  const auto& uses = node->output()->uses();
  return std::all_of(uses.begin(), uses.end(), [](const auto& use) { return ends_in_result(use.user); });
}

/// A list that grows becomes a new list at each append, so that what is read from it depends on all that was put in
/// (TorchScript's own pass does not move lists across the calls of layers). Only where nobody can hold the old list.
void remove_appends(Graph& graph) {
  std::vector<Node*> lists;  // none of them is removed below, as appends are
  for (Node* node : graph.nodes()) {
    if (node->kind() == prim::ListConstruct) lists.push_back(node);
  }
  for (Node* first : lists) {
    std::vector<Node*> appends;
    std::vector<Node*> keepers;
    bool plain = true;
    for (const auto& use : first->output()->uses()) {
      const bool append = use.user->kind() == aten::append && use.offset == 0 && !use.user->output()->hasUses();
      const auto* schema = use.user->maybeSchema();  // without one it may keep the list, as a tuple does
      const bool reads = schema != nullptr && !schema->is_mutable();
      const bool keeps = ends_in_result(use.user);
      plain = plain && use.user->owningBlock() == graph.block() && (append || reads || keeps);
      if (append) appends.push_back(use.user);
      if (keeps && use.user != graph.return_node()) keepers.push_back(use.user);
    }
    if (!plain || appends.empty()) continue;
    std::sort(appends.begin(), appends.end(), [](const Node* a, const Node* b) { return a->isBefore(b); });
    // What keeps the list must find it as it is in the end.
    if (std::any_of(keepers.begin(), keepers.end(), [&](Node* node) { return node->isBefore(appends.back()); }))
      continue;
    Node* list = first;
    for (Node* append : appends) {
      std::vector<Value*> elements(list->inputs().begin(), list->inputs().end());
      elements.push_back(append->input(1));
      Node* longer = graph.create(prim::ListConstruct, elements);
      longer->output()->setType(first->output()->type());
      longer->insertBefore(append);
      list->output()->replaceAllUsesAfterNodeWith(append, longer->output());
      append->destroy();
      list = longer;
    }
  }
}

}  // namespace

std::vector<Chain> find_chains(const Module& module, const std::string& path) {
  auto chains = ChainFinder(module, path).find();
  if (!chains.empty()) return chains;
  if (!path.empty()) {
    throw Error(ErrorCode::kUnsupportedModel,
                fmt::format("Options.layers names '{}', but forward() calls no row of modules there; give the dotted "
                            "path of the container of the layers, as named_modules() prints it",
                            path));
  }
  return chains;
}

void inline_calls(Graph& graph) {
  const torch::jit::GraphOptimizerEnabledGuard on(true);
  torch::jit::Inline(graph);
}

FlatGraph flatten(const Module& module, const Chain& chain) {
  FlatGraph flat;
  flat.graph = torch::jit::toGraphFunction(module.get_method("forward").function()).graph()->copy();
  flat.layers = static_cast<std::int64_t>(chain.calls.size());

  // Inline the calls that lead to the chain, then find the layers among what was inlined last.
  auto calls = module_calls(flat.graph->block());
  for (const int ordinal : chain.descent) {
    Node* call = calls.at(static_cast<std::size_t>(ordinal));
    Node* before = call->prev();
    Node* after = call->next();
    torch::jit::inlineCallTo(call, callee(call), callee(call)->graph().get());
    calls.clear();
    for (Node* node = before->next(); node != after; node = node->next()) {
      if (is_module_call(node)) calls.push_back(node);
    }
  }
  std::vector<Node*> markers;
  for (const int ordinal : chain.calls) {
    Node* call = calls.at(static_cast<std::size_t>(ordinal));
    markers.push_back(insert_marker_before(call, call->inputs().slice(1)));
  }
  markers.push_back(insert_marker_before(calls.at(static_cast<std::size_t>(chain.calls.back()))->next(), {}));

  Graph& graph = *flat.graph;
  inline_calls(graph);
  fix_scalar_attributes(graph.block(), graph.inputs()[0], module);
  flat.writes = remove_writes(graph, module);
  auto owner = flat.graph;
  // As often as it finds something: what a single run leaves depends on addresses.
  constexpr int kMostRounds = 16;
  for (int round = 0; round < kMostRounds && torch::jit::ConstantPropagation(owner); ++round) {
    torch::jit::PeepholeOptimize(owner, /*disable_shape_peepholes=*/true);
  }
  torch::jit::LowerSimpleTuples(owner);
  // In-place operations on fresh values become ordinary ones: the same numbers, but free to be moved.
  torch::jit::RemoveTensorMutation(owner);
  remove_appends(graph);

  int part = 0;
  std::vector<Node*> top(graph.nodes().begin(), graph.nodes().end());
  for (Node* node : top) {
    if (std::find(markers.begin(), markers.end(), node) != markers.end()) {
      ++part;
      if (part <= flat.layers) flat.arguments.emplace_back(node->inputs().begin(), node->inputs().end());
      node->destroy();
    } else {
      flat.part[node] = part;
    }
  }
  torch::jit::EliminateDeadCode(owner);
  std::unordered_set<const Node*> alive(graph.nodes().begin(), graph.nodes().end());
  std::erase_if(flat.part, [&](const auto& item) { return !alive.count(item.first); });
  return flat;
}

std::vector<const Value*> all_inputs(const Node* node) {
  std::vector<const Value*> inputs(node->inputs().begin(), node->inputs().end());
  std::function<void(const torch::jit::Block*, std::unordered_set<const Value*>)> collect =
      [&](const torch::jit::Block* block, std::unordered_set<const Value*> defined) {
        defined.insert(block->inputs().begin(), block->inputs().end());
        for (const Node* inner : block->nodes()) {
          for (const Value* input : inner->inputs()) {
            if (!defined.count(input)) inputs.push_back(input);
          }
          for (const torch::jit::Block* deeper : inner->blocks()) collect(deeper, defined);
          defined.insert(inner->outputs().begin(), inner->outputs().end());
        }
        for (const Value* output : block->outputs()) {
          if (!defined.count(output)) inputs.push_back(output);
        }
      };
  for (const torch::jit::Block* block : node->blocks()) collect(block, {});
  return inputs;
}

bool is_rematerialised(const Value* value, const Value* self) {
  if (value == self) return true;
  const Node* node = value->node();
  if (node->kind() == prim::Constant) return true;
  if (node->kind() == prim::GetAttr) return is_rematerialised(node->input(0), self);
  if (node->kind() != prim::ListConstruct) return false;
  // Lists are made again from their elements; a list that somebody changes is not.
  for (const auto& use : value->uses()) {
    const Node* user = use.user;
    if (user->kind() == prim::Return) return false;
    const auto* schema = user->maybeSchema();
    if (schema == nullptr) continue;
    const auto& arguments = schema->arguments();
    if (use.offset < arguments.size() && arguments[use.offset].alias_info() != nullptr &&
        arguments[use.offset].alias_info()->isWrite()) {
      return false;
    }
  }
  return true;
}

bool is_pure(Node* node) {
  static const auto kSdpa = c10::Symbol::fromQualString("aten::scaled_dot_product_attention");
  if (node->kind() == kSdpa) {  // listed as random because of its dropout
    const auto dropout = torch::jit::constant_as<double>(node->input(4));
    return dropout && *dropout == 0.0;
  }
  if (node->hasSideEffects() || node->isNondeterministic()) return false;
  if (const auto* schema = node->maybeSchema(); schema != nullptr && schema->is_mutable()) return false;
  for (const torch::jit::Block* block : node->blocks()) {
    for (const Node* inner : block->nodes()) {
      if (!is_pure(const_cast<Node*>(inner))) return false;
    }
  }
  return true;
}

std::optional<std::string> attribute_path(const Value* value, const Value* self) {
  return value == self ? std::nullopt : module_path(value, self, "");
}

c10::IValue attribute_value(const Value* value, const Value* self, const Module& module) {
  const Node* node = value->node();
  if (node->kind() != prim::GetAttr) return {};
  const auto path = module_path(node->input(0), self, "");
  if (!path) return {};
  const auto owner = module_at(module, *path);
  if (!owner || !owner->hasattr(node->s(attr::name))) return {};
  return owner->attr(node->s(attr::name));
}

at::Tensor attribute_tensor(const Value* value, const Value* self, const Module& module) {
  const auto attribute = attribute_value(value, self, module);
  return attribute.isTensor() ? attribute.toTensor() : at::Tensor();
}

std::unordered_set<const Value*> dependants(const FlatGraph& flat, const Value* source) {
  std::unordered_set<const Value*> reached{source};
  for (const Node* node : flat.graph->nodes()) {
    const auto inputs = all_inputs(node);
    if (std::any_of(inputs.begin(), inputs.end(), [&](const Value* v) { return reached.count(v) > 0; })) {
      reached.insert(node->outputs().begin(), node->outputs().end());
    }
  }
  return reached;
}

}  // namespace llmcache::ts
