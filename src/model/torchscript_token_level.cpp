// Token-level operation of a TorchScript module: its layers, cut at the attention sites, run on
// packed rows.
#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <numeric>

#include "llmcache/error.h"
#include "model/packing.h"
#include "model/tensors_of.h"
#include "model/torchscript_sites.h"

namespace llmcache::ts {
namespace {

using Kind = Label::Kind;

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

/// An integer as the graph has it: a number or a 0-dimensional tensor like `sample`.
c10::IValue integer_like(const c10::IValue& sample, std::int64_t value) {
  if (!sample.isTensor()) return value;
  return at::scalar_tensor(value, sample.toTensor().options());
}

TokenDims token_dims(const ValueInfo& info) {
  TokenDims dims{info.only(Kind::kBatch), info.only(Kind::kTokens), info.only(Kind::kBatchTokens)};
  return dims;
}

/// A value from before the layers as the packed segments need it.
struct PackRule {
  enum class Kind { kAsIs, kRows, kLength };
  int slot = -1;
  Kind kind = Kind::kAsIs;
  TokenDims dims;
  Label length;
};

/// The arguments of an sdpa node that are not tensors of the request.
struct SdpaSettings {
  bool causal = false;
  std::optional<double> scale;
  bool grouped = false;
};

std::optional<SdpaSettings> sdpa_settings(const Node* node) {
  if (node->inputs().size() != 8) return std::nullopt;
  const auto dropout = torch::jit::constant_as<double>(node->input(4));
  const auto causal = torch::jit::constant_as<bool>(node->input(5));
  const auto scale = torch::jit::toIValue(node->input(6));
  const auto grouped = torch::jit::constant_as<bool>(node->input(7));
  if (!dropout || *dropout != 0.0 || !causal || !scale || !grouped) return std::nullopt;
  SdpaSettings settings;
  settings.causal = *causal;
  if (scale->isDouble()) settings.scale = scale->toDouble();
  settings.grouped = *grouped;
  return settings;
}

struct Site {
  Region region;
  Segment segment;
  std::vector<int> slots;  ///< of region.inputs
  int output_slot = -1;
  std::optional<SdpaSettings> sdpa;  ///< call the operator itself: q, k, v are inputs 0, 1, 2
  int sdpa_mask = -1;                ///< its input for the mask; -1: none
  std::vector<std::int64_t> query_dims, key_dims;
};

struct PackedLayer {
  std::vector<Segment> pieces;
  std::vector<Site> sites;
  std::vector<int> dead;  ///< slots of values that no later layer and no head reads
};

class TokenLevel;

class Run final : public TokenRun {
 public:
  Run(const TokenLevel& model, std::shared_ptr<Env> full, const at::Tensor& hidden, const PackedLayout& layout);

  void set_rows(const PackedLayout& layout, at::Tensor hidden) override;
  const at::Tensor& hidden() const override { return hidden_; }
  SiteTensors before(std::int64_t l, std::int64_t s) override;
  at::Tensor attend(std::int64_t l, std::int64_t s, std::size_t q, const SiteTensors& site) override;
  void after(std::int64_t l, std::int64_t s, at::Tensor attended) override;
  void finish(std::int64_t l) override;
  c10::IValue head() override;

 private:
  void pack_sides();
  const c10::IValue& side_of(const SiteInput& input, int slot, std::size_t q);
  const c10::IValue& value_of(const SiteInput& input, int slot) const;

  const TokenLevel& model_;
  std::shared_ptr<Env> full_;  ///< values from before the layers, batch by tokens
  Env env_;                    ///< values of the packed segments
  PackedLayout layout_;
  at::Tensor hidden_;
  std::unordered_map<std::uint64_t, c10::IValue> sides_;  ///< by slot and sequence, reused by all layers
};

class TokenLevel final : public TokenLevelModel {
 public:
  TokenLevel(std::shared_ptr<const Analysis> analysis, Program& program)
      : analysis_(std::move(analysis)), program_(program), self_(analysis_->module._ivalue()) {}

