// Labels the values of a flat graph by running it on several input shapes: which dimension is the
// batch, which the tokens, which follows from both. Nothing is guessed from names or positions.
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <array>

#include "llmcache/error.h"
#include "model/probe.h"
#include "model/tensors_of.h"
#include "model/torchscript_graph.h"
#include "store/damaged_data.h"

namespace llmcache::ts {
namespace {

using Kind = Label::Kind;

namespace prim = c10::prim;
namespace aten = c10::aten;

/// The rule that explains one number on all three shapes.
Label explain(const std::array<std::int64_t, 3>& seen, bool with_source) {
  const auto matches = [&](Label::Kind kind, auto measure) -> std::optional<Label> {
    const std::int64_t unit = measure(kLabelShapes[0][0], kLabelShapes[0][1]);
    if (seen[0] == 0 || seen[0] % unit != 0) return std::nullopt;
    const std::int64_t factor = seen[0] / unit;
    for (std::size_t i = 0; i < seen.size(); ++i) {
      if (seen[i] != factor * measure(kLabelShapes[i][0], kLabelShapes[i][1])) return std::nullopt;
    }
    return Label{kind, factor};
  };
  if (seen[0] == seen[1] && seen[0] == seen[2]) return {Kind::kConstant, seen[0]};
  if (auto label = matches(Kind::kBatch, [](auto b, auto) { return b; })) return *label;
  if (auto label = matches(Kind::kTokens, [](auto, auto t) { return t; })) return *label;
  if (auto label = matches(Kind::kBatchTokens, [](auto b, auto t) { return b * t; })) return *label;
  if (!with_source) return {};
  if (auto label = matches(Kind::kSource, [](auto b, auto) { return probe_source_tokens(b); })) return *label;
  const auto all_of_source = [](auto b, auto) { return b * probe_source_tokens(b); };
  if (auto label = matches(Kind::kBatchSource, all_of_source)) return *label;
  return {};
}

std::optional<std::int64_t> as_integer(const c10::IValue& value) {
  if (value.isInt()) return value.toInt();
  if (value.isTensor() && value.toTensor().defined() && value.toTensor().dim() == 0 &&
      at::isIntegralType(value.toTensor().scalar_type(), false)) {
    return value.toTensor().item<std::int64_t>();
  }
  return std::nullopt;
}

}  // namespace

int ValueInfo::only(Label::Kind wanted) const {
  int found = -1;
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (dims[i].kind != wanted) continue;
    if (found != -1) return -2;
    found = static_cast<int>(i);
  }
  return found;
}

int ValueInfo::count(Label::Kind wanted) const {
  return static_cast<int>(std::count_if(dims.begin(), dims.end(), [&](const Label& l) { return l.kind == wanted; }));
}

std::optional<torch::jit::ExecutorExecutionMode> executor_of(const FlatGraph& flat) {
  return flat.on_cpu ? std::optional(torch::jit::ExecutorExecutionMode::SIMPLE) : std::nullopt;
}

namespace {

/// `instead`: as in run_instead().
Values run_wanted(const FlatGraph& flat, const Module& module, const Inputs& inputs,
                  const std::function<bool(const Node*)>& wanted,
                  const std::unordered_map<const Value*, const Value*>& instead) {
  auto graph = flat.graph->copy();
  std::vector<Value*> copied;
  std::vector<const Value*> originals;
  std::unordered_map<const Value*, Value*> copies;
  auto original = flat.graph->nodes().begin();
  for (Node* node : graph->nodes()) {
    for (std::size_t i = 0; i < node->outputs().size(); ++i) {
      const Value* own = (*original)->output(i);
      if (!instead.empty()) copies[own] = node->output(i);
      if (instead.count(own) > 0 || !wanted(*original)) continue;
      copied.push_back(node->output(i));
      originals.push_back(own);
    }
    ++original;
  }
  for (const auto& [value, other] : instead) copies.at(value)->replaceAllUsesWith(copies.at(other));
  while (!graph->outputs().empty()) graph->eraseOutput(graph->outputs().size() - 1);
  Node* tuple = graph->insertNode(graph->createTuple(copied));
  graph->registerOutput(tuple->output());
  torch::jit::EliminateDeadCode(graph);

  torch::jit::GraphFunction function("llmcache_probe", graph, nullptr, torch::jit::ExecutorExecutionMode::SIMPLE);
  torch::jit::Stack stack;
  stack.emplace_back(module._ivalue());
  stack.insert(stack.end(), inputs.begin(), inputs.end());
  for (std::size_t i = stack.size(); i < graph->inputs().size(); ++i) stack.emplace_back();
  function.run(stack);

  Values values;
  const auto& elements = stack.back().toTupleRef().elements();
  for (std::size_t i = 0; i < originals.size(); ++i) values.emplace(originals[i], elements[i]);
  for (std::size_t i = 0; i < inputs.size(); ++i) values.emplace(flat.input(i), inputs[i]);
  return values;
}

}  // namespace

