#include "model/torchscript_partial_embed.h"

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <limits>
#include <map>

#include "model/packing.h"
#include "model/torchscript_source.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;
using Kind = Label::Kind;

c10::Symbol operator_name(const char* name) { return c10::Symbol::fromQualString(std::string("aten::") + name); }

/// Operators that treat each element alike, with the usual broadcasting of their tensors.
bool is_pointwise(const Node* node) {
  static const std::unordered_set<c10::Symbol> kKinds = [] {
    std::unordered_set<c10::Symbol> kinds;
    for (const char* name :
         {"add",        "sub",         "mul",          "div",         "rsub",       "pow",        "neg",
          "abs",        "exp",         "cos",          "sin",         "sqrt",       "rsqrt",      "tanh",
          "sigmoid",    "relu",        "gelu",         "silu",        "to",         "type_as",    "contiguous",
          "clone",      "detach",      "alias",        "dropout",     "eq",         "ne",         "lt",
          "le",         "gt",          "ge",           "logical_not", "where",      "logical_or", "logical_and",
          "bitwise_or", "bitwise_and", "bitwise_not",  "minimum",     "maximum",    "clamp",      "__and__",
          "__or__",     "masked_fill", "floor_divide", "ones_like",   "zeros_like", "full_like",  "reciprocal"}) {
      kinds.insert(operator_name(name));
    }
    return kinds;
  }();
  return kKinds.count(node->kind()) > 0;
}

/// Builds the narrow graph backwards from the values that are wanted.
class Builder {
 public:
  explicit Builder(const Analysis& analysis) : analysis_(analysis), graph_(std::make_shared<Graph>()) {
    const auto& inputs = analysis.flat.graph->inputs();
    for (Value* input : inputs) {
      Value* made = graph_->addInput();
      made->setType(input->type());
      whole_[input] = made;
    }
    ids_ = whole_.at(analysis.flat.input(static_cast<std::size_t>(analysis.ids_argument)));
    if (const int i = source_argument(analysis); i >= 0) {
      source_ = whole_.at(analysis.flat.input(static_cast<std::size_t>(i)));
    }
    for (const Value* value : analysis.source_part.values) {
      whole_[value] = graph_->addInput();
      whole_[value]->setType(value->type());
    }
    positions_ = graph_->addInput("positions");
  }

  [[nodiscard]] const std::shared_ptr<Graph>& graph() const { return graph_; }

  Value* whole(const Value* value) {
    if (const auto it = whole_.find(value); it != whole_.end()) return it->second;
    const Node* node = value->node();
    // Sizes come from the ids, so that nothing is computed to be measured.
    if (node->kind() == aten::size) {
      if (const auto found = analysis_.infos.find(value); found != analysis_.infos.end()) {
        if (Value* size = size_of(found->second.integer)) return whole_[value] = size;
      }
    }
    Node* copy = graph_->createClone(const_cast<Node*>(node), [&](Value* input) { return whole(input); });
    graph_->appendNode(copy);
    for (std::size_t i = 0; i < node->outputs().size(); ++i) whole_[node->output(i)] = copy->output(i);
    return whole_.at(value);
  }

  /// `value` with dimension `dim`, which runs over tokens, cut to the positions.
  Value* cut(const Value* value, int dim) {
    const auto key = std::make_pair(value, dim);
    if (const auto it = cut_.find(key); it != cut_.end()) return it->second;
    Value* made = pull(value, dim);
    if (made == nullptr) made = graph_->insert(aten::index_select, {whole(value), dim, positions_});
    return cut_[key] = made;
  }

 private:
  [[nodiscard]] const ValueInfo* info(const Value* value) const {
    const auto it = analysis_.infos.find(value);
    return it == analysis_.infos.end() || !it->second.is_tensor() ? nullptr : &it->second;
  }
  [[nodiscard]] bool over_tokens(const Value* value, int dim) const {
    const auto* found = info(value);
    return found != nullptr && dim >= 0 && dim < static_cast<int>(found->dims.size()) &&
           found->dims[static_cast<std::size_t>(dim)] == Label{Kind::kTokens, 1};
  }

