#include "model/torchscript_packed_weights.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/custom_operator.h>
#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>

#include "llmcache/error.h"
#include "model/probe.h"
#include "model/tensors_of.h"
#include "model/torchscript_follow_up.h"
#include "model/torchscript_source.h"

namespace llmcache::ts {
namespace {

namespace prim = c10::prim;
namespace aten = c10::aten;

const c10::Symbol& packed_linear_symbol() {
  static const auto symbol = c10::Symbol::fromQualString("llmcache::packed_linear");
  return symbol;
}

/// Once a process; nothing is registered in a program that never packs.
void register_operator() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::jit::registerOperator(torch::jit::Operator(
        "llmcache::packed_linear(Tensor x, int weight, Tensor? bias, int activation, Tensor? residual) -> Tensor",
        [](torch::jit::Stack& stack) {
          const auto residual = torch::jit::pop(stack).toOptional<at::Tensor>();
          const auto activation = static_cast<Activation>(torch::jit::pop(stack).toInt());
          const auto bias = torch::jit::pop(stack).toOptional<at::Tensor>();
          const auto weight = torch::jit::pop(stack).toInt();
          const auto x = torch::jit::pop(stack).toTensor();
          torch::jit::push(stack, PackedLinear::find(weight).apply(x, bias, activation, residual));
        },
        c10::AliasAnalysisKind::FROM_SCHEMA));
  });
}

void visit_nodes(torch::jit::Block* block, const std::function<void(Node*)>& visit) {
  for (Node* node : block->nodes()) {
    for (torch::jit::Block* inner : node->blocks()) visit_nodes(inner, visit);
    visit(node);
  }
}

/// An attribute, or its transpose, as it is multiplied with.
struct Matrix {
  at::Tensor tensor;
  std::string name;
};

std::optional<Matrix> matrix_of(const Value* value, const Analysis& analysis) {
  const Node* node = value->node();
  static const auto kNumpyT = c10::Symbol::fromQualString("aten::numpy_T");
  bool transposed = node->kind() == aten::t || node->kind() == kNumpyT;
  if (node->kind() == aten::transpose) {
    const auto a = torch::jit::constant_as<std::int64_t>(node->input(1));
    const auto b = torch::jit::constant_as<std::int64_t>(node->input(2));
    transposed = a && b && (*a - *b) % 2 != 0;  // of two dimensions, counted from either end
  }
  if (transposed) {
    auto inner = matrix_of(node->input(0), analysis);
    if (inner) inner->tensor = inner->tensor.t();
    return inner;
  }
  auto tensor = attribute_tensor(value, analysis.flat.self(), analysis.module);
  if (!tensor.defined() || tensor.dim() != 2 || tensor.numel() == 0) return std::nullopt;
  return Matrix{std::move(tensor), attribute_path(value, analysis.flat.self()).value_or("")};
}

bool is_one(const Value* value) { return constant_number(value) == 1.0; }

/// A node that can be replaced.
struct Linear {
  Value* x = nullptr;
  Value* bias = nullptr;  ///< null: none
  Matrix weight;          ///< `[out, in]`
};

std::optional<Linear> linear_of(Node* node, const Analysis& analysis) {
  Linear linear;
  std::optional<Matrix> weight;
  if (node->kind() == aten::linear && node->inputs().size() == 3) {
    linear.x = node->input(0);
    linear.bias = node->input(2);
    weight = matrix_of(node->input(1), analysis);
  } else if (node->kind() == aten::addmm && node->inputs().size() == 5 && is_one(node->input(3)) &&
             is_one(node->input(4))) {
    linear.x = node->input(1);
    linear.bias = node->input(0);
    weight = matrix_of(node->input(2), analysis);
    if (weight) weight->tensor = weight->tensor.t();
  } else if ((node->kind() == aten::matmul || node->kind() == aten::mm) && node->inputs().size() == 2) {
    linear.x = node->input(0);
    weight = matrix_of(node->input(1), analysis);
    if (weight) weight->tensor = weight->tensor.t();
  }
  if (!weight) return std::nullopt;
  linear.weight = std::move(*weight);
  if (linear.bias != nullptr) {
    const auto constant = torch::jit::toIValue(linear.bias);
    if (constant && constant->isNone()) {
      linear.bias = nullptr;
    } else {
      const auto bias = attribute_tensor(linear.bias, analysis.flat.self(), analysis.module);
      if (!bias.defined() || bias.dim() != 1 || bias.size(0) != linear.weight.tensor.size(0)) return std::nullopt;
    }
  }
  return linear;
}