  /// False with a reason if some layer cannot be split.
  bool build(std::vector<AttentionSite>& sites, std::vector<std::string>& notes);

  std::int64_t sites(std::int64_t layer) const override { return static_cast<std::int64_t>(at(layer).sites.size()); }
  const std::vector<std::int64_t>& query_dims(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].query_dims;
  }
  const std::vector<std::int64_t>& key_dims(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].key_dims;
  }
  std::int64_t output_dim(std::int64_t layer, std::int64_t site) const override {
    return at(layer).sites[static_cast<std::size_t>(site)].region.output_dim;
  }
  bool partial() const override { return partial_; }
  bool head_tokenwise() const override { return head_tokenwise_; }
  bool self_contained() const override { return self_contained_; }

  std::unique_ptr<TokenRun> start(const Activations& embedded, const PackedLayout& layout) const override {
    return std::make_unique<Run>(*this, std::static_pointer_cast<Env>(embedded.context), embedded.hidden, layout);
  }

 private:
  friend class Run;
  const PackedLayer& at(std::int64_t layer) const { return layers_.at(static_cast<std::size_t>(layer)); }
  bool add_rules(const std::vector<int>& slots, std::string& reason);
  bool find_roles(Site& site, const std::unordered_map<const Value*, c10::IValue>& values, std::string& reason);
  bool try_roles(const Site& site, const std::unordered_map<const Value*, c10::IValue>& values, bool partial) const;
  void build_head(std::vector<std::string>& notes);

  std::shared_ptr<const Analysis> analysis_;
  Program& program_;
  c10::IValue self_;
  std::vector<PackedLayer> layers_;
  std::vector<PackRule> rules_;
  std::unordered_set<int> ruled_;
  Segment packed_head_;
  std::vector<int> head_rows_;          ///< slots of per-token values that the dense head needs
  std::vector<TokenDims> result_dims_;  ///< of the tensors in the result
  bool partial_ = true;
  bool head_tokenwise_ = false;
  bool self_contained_ = true;
};

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
      if (info.integer.kind != Kind::kConstant && info.integer.kind != Kind::kUnknown) {
        rule.kind = PackRule::Kind::kLength;
        rule.length = info.integer;
      }
    } else {
      rule.dims = token_dims(info);
      const bool batch = rule.dims.batch != -1;
      const bool tokens = rule.dims.tokens != -1 || rule.dims.merged != -1;
      const bool clear = rule.dims.batch != -2 && rule.dims.tokens != -2 && rule.dims.merged != -2 &&
                         info.count(Kind::kUnknown) == 0 &&
                         (rule.dims.merged == -1 || (!batch && rule.dims.tokens == -1));
      if (!clear || (batch && !tokens)) {
        reason = fmt::format("'{}', which it needs, is neither per token nor the same for all", value->debugName());
        return false;
      }
      if (tokens) rule.kind = PackRule::Kind::kRows;
    }
    rules_.push_back(rule);
  }
  return true;
}