  Value* size_of(const Label& label) {
    if (label.kind == Kind::kConstant) return graph_->insertConstant(label.factor);
    if (label == Label{Kind::kSource, 1} && source_ != nullptr) return graph_->insert(aten::size, {source_, 1});
    if (label.factor != 1 || (label.kind != Kind::kBatch && label.kind != Kind::kTokens)) return nullptr;
    return graph_->insert(aten::size, {ids_, label.kind == Kind::kBatch ? 0 : 1});
  }

  /// The node again, with some of its inputs replaced.
  Value* again(const Value* value, const std::unordered_map<const Value*, Value*>& replaced) {
    Node* copy = graph_->createClone(const_cast<Node*>(value->node()), [&](Value* input) {
      const auto it = replaced.find(input);
      return it != replaced.end() ? it->second : whole(input);
    });
    graph_->appendNode(copy);
    return copy->output(value->offset());
  }

  static std::optional<int> dimension(const Value* value, int rank) {
    auto dim = torch::jit::constant_as<std::int64_t>(value);
    if (!dim) return std::nullopt;
    return static_cast<int>(*dim < 0 ? *dim + rank : *dim);
  }

  /// Null if the operator is none that the selection can move through.
  Value* pull(const Value* value, int dim) {
    if (!over_tokens(value, dim)) return nullptr;
    const Node* node = value->node();
    const int rank = static_cast<int>(info(value)->dims.size());
    const auto kind = node->kind();
    if (kind == aten::arange && node->inputs().size() == 5) {
      return info(value)->dtype == at::kLong ? positions_ : nullptr;
    }
    if (kind == aten::embedding) {
      const Value* ids = node->input(1);
      return over_tokens(ids, dim) ? again(value, {{ids, cut(ids, dim)}}) : nullptr;
    }
    if (is_pointwise(node)) return pull_pointwise(value, dim, rank);
    if (kind == aten::unsqueeze) {
      const auto added = dimension(node->input(1), rank);
      if (!added) return nullptr;
      return pull_shape(value, dim < *added ? dim : dim - 1);
    }
    if (kind == aten::transpose) {
      const auto a = dimension(node->input(1), rank);
      const auto b = dimension(node->input(2), rank);
      if (!a || !b) return nullptr;
      return pull_shape(value, dim == *a ? *b : dim == *b ? *a : dim);
    }
    if (kind == aten::view || kind == aten::reshape) {
      // Only one that changes nothing.
      const auto* from = info(node->input(0));
      if (from == nullptr || from->dims != info(value)->dims || from->count(Kind::kUnknown) > 0) return nullptr;
      return cut(node->input(0), dim);
    }
    if (kind == aten::slice && node->inputs().size() == 5) {
      const auto along = dimension(node->input(1), rank);
      if (!along) return nullptr;
      if (*along != dim) return pull_shape(value, dim);
      const auto start = torch::jit::toIValue(node->input(2));
      const auto end = torch::jit::toIValue(node->input(3));
      const auto step = torch::jit::constant_as<std::int64_t>(node->input(4));
      const bool from_start = start && (start->isNone() || (start->isInt() && start->toInt() == 0));
      const bool to_end =
          end && (end->isNone() || (end->isInt() && end->toInt() >= std::numeric_limits<std::int32_t>::max()));
      return from_start && to_end && step == 1 && over_tokens(node->input(0), dim) ? cut(node->input(0), dim) : nullptr;
    }
    if (kind == aten::expand) return pull_expand(value, dim, rank);
    if (kind == aten::layer_norm) {
      const Node* shape = node->input(1)->node();
      if (shape->kind() != prim::ListConstruct) return nullptr;
      return dim < rank - static_cast<int>(shape->inputs().size()) ? pull_shape(value, dim) : nullptr;
    }
    if (kind == aten::cat) return pull_cat(value, dim, rank);
    if (kind == aten::matmul) {
      const Value* source = node->input(dim == rank - 1 ? 1 : 0);
      const auto* found = info(source);
      const auto* other = info(node->input(dim == rank - 1 ? 0 : 1));
      if (found == nullptr || other == nullptr || dim < rank - 2) return nullptr;
      const bool same_rank = static_cast<int>(found->dims.size()) == rank && other->dims.size() == found->dims.size();
      return same_rank && over_tokens(source, dim) && source != node->input(dim == rank - 1 ? 0 : 1)
                 ? again(value, {{source, cut(source, dim)}})
                 : nullptr;
    }
    if (kind == prim::TupleUnpack && node->input()->node()->kind() == prim::TupleConstruct) {
      return cut(node->input()->node()->input(value->offset()), dim);
    }
    return nullptr;
  }