Int8Recipes::Key key_of(const at::Tensor& weight) {
  return {weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)};
}

/// The largest magnitudes that the weights' inputs have in a sample, in the order of the graph.
class InputPeaks {
 public:
  explicit InputPeaks(const Analysis& analysis) : analysis_(analysis) {
    for (Node* node : analysis.flat.graph->nodes()) {
      if (auto linear = linear_of(node, analysis)) layers_.push_back(std::move(*linear));
    }
    for (const Linear& layer : layers_) wanted_.insert(layer.x->node());
  }

  void add(const Inputs& inputs) {
    const auto values =
        run_some(analysis_.flat, analysis_.module, inputs, [&](const Node* node) { return wanted_.contains(node); });
    for (const Linear& layer : layers_) {
      const auto found = values.find(layer.x);
      if (found == values.end() || found->second.toTensor().numel() == 0) continue;
      const at::Tensor& x = found->second.toTensor();
      const auto own = x.reshape({-1, x.size(-1)}).to(at::kFloat).abs().amax(0);
      TORCH_CHECK(own.isfinite().all().item<bool>(), "what goes into '", layer.weight.name, "' is not finite");
      auto& peaks = peaks_[key_of(layer.weight.tensor)];
      peaks = peaks.defined() ? at::maximum(peaks, own) : own;
    }
  }

  [[nodiscard]] Int8Recipes recipes() const {
    Int8Recipes made;
    for (const Linear& layer : layers_) {
      const auto key = key_of(layer.weight.tensor);
      const auto peaks = peaks_.find(key);
      if (peaks == peaks_.end() || !made.numbers.emplace(key, made.recipes.size()).second) continue;
      made.recipes.push_back(int8_recipe(layer.weight.tensor, peaks->second));
    }
    return made;
  }

 private:
  const Analysis& analysis_;
  std::vector<Linear> layers_;
  std::unordered_set<const Node*> wanted_;
  std::map<Int8Recipes::Key, at::Tensor> peaks_;
};

void check_ids(const std::vector<std::int64_t>& text, std::int64_t rows) {
  for (const std::int64_t id : text) {
    TORCH_CHECK(id >= 0 && (rows == 0 || id < rows), "the model does not know the token ", id, ", its ids end at ",
                rows - 1);
  }
}

/// One text without padding, as a source and as a target; other inputs that select from an embedding, such as token
/// types, are 0.
Inputs inputs_of(const std::vector<std::int64_t>& text, const Analysis& analysis) {
  const int of_source = source_argument(analysis);
  TORCH_CHECK(!text.empty(), "it has no token");
  const auto options = at::TensorOptions().dtype(at::kLong).device(analysis.device);
  Inputs inputs;
  for (std::size_t i = 0; i < analysis.vocabulary.size(); ++i) {
    const std::int64_t rows = analysis.vocabulary[i];
    if (static_cast<int>(i) == analysis.ids_argument || static_cast<int>(i) == of_source) {
      check_ids(text, rows);
      inputs.emplace_back(at::tensor(text, at::kLong).unsqueeze(0).to(analysis.device));
    } else {
      inputs.emplace_back(at::full({1, static_cast<std::int64_t>(text.size())}, rows == 0 ? 1 : 0, options));
    }
  }
  return inputs;
}

class Packer {
 public:
  Packer(Analysis& analysis, Weights kind, const Int8Recipes& recipes)
      : analysis_(analysis), kind_(kind), recipes_(recipes) {}

  PackedWeights run() {
    std::vector<Node*> found;
    visit_nodes(graph().block(), [&](Node* node) {
      if (linear_of(node, analysis_)) found.push_back(node);
    });
    for (Node* node : found) replace(node, *linear_of(node, analysis_));  // its input may be another by now
    return std::move(made_);
  }

 private:
  Graph& graph() { return *analysis_.flat.graph; }

  /// Tied weights are the same memory, whatever tensors they are.
  const PackedLinear& packed(const Matrix& weight) {
    auto& found = by_memory_[key_of(weight.tensor)];
    if (found == nullptr) {
      made_.push_back(PackedLinear::pack(kind_, weight.tensor, weight.name, recipes_.of(weight.tensor)));
      found = made_.back().get();
    }
    return *found;
  }

  /// Puts a node that was made in place of `old` into the part of that one.
  Node* in_part_of(const Node* old, Node* made) {
    auto& part = analysis_.flat.part;
    if (const auto found = part.find(old); found != part.end()) part.try_emplace(made, found->second);
    return made;
  }

