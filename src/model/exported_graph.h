// A graph of TorchScript, made node by node from an exported program. Internal to model/exported*.
#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/exported_operators.h"
#include "model/exported_program.h"

namespace llmcache::exported {

/// The type of TorchScript for a value.
c10::TypePtr type_of(const Value& value);

/// The graph of one method of a module.
class GraphBuilder {
 public:
  /// `self` is the type of the module. Devices that the program names become `device`.
  GraphBuilder(const Program& program, const c10::TypePtr& self, at::Device device);

  /// A parameter of the method.
  void add_input(ValueId id);
  /// A weight, by its path below the module.
  void set_weight(ValueId id, const std::string& path);
  /// What stands for a value from now on.
  void set(ValueId id, torch::jit::Value* value) { values_[id] = value; }
  /// Throws DamagedData if it is not there.
  torch::jit::Value* value(ValueId id);
  /// An attribute by its path below the module; the module itself for an empty one.
  torch::jit::Value* attribute(const std::string& path);

  /// Throws Refused, or DamagedData, where no operator takes what the node hands to it.
  void add(const Node& node);

  [[nodiscard]] const std::shared_ptr<torch::jit::Graph>& graph() const { return graph_; }

 private:
  void add_numbers(const Node& node, const Operator& op);
  void add_tensors(const Node& node, const Operator& op);
  void set_outputs(const Node& node, const torch::jit::Node& made, const c10::FunctionSchema& schema);
  torch::jit::Value* constant(const c10::IValue& value) { return graph_->insertConstant(value); }
  torch::jit::Value* argument(const Argument& argument, const c10::Argument& parameter);
  torch::jit::Value* single(const Item& item, const c10::Argument& parameter);
  torch::jit::Value* number_of_flag(const Node& node, const Operator& op, const c10::Argument& parameter, bool flag);
  torch::jit::Value* list(const Argument& argument, const c10::TypePtr& wanted);
  torch::jit::Value* list_of_values(const Argument& argument, const c10::TypePtr& element);
  [[noreturn]] void refuse_node(const Node& node, const std::string& why) const;

  const Program& program_;
  at::Device device_;
  std::shared_ptr<torch::jit::Graph> graph_ = std::make_shared<torch::jit::Graph>();
  torch::jit::Value* self_;
  std::unordered_map<ValueId, torch::jit::Value*> values_;
  std::unordered_map<ValueId, std::string> weights_;
  std::unordered_map<std::string, torch::jit::Value*> attributes_;
};

}  // namespace llmcache::exported