  /// The first input, whose dimension `dim` becomes that of the value.
  Value* pull_shape(const Value* value, int dim) {
    const Value* source = value->node()->input(0);
    return over_tokens(source, dim) ? again(value, {{source, cut(source, dim)}}) : nullptr;
  }

  Value* pull_pointwise(const Value* value, int dim, int rank) {
    const Node* node = value->node();
    std::unordered_map<const Value*, Value*> replaced;
    for (const Value* input : node->inputs()) {
      const auto* found = info(input);
      if (found == nullptr) {
        if (input->type()->isSubtypeOf(*c10::TensorType::get()) && analysis_.infos.count(input) == 0 &&
            !is_rematerialised(input, analysis_.flat.self())) {
          return nullptr;
        }
        continue;
      }
      const int own = dim - (rank - static_cast<int>(found->dims.size()));
      if (own < 0) continue;
      const Label& label = found->dims[static_cast<std::size_t>(own)];
      if (label == Label{Kind::kConstant, 1}) continue;
      if (!over_tokens(input, own)) return nullptr;
      replaced[input] = cut(input, own);
    }
    return replaced.empty() ? nullptr : again(value, replaced);
  }

  Value* pull_expand(const Value* value, int dim, int rank) {
    const Node* node = value->node();
    const auto* from = info(node->input(0));
    const Node* sizes = node->input(1)->node();
    if (from == nullptr || sizes->kind() != prim::ListConstruct || static_cast<int>(sizes->inputs().size()) != rank) {
      return nullptr;
    }
    const int own = dim - (rank - static_cast<int>(from->dims.size()));
    Value* source = over_tokens(node->input(0), own) ? cut(node->input(0), own) : whole(node->input(0));
    Value* count = graph_->insert(aten::size, {positions_, 0});
    std::vector<Value*> made;
    for (std::size_t i = 0; i < sizes->inputs().size(); ++i) {
      made.push_back(static_cast<int>(i) == dim ? count : whole(sizes->input(i)));
    }
    Node* list = graph_->createList(c10::IntType::get(), made);
    graph_->appendNode(list);
    return again(value, {{node->input(0), source}, {node->input(1), list->output()}});
  }

  Value* pull_cat(const Value* value, int dim, int rank) {
    const Node* node = value->node();
    const Node* parts = node->input(0)->node();
    const auto along = dimension(node->input(1), rank);
    if (!along || *along == dim || parts->kind() != prim::ListConstruct) return nullptr;
    std::vector<Value*> made;
    for (const Value* part : parts->inputs()) {
      if (!over_tokens(part, dim)) return nullptr;
      made.push_back(cut(part, dim));
    }
    Node* list = graph_->createList(c10::TensorType::get(), made);
    graph_->appendNode(list);
    return again(value, {{node->input(0), list->output()}});
  }

  const Analysis& analysis_;
  std::shared_ptr<Graph> graph_;
  Value* ids_ = nullptr;
  Value* source_ = nullptr;  ///< an input of the source; null: there is none
  Value* positions_ = nullptr;
  std::unordered_map<const Value*, Value*> whole_;
  std::map<std::pair<const Value*, int>, Value*> cut_;
};

}  // namespace