Values run_some(const FlatGraph& flat, const Module& module, const Inputs& inputs,
                const std::function<bool(const Node*)>& wanted) {
  return run_wanted(flat, module, inputs, wanted, {});
}

Values run_all(const FlatGraph& flat, const Module& module, const Inputs& inputs) {
  return run_instead(flat, module, inputs, {});
}

Values run_instead(const FlatGraph& flat, const Module& module, const Inputs& inputs,
                   const std::unordered_map<const Value*, const Value*>& instead) {
  return run_wanted(
      flat, module, inputs, [](const Node*) { return true; }, instead);
}

std::optional<std::vector<ValueInfo>> label_result(const FlatGraph& flat, const std::vector<Values>& runs,
                                                   bool with_source) {
  const Value* result = flat.graph->outputs()[0];
  std::vector<std::vector<at::Tensor>> leaves;
  for (const Values& run : runs) {
    leaves.push_back(tensors_of(run.at(result)));
    if (leaves.back().size() != leaves[0].size()) return std::nullopt;
  }
  std::vector<ValueInfo> infos;
  for (std::size_t i = 0; i < leaves[0].size(); ++i) {
    std::vector<Values> seen;
    for (const auto& run : leaves) seen.push_back({{result, run[i]}});
    infos.push_back(label_values(seen, with_source).at(result));
  }
  return infos;
}

ValueInfos label_values(const std::vector<Values>& runs, bool with_source) {
  ValueInfos infos;
  for (const auto& [value, first] : runs.at(0)) {
    const std::array<const c10::IValue*, 3> seen{&first, &runs.at(1).at(value), &runs.at(2).at(value)};
    ValueInfo info;
    info.kind = ValueInfo::Kind::kOther;
    if (first.isTensor() && first.toTensor().defined()) {
      info.kind = ValueInfo::Kind::kTensor;
      info.dtype = first.toTensor().scalar_type();
      info.nested = first.toTensor().is_nested();
      bool same_rank = !info.nested;
      for (const auto* value_seen : seen) {
        same_rank = same_rank && value_seen->isTensor() && value_seen->toTensor().defined() &&
                    value_seen->toTensor().dim() == first.toTensor().dim();
      }
      if (!same_rank) {
        info.kind = ValueInfo::Kind::kUnknown;
      } else {
        for (std::int64_t d = 0; d < first.toTensor().dim(); ++d) {
          info.dims.push_back(explain(
              {seen[0]->toTensor().size(d), seen[1]->toTensor().size(d), seen[2]->toTensor().size(d)}, with_source));
        }
      }
    }
    if (const auto a = as_integer(*seen[0])) {
      const auto b = as_integer(*seen[1]);
      const auto c = as_integer(*seen[2]);
      if (!first.isTensor()) info.kind = ValueInfo::Kind::kInteger;
      if (b && c) info.integer = explain({*a, *b, *c}, with_source);
    }
    infos.emplace(value, std::move(info));
  }
  return infos;
}

std::vector<std::int64_t> numbers_of(const ValueInfo& info) {
  std::vector<std::int64_t> numbers{static_cast<std::int64_t>(info.kind), static_cast<std::int64_t>(info.dtype),
                                    info.nested ? 1 : 0};
  const auto add = [&](const Label& label) {
    numbers.push_back(static_cast<std::int64_t>(label.kind));
    numbers.push_back(label.factor);
  };
  add(info.integer);
  for (const Label& label : info.dims) add(label);
  return numbers;
}

