// A part of a flat graph, compiled so that it can be run by itself. Internal to model/torchscript*.
#pragma once

#include <torch/csrc/jit/api/function_impl.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/torchscript_graph.h"
#include "model/torchscript_shared_code.h"

namespace llmcache::ts {

/// Values that cross from one subgraph to another, by slot.
using Env = std::vector<c10::IValue>;

/// Gives each crossing value a slot.
class Slots {
 public:
  int of(const Value* value) {
    const auto [it, fresh] = slots_.try_emplace(value, static_cast<int>(values_.size()));
    if (fresh) values_.push_back(value);
    return it->second;
  }
  /// -1 if the value has none.
  [[nodiscard]] int find(const Value* value) const {
    const auto it = slots_.find(value);
    return it == slots_.end() ? -1 : it->second;
  }
  [[nodiscard]] const Value* value(int slot) const { return values_.at(static_cast<std::size_t>(slot)); }
  [[nodiscard]] std::size_t size() const { return values_.size(); }

 private:
  std::unordered_map<const Value*, int> slots_;
  std::vector<const Value*> values_;
};

/// A compiled piece of graph. Const and thread-safe: TorchScript's executors are.
class Subgraph {
 public:
  Subgraph() = default;
  /// `nodes` in the graph's order. Inputs are found; `outputs` are the values wanted.
  Subgraph(const std::string& name, const FlatGraph& flat, const std::vector<Node*>& nodes,
           const std::vector<const Value*>& outputs, Slots& slots, SharedCode& code);

  /// Is it the same code as another, on no weights?
  [[nodiscard]] bool same_without_weights(const Subgraph& other) const {
    return function_ == other.function_ && lifted_.empty();
  }
  [[nodiscard]] const std::vector<int>& in() const { return in_; }
  [[nodiscard]] const std::vector<int>& out() const { return out_; }

  /// Takes `in` from and puts `out` into `env`.
  void run(const c10::IValue& self, Env& env) const;
  /// The first output for inputs given in the order of in().
  [[nodiscard]] c10::IValue call(const c10::IValue& self, std::vector<c10::IValue> inputs) const;

 private:
  std::shared_ptr<torch::jit::GraphFunction> function_;
  std::vector<Lifted> lifted_;  ///< inputs behind those of in_
  std::vector<int> in_;
  std::vector<int> out_;
};

/// The values that `nodes` take from elsewhere, constants and attributes of the model aside, in the
/// order of first use.
std::vector<const Value*> external_inputs(const FlatGraph& flat, const std::vector<Node*>& nodes);

}  // namespace llmcache::ts
