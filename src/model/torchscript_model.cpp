#include "model/torchscript_model.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <mutex>
#include <shared_mutex>

#include "llmcache/error.h"
#include "model/exported_module.h"
#include "model/torchscript_attention_ops.h"
#include "model/torchscript_layer_kinds.h"
#include "model/torchscript_source_part.h"
#include "model/torchscript_weights.h"

namespace llmcache::ts {

Program build_program(const Analysis& analysis) {
  Program program;
  const auto layers = analysis.flat.layers;
  auto embed_nodes = analysis.nodes(0);
  if (const SourcePart& part = analysis.source_part; !part.values.empty()) {
    program.source =
        Subgraph("llmcache_source", analysis.flat, part.nodes, part.values, program.slots, program.as_module);
    std::erase_if(embed_nodes, [&](const Node* node) { return part.own.count(node) > 0; });
  }
  program.embed = Subgraph("llmcache_embed", analysis.flat, embed_nodes, analysis.escaping(embed_nodes), program.slots,
                           program.as_module);
  for (std::int64_t l = 0; l < layers; ++l) {
    const auto nodes = analysis.nodes(l + 1);
    program.layers.emplace_back("llmcache_layer_" + std::to_string(l), analysis.flat, nodes, analysis.escaping(nodes),
                                program.slots, program.as_module);
  }
  const std::vector<const Value*> result{analysis.flat.graph->outputs()[0]};
  program.head =
      Subgraph("llmcache_head", analysis.flat, analysis.nodes(layers + 1), result, program.slots, program.as_module);
  for (const Value* value : analysis.hidden) program.hidden.push_back(program.slots.of(value));
  if (const TokenChoice& choice = analysis.choice; choice.node != nullptr) {
    program.position = Subgraph("llmcache_position", analysis.flat, nodes_of_position(analysis.flat, choice),
                                {choice.position}, program.slots, program.simple);
  }

  program.dead.resize(static_cast<std::size_t>(layers));
  std::vector<std::int64_t> last(program.slots.size(), -1);
  for (std::int64_t l = 0; l < layers; ++l) {
    for (const int slot : program.layers[static_cast<std::size_t>(l)].in()) last[static_cast<std::size_t>(slot)] = l;
  }
  for (const int slot : program.head.in()) last[static_cast<std::size_t>(slot)] = layers;
  for (std::size_t slot = 0; slot < last.size(); ++slot) {
    if (last[slot] >= 0 && last[slot] < layers) {
      program.dead[static_cast<std::size_t>(last[slot])].push_back(static_cast<int>(slot));
    }
  }
  return program;
}

namespace {

/// What an exported program says of its inputs.
void take_ranges(const Module& module, InputSpec& spec) {
  spec.only_int64 = true;
  const auto most = module.attr(exported::kMostTokens).toIntVector();
  const auto groups = module.attr(exported::kTokenGroups).toIntVector();
  for (std::size_t i = 0; i < most.size(); ++i) {
    std::int64_t& least = spec.is_source(i) ? spec.most_source_tokens : spec.most_tokens;
    if (most[i] > 0) least = least == 0 ? most[i] : std::min(least, most[i]);
    for (std::size_t j = 0; j < i; ++j) {
      if (groups[i] != groups[j] || spec.is_source(i) == spec.is_source(j)) continue;
      throw Error(ErrorCode::kUnsupportedModel,
                  fmt::format("it takes sources ('{}') and targets ('{}') of the same number of tokens only: export it "
                              "from an example in which they have unlike many",
                              spec.names[spec.is_source(i) ? i : j], spec.names[spec.is_source(i) ? j : i]));
    }
  }
}

InputSpec spec_of(const Analysis& analysis) {
  InputSpec spec;
  const auto& arguments = analysis.module.get_method("forward").function().getSchema().arguments();
  for (std::size_t i = 1; i < arguments.size(); ++i) {
    spec.names.push_back(arguments[i].name());
    spec.optional.push_back(arguments[i].type()->kind() == c10::TypeKind::OptionalType);
  }
  spec.vocabulary = analysis.vocabulary;
  spec.compared = analysis.dependence.compared;
  spec.opens_attention = analysis.dependence.pairs;
  spec.source = analysis.source;
  spec.source_length_counts = !analysis.dependence.source_length.empty();
  if (analysis.module.hasattr(exported::kMostTokens)) take_ranges(analysis.module, spec);
  return spec;
}

class TorchScriptModel final : public Model {
 public:
  TorchScriptModel(Analysis analysis, Weights weights, std::string reason, const Int8Recipes& recipes)
      : weights_(weights),
        weights_reason_(std::move(reason)),
        guard_(analysis.module, exempt_of(analysis)),
        spec_(spec_of(analysis)),
        structure_(fmt::format("{} {} {} {}{}", analysis.findings->structure, analysis.path, analysis.flat.layers,
                               to_string(weights), recipes.digest())),
        notes_(analysis.flat.writes.notes) {
    digest_ = guard_.digest(structure_);
    structure_identity_ = fmt::format("{} {} {} {}{}", analysis.findings->structure_identity, analysis.path,
                                      analysis.flat.layers, to_string(weights), recipes.digest());
    if (weights != Weights::kAsLoaded) {
      identity_ = guard_.identity(structure_identity_);  // what it is made of is let go of
      packed_ = pack_weights(analysis, weights, recipes);
      if (packed_.empty())
        notes_.push_back(fmt::format("no linear layer was found whose weights could be {}", to_string(weights)));
      own_guard_.emplace(analysis.module, exempt_of(analysis));
      guard_.let_go();
    }
    analysis.source_part = find_source_part(analysis);
    if (!analysis.source_part.obstacle.empty()) {
      notes_.push_back("what follows from a source alone is not kept: " + analysis.source_part.obstacle);
    }
    analysis_ = std::make_shared<const Analysis>(std::move(analysis));
    self_ = analysis_->module._ivalue();
    program_ = build_program(*analysis_);
    if (!analysis_->source_part.values.empty()) source_ = std::make_unique<SourceSubgraph>(analysis_, program_);
    token_level_ = make_token_level(analysis_, program_, attention_ops_, notes_);
    if (token_level_ != nullptr && token_level_->self_contained() && head_takes_one_state()) {
      analysis_->findings->layers = layer_kinds(*analysis_, attention_ops_);
    }
  }