  void destroy(Node* node) {
    analysis_.flat.part.erase(node);
    analysis_.infos.erase(node->output());
    node->destroy();
  }

  void replace(Node* node, const Linear& linear) {
    const auto follow_up =
        PackedLinear::finishes(kind_) ? follow_up_of(node->output(), linear.bias != nullptr, analysis_) : FollowUp{};
    Node* last = follow_up.replaced.empty() ? node : follow_up.replaced.back();
    const torch::jit::WithInsertPoint guard(last);
    const auto constant = [&](const c10::IValue& value) {
      return in_part_of(node, graph().insertConstant(value)->node())->output();
    };
    const auto or_none = [&](Value* value) { return value != nullptr ? value : constant({}); };
    Value* number = constant(packed(linear.weight).number());
    Value* bias = or_none(linear.bias != nullptr ? linear.bias : follow_up.bias);
    Value* activation = constant(static_cast<std::int64_t>(follow_up.activation));
    Value* residual = or_none(follow_up.residual);
    Node* made = in_part_of(node, graph().insertNode(graph().create(packed_linear_symbol(),
                                                                    {linear.x, number, bias, activation, residual})));
    made->output()->setType(c10::TensorType::get());
    if (const auto info = analysis_.infos.find(node->output()); info != analysis_.infos.end()) {
      auto copy = info->second;
      analysis_.infos.emplace(made->output(), std::move(copy));
    }
    Value* result = made->output();
    for (Node* reshaping : follow_up.reshaping) {
      reshaping->moveBefore(last);
      reshaping->replaceInput(0, result);
      result = reshaping->output();
    }
    std::replace(analysis_.hidden.begin(), analysis_.hidden.end(), last->output(), result);
    last->output()->replaceAllUsesWith(result);
    std::for_each(follow_up.replaced.rbegin(), follow_up.replaced.rend(), [&](Node* old) { destroy(old); });
    destroy(node);
  }

  Analysis& analysis_;
  Weights kind_;
  const Int8Recipes& recipes_;
  std::map<Int8Recipes::Key, const PackedLinear*> by_memory_;
  PackedWeights made_;
};

/// Lets the graph read its attributes from an object that has no others.
void move_attributes(Analysis& analysis) {
  auto& flat = analysis.flat;
  Graph& graph = *flat.graph;
  Value* self = flat.self();
  const auto reads = [](const torch::jit::Use& use) { return use.user->kind() == prim::GetAttr; };
  if (!std::all_of(self->uses().begin(), self->uses().end(), reads)) return;  // the module itself is used: keep it

  Module own(c10::QualifiedName("__torch__.llmcache.Attributes"), std::make_shared<torch::jit::CompilationUnit>());
  std::vector<std::pair<Node*, std::string>> found;
  visit_nodes(graph.block(), [&](Node* node) {
    if (node->kind() != prim::GetAttr) return;
    const auto& uses = node->output()->uses();
    if (std::all_of(uses.begin(), uses.end(), reads)) return;
    const auto path = attribute_path(node->output(), self);
    if (!path) return;
    found.emplace_back(node, *path);
    if (own.hasattr(*path)) return;
    const auto value = attribute_value(node->output(), self, analysis.module);
    own.register_attribute(*path, node->output()->type(), value, /*is_param=*/value.isTensor());
  });
  self->setType(own.type());
  for (const auto& [node, path] : found) {
    Node* made = graph.createGetAttr(self, path);
    made->insertBefore(node);
    if (const auto part = flat.part.find(node); part != flat.part.end()) flat.part[made] = part->second;
    if (const auto info = analysis.infos.find(node->output()); info != analysis.infos.end()) {
      analysis.infos[made->output()] = info->second;
    }
    node->output()->replaceAllUsesWith(made->output());
  }
  analysis.module = own;
}

/// Largest difference in relation to the largest magnitude; infinite where shapes, types or values that are not finite
/// differ.
double relative_difference(const at::Tensor& got, const at::Tensor& want) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type()) return kInfinite;
  if (want.numel() == 0) return 0;
  const auto a = got.to(at::kDouble);
  const auto b = want.to(at::kDouble);
  const auto finite = b.isfinite();
  if (!at::equal(finite, a.isfinite())) return kInfinite;
  const auto difference = (a - b).masked_fill(finite.logical_not(), 0).abs().max().item<double>();
  return difference / std::max(b.masked_fill(finite.logical_not(), 0).abs().max().item<double>(), 1e-3);
}