bool TokenLevel::build(std::vector<AttentionSite>& sites, std::vector<std::string>& notes) {
  const auto& analysis = *analysis_;
  const auto layers = analysis.flat.layers;
  std::string reason;
  if (!analysis.obstacle.empty()) {
    notes.push_back("token-level reuse is not available: " + analysis.obstacle);
    return false;
  }
  const auto values = run_all(analysis.flat, analysis.module, probe_inputs(analysis, 1, 5));
  std::unordered_set<const Value*> earlier;  // hidden-dependent values of layers before
  for (std::int64_t l = 0; l < layers; ++l) {
    const auto give_up = [&] {
      notes.push_back(
          fmt::format("token-level reuse is not available: layer {} cannot be split at its attention: {}", l, reason));
      return false;
    };
    auto split = split_layer(analysis, l + 1, reason);
    if (!split) return give_up();
    PackedLayer layer;
    for (std::size_t p = 0; p < split->pieces.size(); ++p) {
      const auto& nodes = split->pieces[p];
      auto outputs = analysis.escaping(nodes);
      layer.pieces.emplace_back(fmt::format("llmcache_layer_{}_piece_{}", l, p), analysis.flat, nodes, outputs,
                                program_.slots);
      if (!add_rules(layer.pieces.back().in(), reason)) return give_up();
      for (const Value* value : external_inputs(analysis.flat, nodes)) {
        if (earlier.count(value) && value != analysis.hidden[static_cast<std::size_t>(l)]) self_contained_ = false;
      }
    }
    for (std::size_t s = 0; s < split->regions.size(); ++s) {
      Site site;
      site.region = std::move(split->regions[s]);
      site.segment = Segment(fmt::format("llmcache_layer_{}_attention_{}", l, s), analysis.flat, site.region.nodes,
                             {site.region.output}, program_.slots);
      for (const SiteInput& input : site.region.inputs) site.slots.push_back(program_.slots.of(input.value));
      site.output_slot = program_.slots.of(site.region.output);
      if (!find_roles(site, values, reason)) return give_up();
      for (const SiteInput& input : site.region.inputs) {
        if (input.role == Role::kQuery) site.query_dims.push_back(input.token_dim);
        if (input.role == Role::kKey) site.key_dims.push_back(input.token_dim);
        if (earlier.count(input.value)) self_contained_ = false;
      }
      sites.push_back({l, site.region.sdpa ? "sdpa" : "eager", site.query_dims.size(), site.key_dims.size()});
      layer.sites.push_back(std::move(site));
    }
    const auto nodes = analysis.nodes(l + 1);
    const auto surviving = analysis.escaping(nodes);
    for (const Node* node : nodes) {
      earlier.insert(node->outputs().begin(), node->outputs().end());
      for (const Value* value : node->outputs()) {
        const int slot = program_.slots.find(value);
        const bool survives = std::find(surviving.begin(), surviving.end(), value) != surviving.end();
        if (slot >= 0 && !survives) layer.dead.push_back(slot);
      }
    }
    layers_.push_back(std::move(layer));
  }
  if (sites.empty()) {
    notes.push_back("token-level reuse is not available: no attention was found in the layers");
    return false;
  }
  if (!partial_) notes.push_back("attention needs as many queries as keys: a sequence runs whole or not at all");
  if (!self_contained_) {
    notes.push_back("layers use values of other layers than the one before: all layers run the same tokens");
  }
  build_head(notes);
  return true;
}

