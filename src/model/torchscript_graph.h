// The graph of a TorchScript model, flattened and cut. Internal to model/torchscript*.
#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "llmcache/model/layered_model.h"

namespace llmcache::ts {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

/// What became of writes to a module's attributes (model/torchscript_writes.h).
struct Writes {
  std::vector<std::string> exempt;  ///< attributes (dotted paths) whose values are never read any more
  std::vector<std::string> notes;
};

/// A chain of layer calls somewhere in the model's call tree.
struct Chain {
  std::string path;              ///< of the module that contains the layers
  std::vector<int> descent;      ///< from the root graph: which CallMethod of each top block to follow
  std::vector<int> calls;        ///< which CallMethods of the last graph are the layers, in order
  std::size_t weight_bytes = 0;  ///< parameters below the calls; decides between candidates
};

/// All chains of at least two calls (or the one named by `path`), most promising first.
/// Throws Error(kUnsupportedModel) if `path` names none.
std::vector<Chain> find_chains(const Module& module, const std::string& path);

/// The whole model as one graph without calls. Part 0 of its top-level nodes comes before the first
/// layer, part 1 .. L are the layers, part L+1 comes behind the last.
struct FlatGraph {
  std::shared_ptr<Graph> graph;
  std::int64_t layers = 0;
  std::unordered_map<const Node*, int> part;   ///< of each top-level node
  std::vector<std::vector<Value*>> arguments;  ///< of each layer call, without self
  Writes writes;                               ///< to the module's attributes, that were taken out
  bool on_cpu = false;                         ///< its weights are

  [[nodiscard]] Value* self() const { return graph->inputs()[0]; }
  [[nodiscard]] Value* input(std::size_t i) const { return graph->inputs()[i + 1]; }
};

/// Puts all that a graph calls in the place of the calls. LibTorch's own Inline goes one call deep only in a thread
/// that has turned TorchScript's optimisations off.
void inline_calls(torch::jit::Graph& graph);

FlatGraph flatten(const Module& module, const Chain& chain);

/// Inputs of a node, and everything that its blocks take from outside.
std::vector<const Value*> all_inputs(const Node* node);

/// True for constants, attributes of the model and lists of such: cheap to make again where needed.
bool is_rematerialised(const Value* value, const Value* self);

/// True if the node neither writes to its inputs, nor prints, raises, or draws random numbers.
bool is_pure(Node* node);

/// How one dimension (or one integer) varies with the shape of the input. kTokens are those of the target where there
/// is a source. Their numbers stand in saved profiles.
struct Label {
  enum class Kind { kConstant, kBatch, kTokens, kBatchTokens, kUnknown, kSource, kBatchSource };
  Kind kind = Kind::kUnknown;
  std::int64_t factor = 1;  ///< the constant itself, or the multiple of batch, tokens, ...

  bool operator==(const Label&) const = default;
};

/// What the value of a graph node looks like, found by running it on several shapes.
struct ValueInfo {
  enum class Kind { kUnknown, kTensor, kInteger, kOther };
  Kind kind = Kind::kUnknown;
  at::ScalarType dtype = at::kFloat;
  std::vector<Label> dims;  ///< of a tensor
  Label integer;            ///< of an integer, or of a 0-dimensional integral tensor
  bool nested = false;      ///< a nested tensor: its sequences have no common length

