// Token-level operation of a TorchScript module: its layers, cut at the attention operators.
#include "model/torchscript_token_level.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <map>
#include <set>

#include "model/torchscript_run.h"
#include "model/torchscript_shared_rows.h"
#include "model/torchscript_source_part.h"

namespace llmcache::ts {
namespace {

using Kind = Label::Kind;

constexpr const char* kFusedLayers =
    ". The layers are nn.TransformerEncoderLayer's fast path, one operator each; for token-level reuse trace the model "
    "after torch.backends.mha.set_fastpath_enabled(False)";

bool has_fused_layers(const torch::jit::Block* block) {
  static const auto kFused = c10::Symbol::fromQualString("aten::_transformer_encoder_layer_fwd");
  for (const Node* node : block->nodes()) {
    if (node->kind() == kFused) return true;
    for (const torch::jit::Block* inner : node->blocks()) {
      if (has_fused_layers(inner)) return true;
    }
  }
  return false;
}

bool has_fused_layers(const FlatGraph& flat) { return has_fused_layers(flat.graph->block()); }

}  // namespace

std::int64_t length_of(const Label& label, std::int64_t batch, std::int64_t tokens) {
  switch (label.kind) {
    case Kind::kBatch:
      return label.factor * batch;
    case Kind::kTokens:
      return label.factor * tokens;
    case Kind::kBatchTokens:
      return label.factor * batch * tokens;
    default:
      return label.factor;
  }
}

c10::IValue integer_like(const c10::IValue& sample, std::int64_t value) {
  if (!sample.isTensor()) return value;
  return at::scalar_tensor(value, sample.toTensor().options());
}

TokenDims token_dims(const ValueInfo& info) {
  return {info.only(Kind::kBatch), info.only(Kind::kTokens), info.only(Kind::kBatchTokens)};
}

std::unique_ptr<TokenRun> TokenLevel::start(const Activations& embedded, const PackedLayout& layout) const {
  return std::make_unique<Run>(*this, std::static_pointer_cast<Env>(embedded.context), embedded.hidden, layout);
}

std::unique_ptr<TokenRun> TokenLevel::start_at(const std::vector<c10::IValue>& inputs, const at::Tensor& positions,
                                               const PackedLayout& layout) const {
  if (!partial_embed_) return nullptr;
  auto whole = std::make_shared<Env>(program_.slots.size());
  Env cut(program_.slots.size());
  put_inputs(*analysis_, program_, inputs, *whole);
  put_source(*analysis_, program_, self_, inputs, *whole);
  std::vector<c10::IValue> source;
  for (const int slot : program_.source.out()) source.push_back((*whole)[static_cast<std::size_t>(slot)]);
  partial_embed_->run(self_, inputs, source, positions, *whole, cut);
  return std::make_unique<Run>(*this, std::move(whole), std::move(cut), positions, layout);
}

bool TokenLevel::add_rules(const std::vector<int>& slots, std::string& reason) {
  for (const int slot : slots) {
    const Value* value = program_.slots.value(slot);
    if (analysis_->dependent.count(value) || !ruled_.insert(slot).second) continue;
    const auto found = analysis_->infos.find(value);
    PackRule rule;
    rule.slot = slot;
    if (found == analysis_->infos.end() || found->second.kind == ValueInfo::Kind::kUnknown) {
      reason = fmt::format("'{}', which it needs, has no fixed rank", value->debugName());
      return false;
    }
    const ValueInfo& info = found->second;
    if (info.is_scalar()) {
      if (info.integer.kind == Kind::kBatchSource) {
        reason = fmt::format("'{}', which it needs, counts the source's tokens of all rows", value->debugName());
        return false;
      }
      const bool of_source = info.integer.kind == Kind::kSource;
      if (info.integer.kind != Kind::kConstant && info.integer.kind != Kind::kUnknown && !of_source) {
        rule.kind = PackRule::Kind::kLength;
        rule.length = info.integer;
      }
    } else {
      rule.dims = token_dims(info);
      const bool batch = rule.dims.batch != -1;
      const bool tokens = rule.dims.tokens != -1 || rule.dims.merged != -1;
      const bool clear = rule.dims.batch != -2 && rule.dims.tokens != -2 && rule.dims.merged != -2 &&
                         info.count(Kind::kUnknown) + info.count(Kind::kBatchSource) == 0 &&
                         (rule.dims.merged == -1 || (!batch && rule.dims.tokens == -1));
      const bool shared = clear && batch && !tokens && same_for_all_rows(*analysis_, value);
      if (shared) {
        rule.kind = PackRule::Kind::kFirstRow;
        rule.entries = info.dims[static_cast<std::size_t>(rule.dims.batch)].factor;
      } else if (!clear || (batch && !tokens)) {
        reason = fmt::format("'{}', which it needs, is neither per token nor the same for all", value->debugName());
        return false;
      }
      if (tokens) rule.kind = PackRule::Kind::kRows;
    }
    rules_.push_back(rule);
  }
  return true;
}

bool TokenLevel::build(std::vector<AttentionOp>& attention_ops, std::vector<std::string>& notes) {
  const auto& analysis = *analysis_;
  const auto give_up = [&](const std::string& why, const char* more) {
    notes.push_back("token-level reuse is not available: " + why + more);
    return false;
  };
  const char* fused = has_fused_layers(analysis.flat) ? kFusedLayers : "";
  if (!analysis.obstacle.empty()) return give_up(analysis.obstacle, fused);
  std::unordered_set<const Value*> earlier;
  for (std::int64_t l = 0; l < analysis.flat.layers; ++l) {
    PackedLayer layer;
    const auto reason = build_layer(l, earlier, layer, attention_ops);
    if (!reason.empty()) return give_up(fmt::format("layer {} cannot be split at its attention: {}", l, reason), "");
    add_dead_slots(l, earlier, layer);
    layers_.push_back(std::move(layer));
  }
  values_.clear();
  if (attention_ops.empty()) return give_up("no attention was found in the layers", fused);
  if (!partial_) notes.push_back("attention needs as many queries as keys: a sequence runs whole or not at all");
  if (!self_contained_) {
    notes.push_back("layers use values of other layers than the one before: all layers run the same tokens");
  }
  build_head(notes);
  build_partial_embed();
  return true;
}

std::string TokenLevel::build_layer(std::int64_t l, const ValueSet& earlier, PackedLayer& layer,
                                    std::vector<AttentionOp>& attention_ops) {
  const auto& analysis = *analysis_;
  std::string reason;
  auto split = split_layer(analysis, l + 1, reason);
  if (!split) return reason;
  for (std::size_t p = 0; p < split->pieces.size(); ++p) {
    const auto& nodes = split->pieces[p];
    layer.pieces.emplace_back(fmt::format("llmcache_layer_{}_piece_{}", l, p), analysis.flat, nodes,
                              analysis.escaping(nodes), program_.slots, program_.simple);
    if (!add_rules(layer.pieces.back().in(), reason)) return reason;
    for (const Value* value : external_inputs(analysis.flat, nodes)) {
      if (earlier.count(value) && value != analysis.hidden[static_cast<std::size_t>(l)]) self_contained_ = false;
    }
  }
  for (std::size_t s = 0; s < split->regions.size(); ++s) {
    PackedAttention attention_op;
    attention_op.region = std::move(split->regions[s]);
    const Region& region = attention_op.region;
    attention_op.subgraph = Subgraph(fmt::format("llmcache_layer_{}_attention_{}", l, s), analysis.flat, region.nodes,
                                     {region.output}, program_.slots, program_.simple);
    for (const AttentionInput& input : region.inputs) attention_op.slots.push_back(program_.slots.of(input.value));
    attention_op.output_slot = program_.slots.of(region.output);
    if (!take_roles(attention_op) && !find_roles(l, attention_op, reason)) return reason;
    for (const AttentionInput& input : region.inputs) {
      if (input.role == Role::kQuery) attention_op.query_dims.push_back(input.token_dim);
      if (input.role == Role::kKey) attention_op.key_dims.push_back(input.token_dim);
      if (earlier.count(input.value)) self_contained_ = false;
    }
    attention_ops.push_back(
        {l, region.sdpa ? "sdpa" : "eager", attention_op.query_dims.size(), attention_op.key_dims.size()});
    layer.attention_ops.push_back(std::move(attention_op));
  }
  return {};
}

void TokenLevel::add_dead_slots(std::int64_t l, ValueSet& earlier, PackedLayer& layer) const {
  const auto nodes = analysis_->nodes(l + 1);
  const auto surviving = analysis_->escaping(nodes);
  for (const Node* node : nodes) {
    earlier.insert(node->outputs().begin(), node->outputs().end());
    for (const Value* value : node->outputs()) {
      const int slot = program_.slots.find(value);
      const bool survives = std::find(surviving.begin(), surviving.end(), value) != surviving.end();
      if (slot >= 0 && !survives) layer.dead.push_back(slot);
    }
  }
}

void TokenLevel::build_partial_embed() {
  if (!head_tokenwise_ && !head_chooses_) return;
  std::map<std::pair<int, int>, PartialEmbed::Output> wanted;
  const auto want = [&](int slot, int dim) { wanted[{slot, dim}] = {program_.slots.value(slot), slot, dim}; };
  want(program_.hidden[0], 1);
  for (const PackRule& rule : rules_) {
    want(rule.slot, rule.kind == PackRule::Kind::kRows && rule.dims.merged < 0 ? rule.dims.tokens : -1);
  }
  for (const PackedLayer& layer : layers_) {
    for (const PackedAttention& attention_op : layer.attention_ops) {
      for (std::size_t i = 0; i < attention_op.slots.size(); ++i) {
        const AttentionInput& input = attention_op.region.inputs[i];
        if (analysis_->dependent.count(input.value)) continue;
        want(attention_op.slots[i], input.role == Role::kSide ? input.query_dim : -1);
      }
    }
  }
  for (const int slot : head_of_rows_.in()) {
    if (program_.slots.value(slot) != analysis_->choice.node->output()) want(slot, -1);
  }
  std::vector<PartialEmbed::Output> outputs;
  std::set<int> cut;
  for (const auto& [key, output] : wanted) {
    // One cut a slot: a value that is needed along two of its dimensions is none that we know.
    if (output.dim >= 0 && !cut.insert(output.slot).second) return;
    outputs.push_back(output);
  }
  partial_embed_ = PartialEmbed::build(*analysis_, outputs);
}

bool TokenLevel::build_tokenwise_head() {
  const auto& analysis = *analysis_;
  const Value* result = analysis.flat.graph->outputs()[0];
  bool tokenwise = !analysis.result->empty();
  for (std::size_t i = 0; i < analysis.result->size() && tokenwise; ++i) {
    const auto dims = token_dims((*analysis.result)[i]);
    tokenwise = (dims.batch >= 0 && dims.tokens >= 0 && dims.merged == -1) ||
                (dims.merged >= 0 && dims.batch == -1 && dims.tokens == -1);
    result_dims_.push_back(dims);
  }
  std::vector<Node*> nodes;
  std::string reason;
  for (Node* node : analysis.nodes(analysis.flat.layers + 1)) {
    nodes.push_back(node);
    if (!is_pure(node) || accumulates_over_tokens(analysis, node)) tokenwise = false;
    for (const Value* output : node->outputs()) {
      const auto info = analysis.infos.find(output);
      if (info != analysis.infos.end() && analysis.dependent.count(output) && info->second.count(Kind::kTokens) > 1) {
        tokenwise = false;
      }
    }
  }
  if (!tokenwise) return false;
  packed_head_ = Subgraph("llmcache_packed_head", analysis.flat, nodes, {result}, program_.slots, program_.simple);
  return add_rules(packed_head_.in(), reason);
}

bool TokenLevel::build_choosing_head() {
  const auto& analysis = *analysis_;
  SplitHead split;
  if (analysis.choice.node == nullptr || !split_head(analysis, split)) return false;
  std::string reason;
  packed_head_ = Subgraph("llmcache_packed_head", analysis.flat, split.before, {analysis.choice.states()},
                          program_.slots, program_.simple);
  if (!add_rules(packed_head_.in(), reason)) return false;
  const Value* result = analysis.flat.graph->outputs()[0];
  head_of_rows_ =
      Subgraph("llmcache_head_of_rows", analysis.flat, split.behind, {result}, program_.slots, program_.simple);
  return true;
}

void TokenLevel::build_head(std::vector<std::string>& notes) {
  const auto& analysis = *analysis_;
  if (!analysis.result) return;
  head_tokenwise_ = build_tokenwise_head();
  head_chooses_ = !head_tokenwise_ && build_choosing_head();
  for (const int slot : program_.head.in()) {
    if (analysis.dependent.count(program_.slots.value(slot))) head_rows_.push_back(slot);
  }
  if (!head_tokenwise_ && !head_chooses_) {
    notes.push_back("the head is not token-wise: it runs on the padded batch");
  }
  check_side_outputs(notes);
}

/// What the head takes of the layers beside the last state has entries for the tokens that ran, and no others.
void TokenLevel::check_side_outputs(std::vector<std::string>& notes) {
  const auto of_tokens = [&](const Value* value) {
    if (!analysis_->dependent.count(value) || value == analysis_->hidden.back()) return false;
    const auto type = value->type()->kind();
    if (type == c10::TypeKind::ListType || type == c10::TypeKind::TupleType) return true;
    const auto info = analysis_->infos.find(value);
    return info != analysis_->infos.end() &&
           info->second.count(Kind::kTokens) + info->second.count(Kind::kBatchTokens) > 0;
  };
  const auto& slots = program_.head.in();
  if (std::none_of(slots.begin(), slots.end(), [&](int slot) { return of_tokens(program_.slots.value(slot)); })) return;
  partial_ = false;
  notes.emplace_back(
      "a sequence runs whole or not at all: what the layers make on their way (keys and values, or the state behind "
      "each of them) reaches the output, and exists only for tokens that run. For reuse of prefixes and tokens export "
      "the model without it: use_cache=False, output_hidden_states=False");
}

std::unique_ptr<TokenLevelModel> make_token_level(const std::shared_ptr<const Analysis>& analysis, Program& program,
                                                  std::vector<AttentionOp>& attention_ops,
                                                  std::vector<std::string>& notes) {
  auto model = std::make_unique<TokenLevel>(analysis, program);
  std::vector<AttentionOp> found;
  if (!model->build(found, notes)) return nullptr;
  attention_ops = std::move(found);
  return model;
}

}  // namespace llmcache::ts