void TokenLevel::build_head(std::vector<std::string>& notes) {
  const auto& analysis = *analysis_;
  // What the result looks like on three shapes.
  std::vector<std::vector<at::Tensor>> leaves;
  const Value* result = analysis.flat.graph->outputs()[0];
  for (const auto& shape : kLabelShapes) {
    auto inputs = probe_inputs(analysis, shape[0], shape[1]);
    auto values = run_all(analysis.flat, analysis.module, inputs);
    leaves.push_back(tensors_of(values.at(result)));
  }
  bool tokenwise = !leaves[0].empty();
  for (std::size_t i = 0; i < leaves[0].size() && tokenwise; ++i) {
    std::vector<std::unordered_map<const Value*, c10::IValue>> seen;
    for (const auto& run : leaves) {
      if (run.size() != leaves[0].size()) return;
      seen.push_back({{result, run[i]}});
    }
    const auto info = label_values_from(seen).at(result);
    const auto dims = token_dims(info);
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
  if (tokenwise) {
    packed_head_ = Segment("llmcache_packed_head", analysis.flat, nodes, {result}, program_.slots);
    head_tokenwise_ = add_rules(packed_head_.in(), reason);
  }
  for (const int slot : program_.head.in()) {
    if (analysis.dependent.count(program_.slots.value(slot))) head_rows_.push_back(slot);
  }
  if (!head_tokenwise_) notes.push_back("the head is not token-wise: it runs on the padded batch");
}

bool TokenLevel::try_roles(const Site& site, const std::unordered_map<const Value*, c10::IValue>& values,
                           bool partial) const {
  // One sequence of 5 tokens, of which some are active: the rows must come out as in the full run.
  const std::int64_t tokens = 5;
  const auto device = values.at(site.region.output).toTensor().device();
  const auto rows = partial ? at::tensor({1, 2, 4}, at::TensorOptions().dtype(at::kLong)).to(device)
                            : at::arange(tokens, at::TensorOptions().dtype(at::kLong).device(device));
  std::vector<c10::IValue> inputs;
  for (const SiteInput& input : site.region.inputs) {
    const c10::IValue& value = values.at(input.value);
    switch (input.role) {
      case Role::kQuery:
        inputs.emplace_back(value.toTensor().index_select(input.token_dim, rows));
        break;
      case Role::kSide: {
        at::Tensor side = value.toTensor();
        if (input.query_dim >= 0) side = side.index_select(input.query_dim, rows);
        inputs.emplace_back(side);
        break;
      }
      case Role::kLength:
        inputs.push_back(integer_like(value, length_of(input.length, 1, input.length_of_keys ? tokens : rows.size(0))));
        break;
      default:
        inputs.push_back(value);
    }
  }
  try {
    const auto got = site.segment.call(self_, std::move(inputs)).toTensor();
    const auto want = values.at(site.region.output).toTensor().index_select(site.region.output_dim, rows);
    return got.sizes() == want.sizes() && nearly_equal(got, want);
  } catch (const std::exception&) {
    return false;
  }
}

bool TokenLevel::find_roles(Site& site, const std::unordered_map<const Value*, c10::IValue>& values,
                            std::string& reason) {
  auto& inputs = site.region.inputs;
  std::vector<SiteInput*> open;  // inputs that are either on the query or on the key side
  for (SiteInput& input : inputs) {
    const bool single_side = input.role == Role::kSide && (input.query_dim < 0) != (input.key_dim < 0);
    if (input.role == Role::kKey || input.role == Role::kLength || single_side) open.push_back(&input);
  }
  if (open.size() > 10) {
    reason = fmt::format("its attention has {} inputs per token", open.size());
    return false;
  }
  // Start from the usual order (query first, all else keys), and from what find_inputs guessed of
  // single-sided inputs; bit i flips input i.
  for (std::size_t i = 0; i < open.size(); ++i) {
    if (open[i]->role == Role::kKey) {
      open[i]->role = Role::kQuery;
      break;
    }
  }
  const auto start = inputs;
  std::vector<unsigned> order(std::size_t{1} << open.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [](unsigned a, unsigned b) { return __builtin_popcount(a) < __builtin_popcount(b); });
  for (const bool partial : {true, false}) {
    for (const unsigned flips : order) {
      inputs = start;
      bool has_query = false;
      bool has_key = false;
      for (std::size_t i = 0; i < open.size(); ++i) {
        SiteInput& input = *open[i];
        if (flips >> i & 1U) {
          if (input.role == Role::kQuery)
            input.role = Role::kKey;
          else if (input.role == Role::kKey)
            input.role = Role::kQuery;
          else if (input.role == Role::kLength)
            input.length_of_keys = !input.length_of_keys;
          else
            std::swap(input.query_dim, input.key_dim);
        }
        has_query = has_query || input.role == Role::kQuery;
        has_key = has_key || input.role == Role::kKey;
      }
      if (!has_query || !has_key || !try_roles(site, values, partial)) continue;
      site.region.partial = partial;
      partial_ = partial_ && partial;
      if (site.region.sdpa) {
        const Node* node = site.region.nodes[0];
        site.sdpa = sdpa_settings(node);
        if (site.sdpa) {
          // The operator takes its tensors in this order, so external_inputs lists them so.
          const bool plain = inputs.size() >= 3 && inputs[0].value == node->input(0) &&
                             inputs[1].value == node->input(1) && inputs[2].value == node->input(2) &&
                             inputs[0].role == Role::kQuery && inputs[1].role == Role::kKey &&
                             inputs[2].role == Role::kKey && inputs.size() <= 4;
          if (!plain)
            site.sdpa.reset();
          else if (inputs.size() == 4 && (inputs[3].role == Role::kSide || inputs[3].role == Role::kFixed))
            site.sdpa_mask = 3;
          else if (inputs.size() == 4)
            site.sdpa.reset();
          else if (!torch::jit::toIValue(node->input(3)) || !torch::jit::toIValue(node->input(3))->isNone())
            site.sdpa.reset();
        }
      }
      return true;
    }
  }
  reason = "its attention could not be reproduced one sequence at a time";
  return false;
}

Run::Run(const TokenLevel& model, std::shared_ptr<Env> full, const at::Tensor& hidden, const PackedLayout& layout)
    : model_(model), full_(std::move(full)), env_(model.program_.slots.size()) {
  full_->resize(model.program_.slots.size());
  set_rows(layout, pack_rows(hidden, {0, 1, -1}, layout));
}

void Run::set_rows(const PackedLayout& layout, at::Tensor hidden) {
  layout_ = layout;
  hidden_ = std::move(hidden);
  sides_.clear();
  pack_sides();
}

void Run::pack_sides() {
  for (const PackRule& rule : model_.rules_) {
    const auto slot = static_cast<std::size_t>(rule.slot);
    const c10::IValue& value = (*full_)[slot];
    switch (rule.kind) {
      case PackRule::Kind::kAsIs:
        env_[slot] = value;
        break;
      case PackRule::Kind::kLength:
        env_[slot] = integer_like(value, length_of(rule.length, 1, layout_.rows));
        break;
      case PackRule::Kind::kRows:
        env_[slot] = pack_rows(value.toTensor(), rule.dims, layout_);
        break;
    }
  }
}

SiteTensors Run::before(std::int64_t l, std::int64_t s) {
  const PackedLayer& layer = model_.at(l);
  if (s == 0) env_[static_cast<std::size_t>(model_.program_.hidden[static_cast<std::size_t>(l)])] = std::move(hidden_);
  layer.pieces[static_cast<std::size_t>(s)].run(model_.self_, env_);
  const Site& site = layer.sites[static_cast<std::size_t>(s)];
  SiteTensors tensors;
  for (std::size_t i = 0; i < site.slots.size(); ++i) {
    const Role role = site.region.inputs[i].role;
    if (role != Role::kQuery && role != Role::kKey) continue;
    auto tensor = env_[static_cast<std::size_t>(site.slots[i])].toTensor();
    (role == Role::kQuery ? tensors.queries : tensors.keys).push_back(std::move(tensor));
  }
  return tensors;
}

const c10::IValue& Run::side_of(const SiteInput& input, int slot, std::size_t q) {
  const std::uint64_t key = static_cast<std::uint64_t>(slot) << 32 | q;
  const auto [it, fresh] = sides_.try_emplace(key);
  if (!fresh) return it->second;
  const PackedSequence& sequence = layout_.sequences[q];
  at::Tensor side = (*full_)[static_cast<std::size_t>(slot)].toTensor();
  if (input.batch_dim >= 0) {
    side = side.narrow(input.batch_dim, sequence.row * input.batch_factor, input.batch_factor);
  }
  if (input.key_dim >= 0) side = side.narrow(input.key_dim, sequence.first, sequence.tokens);
  if (input.query_dim >= 0) {
    side = side.narrow(input.query_dim, sequence.first, sequence.tokens);
    if (sequence.active.defined()) side = side.index_select(input.query_dim, sequence.active);
  }
  it->second = side.contiguous();
  return it->second;
}

const c10::IValue& Run::value_of(const SiteInput& input, int slot) const {
  const bool packed = model_.analysis_->dependent.count(input.value) > 0;
  return packed ? env_[static_cast<std::size_t>(slot)] : (*full_)[static_cast<std::size_t>(slot)];
}

at::Tensor Run::attend(std::int64_t l, std::int64_t s, std::size_t q, const SiteTensors& tensors) {
  const Site& site = model_.at(l).sites[static_cast<std::size_t>(s)];
  const PackedSequence& sequence = layout_.sequences[q];
  if (site.sdpa) {
    std::optional<at::Tensor> mask;
    if (site.sdpa_mask >= 0) {
      const auto i = static_cast<std::size_t>(site.sdpa_mask);
      const SiteInput& input = site.region.inputs[i];
      mask = input.role == Role::kSide ? side_of(input, site.slots[i], q).toTensor()
                                       : value_of(input, site.slots[i]).toTensor();
    }
    bool causal = site.sdpa->causal;
    if (causal && sequence.active.defined()) {
      const auto positions = at::arange(sequence.tokens, sequence.active.options());
      mask = positions.unsqueeze(0).le(sequence.active.unsqueeze(1));
      causal = false;
    }
    return at::scaled_dot_product_attention(tensors.queries[0], tensors.keys[0], tensors.keys[1], mask, 0.0, causal,
                                            site.sdpa->scale, site.sdpa->grouped);
  }
  std::vector<c10::IValue> inputs;
  std::size_t queries = 0;
  std::size_t keys = 0;
  for (std::size_t i = 0; i < site.slots.size(); ++i) {
    const SiteInput& input = site.region.inputs[i];
    switch (input.role) {
      case Role::kQuery:
        inputs.emplace_back(tensors.queries[queries++]);
        break;
      case Role::kKey:
        inputs.emplace_back(tensors.keys[keys++]);
        break;
      case Role::kSide:
        inputs.push_back(side_of(input, site.slots[i], q));
        break;
      case Role::kLength:
        inputs.push_back(
            integer_like(value_of(input, site.slots[i]),
                         length_of(input.length, 1, input.length_of_keys ? sequence.tokens : sequence.rows)));
        break;
      case Role::kFixed:
        inputs.push_back(value_of(input, site.slots[i]));
        break;
    }
  }
  return site.segment.call(model_.self_, std::move(inputs)).toTensor();
}

void Run::after(std::int64_t l, std::int64_t s, at::Tensor attended) {
  const Site& site = model_.at(l).sites[static_cast<std::size_t>(s)];
  env_[static_cast<std::size_t>(site.output_slot)] = std::move(attended);
}

void Run::finish(std::int64_t l) {
  const PackedLayer& layer = model_.at(l);
  const auto& hidden_slots = model_.program_.hidden;
  if (layer.sites.empty()) env_[static_cast<std::size_t>(hidden_slots[static_cast<std::size_t>(l)])] = hidden_;
  layer.pieces.back().run(model_.self_, env_);
  hidden_ = env_[static_cast<std::size_t>(hidden_slots[static_cast<std::size_t>(l) + 1])].toTensor();
  for (const int slot : layer.dead) env_[static_cast<std::size_t>(slot)] = {};
}

c10::IValue Run::head() {
  const auto final_slot = static_cast<std::size_t>(model_.program_.hidden.back());
  env_[final_slot] = hidden_;
  if (model_.head_tokenwise_) {
    model_.packed_head_.run(model_.self_, env_);
    auto result = std::move(env_[static_cast<std::size_t>(model_.packed_head_.out()[0])]);
    std::size_t leaf = 0;
    return map_tensors(
        result, [&](const at::Tensor& packed) { return unpack_rows(packed, model_.result_dims_.at(leaf++), layout_); });
  }
  for (const int slot : model_.head_rows_) {
    const auto i = static_cast<std::size_t>(slot);
    const auto& info = model_.analysis_->infos.at(model_.program_.slots.value(slot));
    (*full_)[i] = info.is_tensor() && !info.is_scalar()
                      ? c10::IValue(unpack_rows(env_[i].toTensor(), token_dims(info), layout_))
                      : env_[i];
  }
  model_.program_.head.run(model_.self_, *full_);
  return std::move((*full_)[static_cast<std::size_t>(model_.program_.head.out()[0])]);
}

}  // namespace

std::unique_ptr<TokenLevelModel> make_token_level(const std::shared_ptr<const Analysis>& analysis, Program& program,
                                                  std::vector<AttentionSite>& sites, std::vector<std::string>& notes) {
  auto model = std::make_unique<TokenLevel>(analysis, program);
  std::vector<AttentionSite> found;
  if (!model->build(found, notes)) return nullptr;
  sites = std::move(found);
  return model;
}

}  // namespace llmcache::ts