  Activations embed(const Inputs& inputs) const override {
    auto env = std::make_shared<Env>(program_.slots.size());
    put_inputs(*analysis_, program_, inputs, *env);
    put_source(*analysis_, program_, self_, inputs, *env);
    program_.embed.run(self_, *env);
    at::Tensor hidden = (*env)[static_cast<std::size_t>(program_.hidden[0])].toTensor();
    return {std::move(hidden), std::move(env)};
  }

  std::int64_t layers() const override { return analysis_->flat.layers; }

  void layer(std::int64_t i, Activations& activations) const override {
    auto& env = *static_cast<Env*>(activations.context.get());
    const auto l = static_cast<std::size_t>(i);
    env[static_cast<std::size_t>(program_.hidden[l])] = std::move(activations.hidden);
    program_.layers[l].run(self_, env);
    activations.hidden = env[static_cast<std::size_t>(program_.hidden[l + 1])].toTensor();
    for (const int slot : program_.dead[l]) env[static_cast<std::size_t>(slot)] = {};
  }

  c10::IValue head(Activations& activations) const override {
    auto& env = *static_cast<Env*>(activations.context.get());
    env[static_cast<std::size_t>(program_.hidden.back())] = activations.hidden;
    program_.head.run(self_, env);
    return std::move(env[static_cast<std::size_t>(program_.head.out()[0])]);
  }

  at::Tensor read_positions(const Inputs& inputs) const override {
    if (analysis_->choice.node == nullptr) return {};
    const at::Tensor& ids = inputs.at(static_cast<std::size_t>(analysis_->ids_argument)).toTensor();
    Env env(program_.slots.size());
    put_inputs(*analysis_, program_, inputs, env);
    program_.position.run(self_, env);
    const auto slot = static_cast<std::size_t>(program_.position.out()[0]);
    const auto found = env[slot].toTensor().to(at::kCPU, at::kLong).reshape({-1}).expand({ids.size(0)});
    return at::where(found.lt(0), found.add(ids.size(1)), found).contiguous();
  }

  at::Device device() const override { return analysis_->device; }
  at::ScalarType dtype() const override { return analysis_->infos.at(analysis_->hidden[0]).dtype; }
  at::ScalarType rounding() const override {
    const bool rounds_rows = weights_ == Weights::kPackedBFloat16 || weights_ == Weights::kPackedInt8;
    return rounds_rows ? at::kBFloat16 : dtype();
  }
  std::string digest() const override {
    const std::shared_lock lock(guard_mutex_);
    return digest_;
  }
  std::string identity() const override {
    const std::lock_guard one_at_a_time(identity_mutex_);
    if (identity_.empty()) {
      const std::shared_lock lock(guard_mutex_);
      const std::string made = guard_.identity(structure_identity_);
      guard_.check_every();  // it is that of the weights which were wrapped
      identity_ = made;
    }
    return identity_;
  }

  InputSpec input_spec() const override { return spec_; }

  c10::IValue plain(const Inputs& inputs) const override {
    if (weights_ != Weights::kAsLoaded) return Model::plain(inputs);  // the module itself may be gone
    auto module = analysis_->module;
    return module.forward(inputs);
  }

