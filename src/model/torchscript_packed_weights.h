// Linear layers of an analysed TorchScript model on packed weights. Internal to model/torchscript*.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "llmcache/options.h"
#include "model/fastest_weights.h"
#include "model/packed_linear.h"
#include "model/torchscript_analysis.h"

namespace llmcache::ts {

/// The weights that pack_weights() made; must live as long as the graph that it changed.
using PackedWeights = std::vector<std::shared_ptr<const PackedLinear>>;

/// By the memory of a weight, which tells tied ones; recipes in the order of the graph.
struct Int8Recipes {
  using Key = std::tuple<const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  std::map<Key, std::size_t> numbers;
  std::vector<Int8Recipe> recipes;

  [[nodiscard]] const Int8Recipe* of(const at::Tensor& weight) const;
  /// Tells recipes apart; empty without any.
  [[nodiscard]] std::string digest() const;
};

/// Runs texts, as token ids, and finds a recipe for each weight of a layer that pack_weights() would replace, those
/// within nested blocks aside. Throws Error(kInvalidInput) that names the text that the model cannot run.
Int8Recipes find_int8_recipes(const Analysis& analysis, const std::vector<std::vector<std::int64_t>>& texts);

/// Replaces the linear layers of the flat graph, nodes of nested blocks included, by an operator on packed weights:
/// aten::linear, aten::addmm (beta and alpha 1), aten::mm and aten::matmul whose weight is an attribute of the module,
/// transposed or not. A weight that several of them use is packed once. Where the format takes it, what stands right
/// behind a layer becomes a part of it: a bias, an activation, an addition (model/torchscript_follow_up.h). The graph
/// then reads what is left of the attributes from an object of its own, which replaces Analysis::module: the caller's
/// module stays as it was, and what was packed is no longer held for it. Throws Error(kNotAvailable) as
/// PackedLinear::pack().
PackedWeights pack_weights(Analysis& analysis, Weights kind, const Int8Recipes& recipes = {});

/// The number of the packed weight that the graph holds by `value`; nothing: it is none.
std::optional<std::int64_t> number_of_packed(const Value* value);

/// The shapes of the layers that pack_weights() would pack, and how many layers have each. `recipes` outlive them.
std::vector<LayerShape> layer_shapes(const Analysis& analysis, const Int8Recipes& recipes);

/// Compares `model`, made on packed weights, with `module` as it was given, on tiny inputs: no later check does.
/// `tuned`: with recipes. Throws Error(kNotAvailable) if results move by more than what the format explains.
void check_packed(const Model& model, const Module& module, Weights weights, bool tuned);

}  // namespace llmcache::ts