std::optional<PartialEmbed> PartialEmbed::build(const Analysis& analysis, const std::vector<Output>& outputs) {
  for (Node* node : analysis.nodes(0)) {
    if (!is_pure(node)) return std::nullopt;
  }
  PartialEmbed made;
  made.inputs_ = analysis.flat.graph->inputs().size() - 1;
  made.outputs_ = outputs;
  try {
    Builder builder(analysis);
    std::vector<Value*> results;
    for (const Output& output : outputs) {
      results.push_back(output.dim < 0 ? builder.whole(output.value) : builder.cut(output.value, output.dim));
    }
    const auto& graph = builder.graph();
    graph->registerOutput(graph->appendNode(graph->createTuple(results))->output());
    made.function_ = std::make_shared<torch::jit::GraphFunction>("llmcache_partial_embed", graph, nullptr,
                                                                 executor_of(analysis.flat));
    if (!analysis.findings->ask([&] { return made.agrees(analysis); })) return std::nullopt;
  } catch (const std::exception&) {
    return std::nullopt;
  }
  return made;
}

std::vector<c10::IValue> PartialEmbed::call(const c10::IValue& self, const Inputs& inputs,
                                            const std::vector<c10::IValue>& source, const at::Tensor& positions) const {
  torch::jit::Stack stack;
  stack.reserve(inputs_ + source.size() + 2);
  stack.emplace_back(self);
  for (std::size_t i = 0; i < inputs_; ++i) stack.push_back(i < inputs.size() ? inputs[i] : c10::IValue());
  stack.insert(stack.end(), source.begin(), source.end());
  stack.emplace_back(positions);
  function_->run(stack);
  const auto& elements = stack.back().toTupleRef().elements();
  return std::vector<c10::IValue>(elements.begin(), elements.end());
}

bool PartialEmbed::agrees(const Analysis& analysis) const {
  std::unordered_set<const Node*> made;
  for (const Output& output : outputs_) made.insert(output.value->node());
  for (const Value* value : analysis.source_part.values) made.insert(value->node());
  const auto wanted = [&](const Node* node) { return made.count(node) > 0; };
  for (const auto& [batch, tokens] : {std::pair<std::int64_t, std::int64_t>{1, 6}, {2, 19}}) {
    const auto inputs = probe_inputs(analysis, batch, tokens);
    const auto values = run_some(analysis.flat, analysis.module, inputs, wanted);
    std::vector<c10::IValue> source;
    for (const Value* value : analysis.source_part.values) source.push_back(values.at(value));
    for (const auto& chosen : {std::vector<std::int64_t>{tokens - 1}, std::vector<std::int64_t>{1, 2, tokens - 2}}) {
      const auto positions = at::tensor(chosen, at::TensorOptions().dtype(at::kLong)).to(inputs[0].toTensor().device());
      const auto got = call(analysis.module._ivalue(), inputs, source, positions);
      for (std::size_t i = 0; i < outputs_.size(); ++i) {
        const c10::IValue& full = values.at(outputs_[i].value);
        if (!full.isTensor()) continue;
        const auto want =
            outputs_[i].dim < 0 ? full.toTensor() : full.toTensor().index_select(outputs_[i].dim, positions);
        if (!nearly_equal(got[i].toTensor(), want)) return false;
      }
    }
  }
  return true;
}

void PartialEmbed::run(const c10::IValue& self, const Inputs& inputs, const std::vector<c10::IValue>& source,
                       const at::Tensor& positions, Env& whole, Env& cut) const {
  auto results = call(self, inputs, source, positions);
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    (outputs_[i].dim < 0 ? whole : cut)[static_cast<std::size_t>(outputs_[i].slot)] = std::move(results[i]);
  }
}

}  // namespace llmcache::ts
