#include "model/torchscript_analysis.h"

#include <fmt/core.h>
#include <fmt/ranges.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>

#include "caller_failed.h"
#include "llmcache/error.h"
#include "model/probe.h"
#include "model/torchscript_attention_ops.h"
#include "model/torchscript_repeated_layers.h"
#include "model/torchscript_source.h"
#include "model/torchscript_source_part.h"
#include "model/torchscript_weights.h"

namespace llmcache::ts {
namespace {

using Kind = Label::Kind;

namespace prim = c10::prim;
namespace aten = c10::aten;

[[noreturn]] void unsupported(const std::string& why) { throw Error(ErrorCode::kUnsupportedModel, why); }

bool has_training_dropout(const torch::jit::Block* block) {
  for (const Node* node : block->nodes()) {
    for (const torch::jit::Block* inner : node->blocks()) {
      if (has_training_dropout(inner)) return true;
    }
    if (node->kind() != aten::dropout && node->kind() != aten::dropout_) continue;
    if (const auto train = torch::jit::constant_as<bool>(node->input(2)); train && *train) return true;
  }
  return false;
}

/// A list or dictionary that `node`, or a node in its blocks, changes though another part of the graph made it; else
/// null. Parts run one by one, and what one does to a list is no value that another could wait for.
const Value* grown_elsewhere(const FlatGraph& flat, const Node* node, int part) {
  for (const torch::jit::Block* block : node->blocks()) {
    for (const Node* inner : block->nodes()) {
      if (const Value* found = grown_elsewhere(flat, inner, part)) return found;
    }
  }
  const auto* schema = node->maybeSchema();
  if (schema == nullptr || !schema->is_mutable()) return nullptr;
  for (std::size_t i = 0; i < node->inputs().size() && i < schema->arguments().size(); ++i) {
    const auto* alias = schema->arguments()[i].alias_info();
    const auto kind = node->input(i)->type()->kind();
    if (alias == nullptr || !alias->isWrite()) continue;
    if (kind != c10::TypeKind::ListType && kind != c10::TypeKind::DictType) continue;
    const auto made = flat.part.find(node->input(i)->node());  // nothing for what a block made itself
    if (made != flat.part.end() && made->second != part) return node->input(i);
  }
  return nullptr;
}

const Value* grown_elsewhere(const FlatGraph& flat) {
  for (const Node* node : flat.graph->nodes()) {
    if (const Value* found = grown_elsewhere(flat, node, flat.part.at(node))) return found;
  }
  return nullptr;
}

bool is_hidden_like(const ValueInfo& info) {
  return info.is_tensor() && at::isFloatingType(info.dtype) && info.dims.size() == 3 &&
         info.dims[0] == Label{Kind::kBatch, 1} && info.dims[1] == Label{Kind::kTokens, 1} &&
         info.dims[2].kind == Kind::kConstant;
}

/// Values defined up to `part` and used in part + 1 that look like a hidden state, latest last.
std::vector<Value*> hidden_candidates(const Analysis& analysis, int part) {
  std::vector<Value*> found;
  for (Node* node : analysis.flat.graph->nodes()) {
    const int defined = analysis.flat.part.at(node);
    if (part == 0 ? defined != 0 : defined != part) continue;
    for (Value* output : node->outputs()) {
      const auto info = analysis.infos.find(output);
      if (info == analysis.infos.end() || !is_hidden_like(info->second)) continue;
      const bool crosses = std::any_of(output->uses().begin(), output->uses().end(), [&](const auto& use) {
        const Node* user = use.user;
        while (user->owningBlock() != analysis.flat.graph->block()) user = user->owningBlock()->owningNode();
        if (user->kind() == prim::Return) return part == static_cast<int>(analysis.flat.layers);
        return analysis.flat.part.at(user) == part + 1;
      });
      if (crosses) found.push_back(output);
    }
  }
  return found;
}

/// Chooses the hidden state at each layer boundary; trims what is no layer from both ends.
bool choose_hidden(Analysis& analysis, bool named) {
  auto& flat = analysis.flat;
  std::vector<Value*> chosen;
  std::vector<std::int64_t> argument;
  for (int part = 0; part <= flat.layers; ++part) {
    auto candidates = hidden_candidates(analysis, part);
    const auto* arguments = part < flat.layers ? &flat.arguments[static_cast<std::size_t>(part)] : nullptr;
    Value* best = nullptr;
    std::int64_t position = -1;
    for (Value* candidate : candidates) {
      std::int64_t at = -1;
      if (arguments != nullptr) {
        const auto it = std::find(arguments->begin(), arguments->end(), candidate);
        if (it != arguments->end()) at = it - arguments->begin();
      }
      // What is handed to the call is the hidden state; among several the latest.
      if (best == nullptr || at >= 0 || position < 0) {
        best = candidate;
        position = at;
      }
    }
    chosen.push_back(best);
    argument.push_back(position);
  }
  const auto width = [&](const Value* v) { return analysis.infos.at(v).dims[2].factor; };
  int best_begin = 0;
  int best_end = 0;
  for (int begin = 0; begin <= flat.layers; ++begin) {
    if (chosen[static_cast<std::size_t>(begin)] == nullptr) continue;
    int end = begin;
    while (end + 1 <= flat.layers && chosen[static_cast<std::size_t>(end) + 1] != nullptr &&
           width(chosen[static_cast<std::size_t>(end) + 1]) == width(chosen[static_cast<std::size_t>(begin)])) {
      ++end;
    }
    if (end - begin > best_end - best_begin) {
      best_begin = begin;
      best_end = end;
    }
  }
  if (best_end - best_begin < (named ? 1 : 2)) {
    return false;
  }
  for (auto& [node, part] : flat.part) {
    part = part <= best_begin ? 0 : part <= best_end ? part - best_begin : best_end - best_begin + 1;
  }
  flat.layers = best_end - best_begin;
  analysis.hidden.assign(chosen.begin() + best_begin, chosen.begin() + best_end + 1);
  analysis.hidden_argument.assign(argument.begin() + best_begin, argument.begin() + best_end);
  analysis.hidden_size = width(analysis.hidden[0]);
  return true;
}

/// What depends on the hidden state and stands before the first layer belongs to it.
void start_layers(Analysis& analysis) {
  for (Node* node : analysis.flat.graph->nodes()) {
    int& part = analysis.flat.part.at(node);
    const auto inputs = all_inputs(node);
    if (part == 0 &&
        std::any_of(inputs.begin(), inputs.end(), [&](const Value* v) { return analysis.dependent.count(v) > 0; })) {
      part = 1;
    }
  }
}

/// What does not depend on hidden states moves in front of the layers.
void hoist(Analysis& analysis) {
  auto& flat = analysis.flat;
  std::unordered_set<const Value*> late;
  for (Node* node : flat.graph->nodes()) {
    int& part = flat.part.at(node);
    if (part == 0) continue;
    const auto inputs = all_inputs(node);
    const bool stays = !is_pure(node) || std::any_of(inputs.begin(), inputs.end(), [&](const Value* v) {
      return analysis.dependent.count(v) > 0 || late.count(v) > 0;
    });
    if (stays) {
      late.insert(node->outputs().begin(), node->outputs().end());
    } else {
      part = 0;
    }
  }
}

void refuse_what_cannot_be_wrapped(const Module& module) {
  if (!module.find_method("forward")) unsupported("the module has no method forward");
  if (module.hasattr("training") ? module.is_training() : false) {
    unsupported("the model is in training mode; call eval() before wrapping it");
  }
  for (const auto& child : module.named_modules()) {
    if (child.value.hasattr("training") && child.value.is_training()) {
      unsupported(fmt::format("module '{}' is in training mode; call eval() before wrapping the model", child.name));
    }
  }
  if (module.children().size() == 0) {
    unsupported(module.hasattr("training")
                    ? "the module has no submodules, hence no layers"
                    : "the module has no submodules: it was frozen (torch::jit::freeze) or has no layers; wrap the "
                      "module as it was before freezing");
  }
}

}  // namespace

void remove_dead(Analysis& analysis) {
  auto& flat = analysis.flat;
  auto graph = flat.graph;
  torch::jit::EliminateDeadCode(graph);
  const std::unordered_set<const Node*> nodes(graph->nodes().begin(), graph->nodes().end());
  std::unordered_set<const Value*> values(graph->inputs().begin(), graph->inputs().end());
  for (const Node* node : nodes) values.insert(node->outputs().begin(), node->outputs().end());
  std::erase_if(flat.part, [&](const auto& item) { return !nodes.count(item.first); });
  std::erase_if(analysis.infos, [&](const auto& item) { return !values.count(item.first); });
  analysis.detached.clear();
  analysis.dependent = dependants(flat, analysis.hidden[0]);
}

std::vector<Node*> Analysis::nodes(std::int64_t part) const {
  std::vector<Node*> found;
  for (Node* node : flat.graph->nodes()) {
    if (flat.part.at(node) == part) found.push_back(node);
  }
  return found;
}

std::vector<const Value*> Analysis::escaping(const std::vector<Node*>& defined) const {
  const std::unordered_set<const Node*> inside(defined.begin(), defined.end());
  std::vector<Node*> outside;
  for (Node* node : flat.graph->nodes()) {
    // Lists and attributes are made again for whoever uses them, which is what counts.
    if (node->outputs().size() == 1 && is_rematerialised(node->output(), flat.self())) continue;
    if (!inside.count(node)) outside.push_back(node);
  }
  outside.push_back(flat.graph->return_node());
  const auto wanted = external_inputs(flat, outside);
  const std::unordered_set<const Value*> needed(wanted.begin(), wanted.end());
  std::vector<const Value*> escaping;
  for (const Node* node : defined) {
    for (const Value* output : node->outputs()) {
      if (needed.count(output)) escaping.push_back(output);
    }
  }
  return escaping;
}

Inputs probe_inputs(const Analysis& analysis, std::int64_t batch, std::int64_t tokens) {
  InputSpec spec;
  spec.vocabulary = analysis.vocabulary;
  spec.source = analysis.source;
  return llmcache::probe_inputs(spec, analysis.device, batch, tokens);
}

namespace {

/// Labels of all values and of the result, and the longest sequence.
void find_labels(Analysis& analysis) {
  const FlatGraph& flat = analysis.flat;
  std::vector<Inputs> inputs;
  for (const auto& [batch, tokens] : kLabelShapes) inputs.push_back(probe_inputs(analysis, batch, tokens));
  const bool with_source = !analysis.source.empty();
  std::vector<Values> runs;
  auto infos = label_repeated(flat, analysis.module, inputs, with_source, runs);
  if (!infos) {
    runs.clear();
    for (const Inputs& given : inputs) runs.push_back(run_all(flat, analysis.module, given));
    infos = label_values(runs, with_source);
  }
  analysis.infos = *std::move(infos);
  analysis.result = label_result(flat, runs, with_source);
  const TokenLimits limits = token_limits(flat, analysis.module, runs, with_source);
  analysis.max_tokens = limits.tokens;
  analysis.max_source_tokens = limits.source_tokens;
  GraphFindings& findings = *analysis.findings;
  findings.values.clear();
  for (const Value* value : labelled_values(flat)) findings.values.push_back(numbers_of(analysis.infos.at(value)));
  findings.max_tokens = analysis.max_tokens;
  findings.max_source_tokens = analysis.max_source_tokens;
  findings.result.reset();
  if (!analysis.result) return;
  findings.result.emplace();
  for (const ValueInfo& info : *analysis.result) findings.result->push_back(numbers_of(info));
}

/// The same from a file.
void take_labels(Analysis& analysis) {
  const GraphFindings& findings = *analysis.findings;
  const auto values = labelled_values(analysis.flat);
  if (values.size() != findings.values.size()) throw DamagedData("it has labels of another number of values");
  for (std::size_t i = 0; i < values.size(); ++i) {
    const ValueInfo& info = analysis.infos[values[i]] = info_of(findings.values[i]);
    if (analysis.source.empty() && info.count(Kind::kSource) > 0)
      throw DamagedData("it has lengths of a source without one");
  }
  analysis.max_tokens = findings.max_tokens;
  analysis.max_source_tokens = findings.max_source_tokens;
  if (!findings.result) return;
  analysis.result.emplace();
  for (const auto& numbers : *findings.result) analysis.result->push_back(info_of(numbers));
}

void check_inputs(const Module& module) {
  const auto& graph = *torch::jit::toGraphFunction(module.get_method("forward").function()).graph();
  for (std::size_t i = 1; i < graph.inputs().size(); ++i) {
    const auto type = graph.inputs()[i]->type();
    if (type->isSubtypeOf(*c10::TensorType::get())) continue;
    if (type->isSubtypeOf(*c10::OptionalType::ofTensor())) continue;
    unsupported(fmt::format("input {} of forward ('{}') is a {}; token-level tensors are expected", i - 1,
                            graph.inputs()[i]->debugName(), type->repr_str()));
  }
}

void check_flat(const FlatGraph& flat) {
  if (has_training_dropout(flat.graph->block())) {
    unsupported("the graph was traced in training mode (dropout is active); trace the model after eval()");
  }
  if (const Value* list = grown_elsewhere(flat)) {
    unsupported(
        fmt::format("forward() changes the list '{}' between its layers by other means than append(), or keeps it in "
                    "a tuple meanwhile; such a model cannot be run layer by layer: let it append() only, or collect "
                    "the states in variables of their own",
                    list->debugName()));
  }
}

/// The graph cut at the layers of a chain. Throws Error(kUnsupportedModel).
Analysis flattened(const Module& module, const Chain& chain, const std::shared_ptr<GraphFindings>& findings) {
  Analysis analysis;
  analysis.module = module;
  analysis.code = module._ivalue()->compilation_unit();
  analysis.findings = findings;
  analysis.device = device_of(module);
  analysis.flat = flatten(module, chain);
  analysis.flat.on_cpu = analysis.device.is_cpu();
  analysis.path = chain.path;
  check_flat(analysis.flat);
  analysis.vocabulary = input_vocabulary(analysis.flat, module);
  const auto largest = std::max_element(analysis.vocabulary.begin(), analysis.vocabulary.end());
  if (largest == analysis.vocabulary.end() || *largest == 0) {
    unsupported("no input selects from an embedding, so none of them can be input_ids");
  }
  return analysis;
}

/// What its values are, if inputs are those of a source that `source` says; empty: there is none. Throws
/// Error(kUnsupportedModel).
void give_labels(Analysis& analysis, const std::vector<bool>& source) {
  analysis.source = source;
  analysis.findings->source = source;
  const auto& vocabulary = analysis.vocabulary;
  std::size_t ids = source.empty() || !source[0] ? 0 : 1;
  for (std::size_t i = 0; i < vocabulary.size(); ++i) {
    const bool own = source.empty() || !source[i];
    if (own && (vocabulary[i] > vocabulary[ids] || (!source.empty() && source[ids]))) ids = i;
  }
  analysis.ids_argument = static_cast<int>(ids);
  try {
    analysis.findings->known ? take_labels(analysis) : find_labels(analysis);
  } catch (const std::exception& error) {
    unsupported(
        fmt::format("a probe with tiny inputs failed, so batch and length are not dynamic or an input is not "
                    "token-level: {}",
                    reason_of(error)));
  }
}

/// Once it is known what the layers hand on: what depends on it, and what does not and moves to before the layers.
void separate_layers(Analysis& analysis) {
  FlatGraph& flat = analysis.flat;
  analysis.dependent = dependants(flat, analysis.hidden[0]);
  analysis.obstacle = find_obstacle(analysis);
  analysis.rows_meet = rows_may_meet(analysis);
  analysis.choice = find_token_choice(analysis);
  analysis.dependence = find_dependence(analysis);
  if (!analysis.obstacle.empty()) {
    start_layers(analysis);  // whole layers need no more, and hidden states may have other sizes than the input
    return;
  }
  analysis.dependent = detach_sizes(flat, analysis.hidden[0], analysis.ids_argument, source_argument(analysis),
                                    analysis.infos, analysis.detached);
  detach_region_scalars(analysis);
  remove_dead(analysis);
  hoist(analysis);
}

std::vector<std::vector<bool>> known_source(const GraphFindings& findings) {
  return findings.source.empty() ? std::vector<std::vector<bool>>{} : std::vector<std::vector<bool>>{findings.source};
}

/// The first chain whose layers read a source and a target; none: there is no such.
std::optional<Analysis> analyse_with_source(const Module& module, const Options& options,
                                            const std::vector<Chain>& chains,
                                            const std::vector<std::vector<bool>>& sources,
                                            const std::shared_ptr<GraphFindings>& findings) {
  if (sources.empty()) return std::nullopt;
  for (std::size_t i = findings->known ? findings->chain : 0; i < chains.size(); ++i) {
    for (const auto& source : sources) {
      findings->chain = i;
      auto analysis = flattened(module, chains[i], findings);
      if (source.size() != analysis.vocabulary.size()) throw DamagedData("it has a source of another model");
      analysis.source = source;
      if (!layers_read_both_sides(analysis)) break;  // an encoder, whichever side is the source
      try {
        give_labels(analysis, source);
      } catch (const Error&) {
        continue;
      }
      if (!choose_hidden(analysis, !options.layers.empty())) continue;
      separate_layers(analysis);
      return analysis;
    }
  }
  return std::nullopt;
}

}  // namespace

Analysis analyse(const Module& module, const Options& options, std::shared_ptr<GraphFindings> findings) {
  refuse_what_cannot_be_wrapped(module);
  check_inputs(module);
  if (!findings->known) {
    Structure structure = structure_of(module);
    findings->structure = std::move(structure.digest);
    findings->structure_identity = std::move(structure.identity);
  }
  const auto chains = find_chains(module, options.layers);
  if (chains.empty()) {
    unsupported(
        "no chain of layers was found: forward() calls no two modules of one container, the second fed by the first; "
        "if there is one layer only, name it in Options.layers");
  }
  auto first = flattened(module, chains[0], findings);
  const auto sources = findings->known ? known_source(*findings) : source_candidates(first);
  if (auto analysis = analyse_with_source(module, options, chains, sources, findings)) return *std::move(analysis);
  std::vector<std::string> tried;
  bool nested = false;
  for (std::size_t i = findings->known ? findings->chain : 0; i < chains.size(); ++i) {
    findings->chain = i;
    auto analysis = i == 0 ? std::move(first) : flattened(module, chains[i], findings);
    give_labels(analysis, {});
    if (choose_hidden(analysis, !options.layers.empty())) {
      separate_layers(analysis);
      return analysis;
    }
    nested = nested || std::any_of(analysis.infos.begin(), analysis.infos.end(),
                                   [](const auto& info) { return info.second.nested; });
    tried.push_back(analysis.path);
  }
  if (nested) {
    unsupported(
        "the layers of the model hand on nested tensors, whose sequences have no common length: nn.TransformerEncoder "
        "makes them of padded batches; construct it with enable_nested_tensor=False and export the model again");
  }
  unsupported(
      fmt::format("the modules called in a row do not hand on a hidden state [batch, tokens, hidden]; tried '{}'",
                  fmt::join(tried, "', '")));
}

}  // namespace llmcache::ts