ValueInfo info_of(const std::vector<std::int64_t>& numbers) {
  constexpr std::size_t kFixed = 5;  // numbers before those of the dimensions
  const auto whole = [&](std::size_t i, std::int64_t end) {
    if (numbers[i] < 0 || numbers[i] >= end) throw DamagedData("it has labels of values that there are not");
    return numbers[i];
  };
  const auto label = [&](std::size_t i) {
    return Label{static_cast<Kind>(whole(i, static_cast<std::int64_t>(Kind::kBatchSource) + 1)), numbers[i + 1]};
  };
  if (numbers.size() < kFixed || numbers.size() % 2 == 0) throw DamagedData("it has a label that is cut off");
  ValueInfo info;
  info.kind = static_cast<ValueInfo::Kind>(whole(0, static_cast<std::int64_t>(ValueInfo::Kind::kOther) + 1));
  info.dtype = static_cast<at::ScalarType>(whole(1, static_cast<std::int64_t>(at::ScalarType::NumOptions)));
  info.nested = whole(2, 2) == 1;
  info.integer = label(3);
  for (std::size_t i = kFixed; i < numbers.size(); i += 2) info.dims.push_back(label(i));
  return info;
}

std::vector<const Value*> labelled_values(const FlatGraph& flat) {
  std::vector<const Value*> values(flat.graph->inputs().begin() + 1, flat.graph->inputs().end());
  for (const Node* node : flat.graph->nodes()) {
    values.insert(values.end(), node->outputs().begin(), node->outputs().end());
  }
  return values;
}

std::vector<std::int64_t> input_vocabulary(const FlatGraph& flat, const Module& module) {
  std::vector<std::int64_t> rows(flat.graph->inputs().size() - 1, 0);
  // Follow each input through changes of shape and type only.
  std::unordered_map<const Value*, std::size_t> origin;
  for (std::size_t i = 0; i < rows.size(); ++i) origin[flat.input(i)] = i;
  static const std::unordered_set<c10::Symbol> kTransparent{
      aten::view,      aten::reshape,   aten::to,      aten::slice,  aten::contiguous,
      aten::unsqueeze, aten::squeeze,   aten::alias,   aten::detach, aten::expand,
      aten::type_as,   aten::transpose, aten::flatten, aten::clone,  aten::clamp};
  std::unordered_map<const Value*, std::size_t> indirect;  // reached through anything
  std::vector<std::int64_t> reached(rows.size(), 0);
  for (std::size_t i = 0; i < rows.size(); ++i) indirect[flat.input(i)] = i;
  for (const Node* node : flat.graph->nodes()) {
    for (const Value* value : node->inputs()) {
      const auto from = indirect.find(value);
      if (from == indirect.end()) continue;
      if (node->kind() == aten::embedding && value == node->input(1)) {
        const auto weight = attribute_tensor(node->input(0), flat.self(), module);
        if (weight.defined() && weight.dim() == 2)
          reached[from->second] = std::max(reached[from->second], weight.size(0));
      }
      for (const Value* output : node->outputs()) indirect.try_emplace(output, from->second);
      break;
    }
  }
  for (const Node* node : flat.graph->nodes()) {
    if (node->kind() == aten::embedding) {
      const auto from = origin.find(node->input(1));
      if (from == origin.end()) continue;
      const auto weight = attribute_tensor(node->input(0), flat.self(), module);
      if (weight.defined() && weight.dim() == 2) {
        auto& known = rows[from->second];
        known = known == 0 ? weight.size(0) : std::min(known, weight.size(0));
      }
    } else if (kTransparent.count(node->kind()) && !node->inputs().empty()) {
      if (const auto from = origin.find(node->input(0)); from != origin.end()) origin[node->output()] = from->second;
    }
  }
  // No input selects directly: the one that reaches the largest embedding after some arithmetic does.
  if (std::all_of(rows.begin(), rows.end(), [](std::int64_t n) { return n == 0; })) {
    const auto largest = std::max_element(reached.begin(), reached.end());
    if (largest != reached.end()) rows[static_cast<std::size_t>(largest - reached.begin())] = *largest;
  }
  return rows;
}