  /// Position of the only dimension of that kind, -1 if there is none, -2 if there are several.
  [[nodiscard]] int only(Label::Kind kind_wanted) const;
  [[nodiscard]] int count(Label::Kind kind_wanted) const;
  bool operator==(const ValueInfo&) const = default;
  [[nodiscard]] bool is_tensor() const { return kind == Kind::kTensor; }
  /// A scalar of any type, a list of integers or None: no tensor data.
  [[nodiscard]] bool is_scalar() const { return kind != Kind::kTensor || dims.empty(); }
};

using ValueInfos = std::unordered_map<const Value*, ValueInfo>;

/// Values of a graph in one run.
using Values = std::unordered_map<const Value*, c10::IValue>;

/// What top-level nodes compute for `inputs`: the values of those that are `wanted`, and no more work than they take.
Values run_some(const FlatGraph& flat, const Module& module, const Inputs& inputs,
                const std::function<bool(const Node*)>& wanted);

/// Everything that the top-level nodes compute for `inputs`.
Values run_all(const FlatGraph& flat, const Module& module, const Inputs& inputs);

/// Everything that the top-level nodes compute for `inputs`, those aside that make the keys of `instead`: whoever uses
/// them gets their values in `instead`, which are made before, and what is done for them alone is not.
Values run_instead(const FlatGraph& flat, const Module& module, const Inputs& inputs,
                   const std::unordered_map<const Value*, const Value*>& instead);

/// How parts of a graph are run. On a CPU as they are: TorchScript's optimiser, which looks at the first two runs of
/// each, finds nothing there that would make up for the time that it takes.
std::optional<torch::jit::ExecutorExecutionMode> executor_of(const FlatGraph& flat);

inline constexpr std::int64_t kLabelShapes[3][2] = {{2, 5}, {3, 7}, {2, 7}};

/// Labels of all top-level values, from runs on kLabelShapes. `with_source`: their inputs have a source, of
/// probe_source_tokens() tokens.
ValueInfos label_values(const std::vector<Values>& runs, bool with_source);

/// The same for each tensor in the result, in order; none if their number varies.
std::optional<std::vector<ValueInfo>> label_result(const FlatGraph& flat, const std::vector<Values>& runs,
                                                   bool with_source);

/// Label and kind of a value as plain numbers, for GraphFindings, and back. Throws DamagedData for those of no value.
std::vector<std::int64_t> numbers_of(const ValueInfo& info);
ValueInfo info_of(const std::vector<std::int64_t>& numbers);

/// The values that have labels, in the order of the graph: its inputs, and what its top-level nodes make.
std::vector<const Value*> labelled_values(const FlatGraph& flat);

/// The longest sequences that tables of positions have room for; 0: there are none.
struct TokenLimits {
  std::int64_t tokens = 0, source_tokens = 0;
};

/// By the same runs. `with_source`: as for label_values().
TokenLimits token_limits(const FlatGraph& flat, const Module& module, const std::vector<Values>& runs,
                         bool with_source);

/// Rows of the embedding that each model input selects from directly; 0: none.
std::vector<std::int64_t> input_vocabulary(const FlatGraph& flat, const Module& module);

/// Dotted path of a value that a chain of attribute look-ups on self gives; none for other values.
std::optional<std::string> attribute_path(const Value* value, const Value* self);

/// What such a chain finds in `module`; None if it is none.
c10::IValue attribute_value(const Value* value, const Value* self, const Module& module);

/// The tensor behind a chain of attribute look-ups on self; undefined if it is none.
at::Tensor attribute_tensor(const Value* value, const Value* self, const Module& module);

/// The values that depend on `source` within the top-level nodes.
std::unordered_set<const Value*> dependants(const FlatGraph& flat, const Value* source);

/// Sizes taken of hidden states are replaced, where no tensor data is involved, by sizes of the
/// input: tables of positions, biases and causal masks that a layer makes for itself then no longer
/// depend on the hidden state and can be computed once, before the layers. Returns the dependants
/// of `hidden` that remain. `infos` is extended by the new values; `detached` gets, for each scalar
/// that still depends on the hidden state, the same one made from the input.
/// `source_argument`: an input that is of the source; -1: there is none.
std::unordered_set<const Value*> detach_sizes(FlatGraph& flat, const Value* hidden, int ids_argument,
                                              int source_argument, ValueInfos& infos,
                                              std::unordered_map<const Value*, Value*>& detached);

}  // namespace llmcache::ts
