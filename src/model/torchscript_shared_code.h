// Pieces of graph that do the same with other weights, compiled once for all of them. Internal to model/torchscript*.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/function_impl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "model/torchscript_graph.h"

namespace llmcache::ts {

/// How a piece of graph is run.
enum class Executor : std::uint8_t {
  kOfModule,  ///< as TorchScript runs the module: the same bits, after two slow runs in which it is optimised
  kSimple,    ///< on a CPU as it is: the optimiser finds nothing there that would make up for the time that it takes
};

/// What tells layers of one kind apart: a tensor that the module holds, by the slots that lead to it, or the number of
/// a packed weight. It becomes an input of the piece.
using Lifted = std::variant<std::vector<std::size_t>, std::int64_t>;

/// What `value` is to a piece of `flat` that others are to share; nothing: it stays in the piece.
std::optional<Lifted> lifted(const Value* value, const FlatGraph& flat);

/// What is lifted, as it is now.
c10::IValue read_lifted(const Lifted& what, const c10::IValue& self);

/// Functions by what they do. Const functions that it made are thread-safe.
class SharedCode {
 public:
  explicit SharedCode(Executor executor) : executor_(executor) {}

  /// `graph` has no value of `flat` in it any more. Another graph's function, if that has the same operators, constants
  /// and types.
  std::shared_ptr<torch::jit::GraphFunction> compile(const std::string& name, const FlatGraph& flat,
                                                     std::shared_ptr<Graph> graph);

 private:
  Executor executor_;
  std::unordered_map<std::string, std::shared_ptr<torch::jit::GraphFunction>> functions_;
};

}  // namespace llmcache::ts