namespace {

/// See detach_sizes().
class SizeDetacher {
 public:
  /// `source` may be null.
  SizeDetacher(FlatGraph& flat, const Value* hidden, Value* ids, Value* source, ValueInfos& infos,
               std::unordered_map<const Value*, Value*>& detached)
      : flat_(flat),
        graph_(*flat.graph),
        hidden_(hidden),
        ids_(ids),
        source_(source),
        infos_(infos),
        detached_(detached) {}

  std::unordered_set<const Value*> run() {
    dependent_ = {hidden_};
    first_dependent_ = find_first_dependent();
    if (first_dependent_ == nullptr) return dependent_;
    const std::vector<Node*> nodes(graph_.nodes().begin(), graph_.nodes().end());
    for (Node* node : nodes) {
      if (depends(node)) follow(node);
    }
    use_twins();
    // What still depends on the hidden state and stands before the first layer belongs to it.
    dependent_ = dependants(flat_, hidden_);
    for (Node* node : graph_.nodes()) {
      int& part = flat_.part.at(node);
      if (part == 0 && depends(node)) part = 1;
    }
    return std::move(dependent_);
  }

 private:
  /// Everything made here stands before it.
  Node* find_first_dependent() const {
    for (Node* node : graph_.nodes()) {
      const auto inputs = all_inputs(node);
      if (std::find(inputs.begin(), inputs.end(), hidden_) != inputs.end()) return node;
    }
    return nullptr;
  }

  bool depends(const Node* node) const {
    const auto inputs = all_inputs(node);
    return std::any_of(inputs.begin(), inputs.end(), [&](const Value* v) { return dependent_.count(v) > 0; });
  }

  bool is_scalar(const Value* v) const {
    const auto info = infos_.find(v);
    return info != infos_.end() && info->second.is_scalar() && info->second.kind != ValueInfo::Kind::kUnknown;
  }
  bool scalar_results(const Node* node) const {
    return std::all_of(node->outputs().begin(), node->outputs().end(), [&](const Value* v) { return is_scalar(v); });
  }

  void insert(Node* made, const Node* like, Node* before) {
    made->insertBefore(before);
    flat_.part[made] = 0;
    for (std::size_t i = 0; i < made->outputs().size(); ++i) infos_[made->output(i)] = infos_[like->output(i)];
  }
  Value* constant(std::int64_t number) {
    const torch::jit::WithInsertPoint guard(first_dependent_);
    Value* made = graph_.insertConstant(number);
    flat_.part[made->node()] = 0;
    infos_[made].kind = ValueInfo::Kind::kInteger;
    return made;
  }
  /// An integer of the input that stands for the result of `like`.
  Value* integer(c10::Symbol kind, at::ArrayRef<Value*> inputs, const Node* like) {
    Node* made = graph_.create(kind, inputs);
    made->output()->setType(c10::IntType::get());
    insert(made, like, first_dependent_);
    return made->output();
  }
  void detach_as_constant(const Node* node) {
    Value* made = constant(infos_[node->output()].integer.factor);
    infos_[made] = infos_[node->output()];
    detached_[node->output()] = made;
  }

  void follow(Node* node) {
    const bool labelled = !node->outputs().empty() && infos_.count(node->outputs()[0]) > 0;
    if (node->kind() == aten::size && node->inputs().size() == 2 && labelled) {
      detach_size(node);
    } else if ((node->kind() == prim::dtype || node->kind() == aten::dim) && labelled &&
               infos_[node->output()].integer.kind == Label::Kind::kConstant) {
      detach_as_constant(node);  // the same for every request
    } else if (node->kind() == prim::device) {
      Node* device = graph_.create(prim::device, {ids_});
      device->output()->setType(c10::DeviceObjType::get());
      insert(device, node, first_dependent_);
      detached_[node->output()] = device->output();
    } else if (follows_from_sizes(node)) {
      if (!scalar_results(node)) return use_sizes_of_the_input(node);
      make_twin(node);
    }
    dependent_.insert(node->outputs().begin(), node->outputs().end());
  }

