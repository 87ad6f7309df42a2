#include "model/torchscript_subgraph.h"

#include <algorithm>
#include <functional>

namespace llmcache::ts {
namespace {

/// Calls `visit` for each value that must come from outside to compute `value`.
void visit_sources(const Value* value, const Value* self, const std::function<void(const Value*)>& visit) {
  if (!is_rematerialised(value, self)) {
    visit(value);
    return;
  }
  if (value == self) return;
  for (const Value* input : value->node()->inputs()) visit_sources(input, self, visit);
}

}  // namespace

std::vector<const Value*> external_inputs(const FlatGraph& flat, const std::vector<Node*>& nodes) {
  std::unordered_set<const Value*> known;
  std::vector<const Value*> external;
  for (const Node* node : nodes) {
    for (const Value* input : all_inputs(node)) {
      visit_sources(input, flat.self(), [&](const Value* source) {
        if (known.insert(source).second) external.push_back(source);
      });
    }
    known.insert(node->outputs().begin(), node->outputs().end());
  }
  return external;
}

Subgraph::Subgraph(const std::string& name, const FlatGraph& flat, const std::vector<Node*>& nodes,
                   const std::vector<const Value*>& outputs, Slots& slots, SharedCode& code) {
  auto graph = std::make_shared<Graph>();
  std::unordered_map<const Value*, Value*> made;
  Value* self = graph->addInput("self");
  self->setType(flat.self()->type());
  made[flat.self()] = self;

  auto inputs = external_inputs(flat, nodes);
  std::unordered_set<const Value*> defined(inputs.begin(), inputs.end());
  for (const Node* node : nodes) defined.insert(node->outputs().begin(), node->outputs().end());
  for (const Value* output : outputs) {  // an output may be handed through
    visit_sources(output, flat.self(), [&](const Value* source) {
      if (defined.insert(source).second) inputs.push_back(source);
    });
  }
  for (const Value* input : inputs) {
    made[input] = graph->addInput();
    made[input]->setType(input->type());
    in_.push_back(slots.of(input));
  }
  const std::function<Value*(Value*)> find = [&](Value* value) -> Value* {
    if (const auto it = made.find(value); it != made.end()) return it->second;
    TORCH_INTERNAL_ASSERT(is_rematerialised(value, flat.self()), "subgraph lacks ", value->debugName());
    if (auto what = lifted(value, flat)) {
      lifted_.push_back(*std::move(what));
      Value* input = graph->addInput();
      input->setType(value->type());
      return made[value] = input;
    }
    Node* copy = graph->createClone(value->node(), find);
    graph->appendNode(copy);
    return made[value] = copy->output();
  };
  for (Node* node : nodes) {
    if (node->outputs().size() == 1 && is_rematerialised(node->output(), flat.self())) continue;
    Node* copy = graph->createClone(node, find);
    graph->appendNode(copy);
    for (std::size_t i = 0; i < node->outputs().size(); ++i) made[node->output(i)] = copy->output(i);
  }
  std::vector<Value*> results;
  for (const Value* output : outputs) {
    results.push_back(find(const_cast<Value*>(output)));
    out_.push_back(slots.of(output));
  }
  if (results.size() == 1) {
    graph->registerOutput(results[0]);
  } else {
    graph->registerOutput(graph->appendNode(graph->createTuple(results))->output());
  }
  function_ = code.compile(name, flat, std::move(graph));
}

void Subgraph::run(const c10::IValue& self, Env& env) const {
  torch::jit::Stack stack;
  stack.reserve(in_.size() + lifted_.size() + 1);
  stack.emplace_back(self);
  for (const int slot : in_) stack.emplace_back(env[static_cast<std::size_t>(slot)]);
  for (const Lifted& what : lifted_) stack.push_back(read_lifted(what, self));
  function_->run(stack);
  if (out_.size() == 1) {
    env[static_cast<std::size_t>(out_[0])] = std::move(stack.back());
    return;
  }
  const auto& elements = stack.back().toTupleRef().elements();
  for (std::size_t i = 0; i < out_.size(); ++i) env[static_cast<std::size_t>(out_[i])] = elements[i];
}

c10::IValue Subgraph::call(const c10::IValue& self, std::vector<c10::IValue> inputs) const {
  torch::jit::Stack stack;
  stack.reserve(inputs.size() + lifted_.size() + 1);
  stack.emplace_back(self);
  for (auto& input : inputs) stack.emplace_back(std::move(input));
  for (const Lifted& what : lifted_) stack.push_back(read_lifted(what, self));
  function_->run(stack);
  if (out_.size() == 1) return std::move(stack.back());
  return stack.back().toTupleRef().elements().at(0);
}

}  // namespace llmcache::ts