/// How far the results of tiny inputs may be off, of their largest magnitude. What a format rounds explains this much
/// of models of some dozens of layers; a wrong layer, bias or activation moves them by their whole scale.
double allowed_of(Weights weights) {
  switch (weights) {
    case Weights::kPackedFp32:
      return 1e-3;
    case Weights::kPackedInt8:
      return 0.3;
    case Weights::kPackedBFloat16:
      return 0.15;  // as of an answer of a module in bfloat16 (answer_tolerance())
    default:
      return 5e-2;
  }
}

}  // namespace

const Int8Recipe* Int8Recipes::of(const at::Tensor& weight) const {
  const auto found = numbers.find(key_of(weight));
  return found == numbers.end() ? nullptr : &recipes[found->second];
}

std::string Int8Recipes::digest() const {
  if (recipes.empty()) return "";
  XXH3_state_t* state = XXH3_createState();
  XXH3_128bits_reset(state);
  for (const Int8Recipe& recipe : recipes) {
    for (const at::Tensor& own : {recipe.smoothing, recipe.outliers}) {
      XXH3_128bits_update(state, own.const_data_ptr(), own.nbytes());
    }
  }
  const auto hash = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

Int8Recipes find_int8_recipes(const Analysis& analysis, const std::vector<std::vector<std::int64_t>>& texts) {
  InputPeaks peaks(analysis);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    try {
      peaks.add(inputs_of(texts[i], analysis));
    } catch (const std::exception& error) {
      std::throw_with_nested(Error(ErrorCode::kInvalidInput,
                                   fmt::format("Options.weights_sample[{}] cannot be run: {}", i, reason_of(error))));
    }
  }
  return peaks.recipes();
}

PackedWeights pack_weights(Analysis& analysis, Weights kind, const Int8Recipes& recipes) {
  register_operator();
  auto made = Packer(analysis, kind, recipes).run();
  remove_dead(analysis);  // transposed weights
  move_attributes(analysis);
  remove_dead(analysis);  // the way to the attributes
  return made;
}

std::optional<std::int64_t> number_of_packed(const Value* value) {
  const auto& uses = value->uses();
  const bool packed = !uses.empty() && std::all_of(uses.begin(), uses.end(), [](const torch::jit::Use& use) {
    return use.user->kind() == packed_linear_symbol() && use.offset == 1;
  });
  return packed ? torch::jit::constant_as<std::int64_t>(value) : std::nullopt;
}

std::vector<LayerShape> layer_shapes(const Analysis& analysis, const Int8Recipes& recipes) {
  std::map<std::pair<std::int64_t, std::int64_t>, LayerShape> shapes;
  visit_nodes(analysis.flat.graph->block(), [&](Node* node) {
    const auto linear = linear_of(node, analysis);
    if (!linear) return;
    auto& shape = shapes[{linear->weight.tensor.size(0), linear->weight.tensor.size(1)}];
    shape.weight = linear->weight.tensor;
    shape.recipe = recipes.of(shape.weight);
    ++shape.layers;
  });
  std::vector<LayerShape> found;
  for (const auto& [size, shape] : shapes) found.push_back(shape);
  return found;
}

void check_packed(const Model& model, const Module& module, Weights weights, bool tuned) {
  const double allowed = allowed_of(weights);
  auto original = module;
  for (const auto& shape : {std::pair<std::int64_t, std::int64_t>{2, 5}, {1, 1}, {1, 3}, {3, 8}}) {
    const auto inputs = llmcache::probe_inputs(model.input_spec(), model.device(), shape.first, shape.second);
    c10::IValue plain;
    try {
      plain = original.forward(inputs);
    } catch (const std::exception&) {
      continue;  // the module does not take this shape
    }
    const auto want = tensors_of(plain);
    const auto got = tensors_of(model.plain(inputs));
    double worst = got.size() == want.size() ? 0 : std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < want.size() && i < got.size(); ++i) {
      worst = std::max(worst, relative_difference(got[i], want[i]));
    }
    if (worst <= allowed) continue;
    const bool untuned = weights == Weights::kPackedInt8 && !tuned;
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("with weights that are {} the model's results move by {:.2g} of their scale, {} is the "
                            "limit; use {}as-loaded",
                            to_string(weights), worst, allowed, untuned ? "Options.weights_sample, or " : ""));
  }
}

}  // namespace llmcache::ts