  /// A size of a hidden state becomes a size of the input.
  void detach_size(const Node* node) {
    const Label label = infos_[node->output()].integer;
    if (label.kind == Label::Kind::kConstant) return detach_as_constant(node);
    const bool of_source = label.kind == Label::Kind::kSource && source_ != nullptr;
    if (label.kind != Label::Kind::kBatch && label.kind != Label::Kind::kTokens && !of_source) return;
    Value* dim = constant(label.kind == Label::Kind::kBatch ? 0 : 1);
    Value* made = integer(aten::size, {of_source ? source_ : ids_, dim}, node);
    if (label.factor != 1) made = integer(aten::mul, {made, constant(label.factor)}, node);
    detached_[node->output()] = made;
  }

  bool follows_from_sizes(Node* node) const {
    return node->blocks().empty() && is_pure(node) &&
           std::all_of(node->inputs().begin(), node->inputs().end(),
                       [&](const Value* v) { return dependent_.count(v) == 0 || detached_.count(v) > 0; });
  }

  /// A table made from sizes alone no longer depends on the hidden state.
  void use_sizes_of_the_input(Node* node) {
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      const auto found = detached_.find(node->input(i));
      if (found != detached_.end()) node->replaceInput(i, found->second);
    }
  }

  /// Arithmetic on sizes stays for whoever works on hidden states; a second one is made from the input.
  void make_twin(Node* node) {
    Node* twin = graph_.createClone(node, [&](Value* v) {
      const auto found = detached_.find(v);
      return found == detached_.end() ? v : found->second;
    });
    const bool early = std::all_of(twin->inputs().begin(), twin->inputs().end(), [&](const Value* v) {
      return v->node()->kind() == prim::Param || v->node()->isBefore(first_dependent_);
    });
    insert(twin, node, early ? first_dependent_ : node);
    for (std::size_t i = 0; i < node->outputs().size(); ++i) detached_[node->output(i)] = twin->output(i);
  }

  int part_of(const Node* node) const {
    while (node->owningBlock() != graph_.block()) node = node->owningBlock()->owningNode();
    const auto found = flat_.part.find(node);
    return found == flat_.part.end() ? -1 : found->second;
  }

  /// A tensor operation takes the number for its value, not for a shape.
  bool by_value(const torch::jit::Use& use) const {
    const auto* schema = use.user->maybeSchema();
    if (schema == nullptr || use.offset >= schema->arguments().size() || scalar_results(use.user)) return false;
    const auto& type = schema->arguments()[use.offset].type();
    return type->isSubtypeOf(*c10::TensorType::get()) ||
           (type->isSubtypeOf(*c10::NumberType::get()) && type->kind() != c10::TypeKind::IntType);
  }

  /// Work before and behind the layers, and in another layer than the size was taken in, uses the size of the input. So
  /// does what takes it for its value.
  void use_twins() {
    for (const auto& [original, twin] : detached_) {
      const auto uses = original->uses();
      const int home = part_of(original->node());
      for (const auto& use : uses) {
        const int part = part_of(use.user);
        if (part == home && part != 0 && !by_value(use)) continue;
        if (!twin->node()->isBefore(use.user) || use.user == twin->node()) continue;
        use.user->replaceInput(use.offset, twin);
      }
    }
  }

  FlatGraph& flat_;
  Graph& graph_;
  const Value* hidden_;
  Value* ids_;
  Value* source_;
  ValueInfos& infos_;
  std::unordered_map<const Value*, Value*>& detached_;
  std::unordered_set<const Value*> dependent_;
  Node* first_dependent_ = nullptr;
};

}  // namespace

std::unordered_set<const Value*> detach_sizes(FlatGraph& flat, const Value* hidden, int ids_argument,
                                              int source_argument, ValueInfos& infos,
                                              std::unordered_map<const Value*, Value*>& detached) {
  Value* source = source_argument < 0 ? nullptr : flat.input(static_cast<std::size_t>(source_argument));
  return SizeDetacher(flat, hidden, flat.input(static_cast<std::size_t>(ids_argument)), source, infos, detached).run();
}

}  // namespace llmcache::ts