  void check_unchanged() const override {
    const std::shared_lock lock(guard_mutex_);
    guard_.check();
    if (own_guard_) own_guard_->check();
  }
  void check_every_weight() const override {
    const std::shared_lock lock(guard_mutex_);
    own_guard_ ? own_guard_->check_every() : guard_.check_every();
  }
  void weights_changed() override {
    if (own_guard_) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("the weights are held {}, as copies: construct a new LayerCache from the module as it is "
                              "now",
                              to_string(weights_)));
    }
    const std::lock_guard no_identity(identity_mutex_);
    const std::unique_lock lock(guard_mutex_);
    guard_.retake();
    identity_.clear();
    digest_ = guard_.digest(structure_);
  }
  const TokenLevelModel* token_level() const override { return token_level_.get(); }
  const SourceModel* source() const override { return source_.get(); }
  const GraphFindings* findings() const override { return analysis_->findings.get(); }

  void describe(ModelProfile& profile) const override {
    profile.layers_path = analysis_->path;
    profile.layers = layers();
    profile.hidden = analysis_->hidden_size;
    profile.hidden_argument = analysis_->hidden_argument;
    profile.attention = attention_ops_;
    profile.head_chooses = token_level_ != nullptr && token_level_->head_chooses();
    profile.inputs = input_spec().names;
    profile.ids_argument = analysis_->ids_argument;
    for (std::size_t i = 0; i < analysis_->source.size(); ++i) {
      if (analysis_->source[i]) profile.source_arguments.push_back(static_cast<int>(i));
    }
    profile.vocabulary = analysis_->vocabulary[static_cast<std::size_t>(analysis_->ids_argument)];
    profile.max_tokens = analysis_->max_tokens;
    profile.max_source_tokens = analysis_->max_source_tokens;
    profile.rows_independent = !analysis_->rows_meet && analysis_->dependence.rows.empty();
    profile.notes = notes_;
    describe_dependence(profile);
    if (analysis_->rows_meet) {
      profile.notes.emplace_back(
          "no row is kept for another batch: the model chooses its way by the number of rows, or by what all of them "
          "hold together");
    }
    profile.dtype = dtype();
    profile.device = device().str();
    profile.weight_bytes = guard_.bytes();
    profile.weights = to_string(weights_);
    profile.weights_reason = weights_reason_;
    profile.packed_weights = packed_.size();
    for (const auto& packed : packed_) profile.packed_weight_bytes += packed->bytes();
    if (own_guard_) profile.released_weight_bytes = guard_.bytes() - own_guard_->bytes();
    profile.digest = digest_;
  }

 private:
  /// What is refused because of what the graph depends on, and why.
  void describe_dependence(ModelProfile& profile) const {
    const Dependence& dependence = analysis_->dependence;
    if (!dependence.source_length.empty()) {
      profile.notes.push_back("sources are known with the padding behind them only: " + dependence.source_length);
    }
    profile.row_obstacle = !dependence.rows.empty() ? dependence.rows : dependence.length;
    profile.prefix_obstacle = dependence.length;
    if (!dependence.rows.empty()) {
      profile.notes.push_back("no row is kept for another batch, and none is packed: " + dependence.rows);
    } else if (!dependence.length.empty()) {
      profile.notes.push_back("rows are kept for batches of the same padded length and padding only: " +
                              dependence.length);
    }
  }

  [[nodiscard]] bool head_takes_one_state() const {
    const auto& slots = program_.head.in();
    return std::none_of(slots.begin(), slots.end(), [&](int slot) {
      const Value* value = program_.slots.value(slot);
      return analysis_->dependent.count(value) > 0 && value != analysis_->hidden.back();
    });
  }

  static std::unordered_set<std::string> exempt_of(const Analysis& analysis) {
    const auto& names = analysis.flat.writes.exempt;
    return {names.begin(), names.end()};
  }

  Weights weights_;
  std::string weights_reason_;
  WeightGuard guard_;                     ///< of the caller's module
  std::optional<WeightGuard> own_guard_;  ///< of what is used of it, if weights were packed
  InputSpec spec_;
  std::string structure_;  ///< what makes the digest, beside the weights
  std::vector<std::string> notes_;
  std::string digest_;
  std::string structure_identity_;  ///< what makes the identity, beside the weights
  mutable std::mutex identity_mutex_;
  mutable std::string identity_;           ///< guarded by identity_mutex_; empty: not made yet
  mutable std::shared_mutex guard_mutex_;  ///< exclusive: the weights are taken as they are now
  PackedWeights packed_;                   ///< outlives the program
  std::shared_ptr<const Analysis> analysis_;
  c10::IValue self_;
  Program program_;
  std::unique_ptr<SourceSubgraph> source_;  ///< null: there is none
  std::vector<AttentionOp> attention_ops_;
  std::unique_ptr<TokenLevelModel> token_level_;
};

}  // namespace

std::unique_ptr<Model> make_model(Analysis analysis, Weights weights, std::string reason, const Int8Recipes& recipes) {
  return std::make_unique<TorchScriptModel>(std::move(analysis), weights, std::move(reason), recipes);
}

}  // namespace llmcache::ts
