// Which input of an attention operator is what: found by trying.
#include <ATen/ATen.h>
#include <fmt/core.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <numeric>

#include "model/index_tensor.h"
#include "model/torchscript_run.h"
#include "model/torchscript_token_level.h"

namespace llmcache::ts {

bool TokenLevel::try_roles(const PackedAttention& attention_op, const Values& values, bool partial) const {
  // One sequence of 5 tokens, of which some are active: the rows must come out as in the full run.
  const std::int64_t tokens = 5;
  const auto device = values.at(attention_op.region.output).toTensor().device();
  const auto rows = partial ? index_tensor({1, 2, 4}, device)
                            : at::arange(tokens, at::TensorOptions().dtype(at::kLong).device(device));
  std::vector<c10::IValue> inputs;
  for (const AttentionInput& input : attention_op.region.inputs) {
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
    const auto got = attention_op.subgraph.call(self_, std::move(inputs)).toTensor();
    const auto want =
        values.at(attention_op.region.output).toTensor().index_select(attention_op.region.output_dim, rows);
    return got.sizes() == want.sizes() && nearly_equal(got, want);
  } catch (const std::exception&) {
    return false;
  }
}

std::optional<SdpaOp> TokenLevel::find_sdpa(const PackedAttention& attention_op, const Values& values) const {
  const Node* node = attention_op.region.sdpa;
  const auto& inputs = attention_op.region.inputs;
  if (node->inputs().size() != 8) return std::nullopt;
  const auto dropout = torch::jit::constant_as<double>(node->input(4));
  const auto causal = torch::jit::constant_as<bool>(node->input(5));
  const auto scale = torch::jit::toIValue(node->input(6));
  if (!dropout || *dropout != 0.0 || !causal || !scale || (!scale->isNone() && !scale->isDouble())) return std::nullopt;
  SdpaOp found;
  found.settings.causal = *causal;
  if (scale->isDouble()) found.settings.scale = scale->toDouble();
  std::size_t known = 0;
  const auto index_of = [&](const Value* value, Role role) -> std::optional<std::size_t> {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].value != value || inputs[i].role != role) continue;
      ++known;
      return i;
    }
    return std::nullopt;
  };
  const auto query = index_of(node->input(0), Role::kQuery);
  const auto key = index_of(attention_op.region.keys, Role::kKey);
  const auto value = index_of(attention_op.region.values, Role::kKey);
  if (!query || !key || !value || *value < *key) return std::nullopt;
  found.query = *query;
  found.key = *key;
  found.value = *value;
  const auto constant = torch::jit::toIValue(node->input(3));
  if (!constant || !constant->isNone()) {
    auto mask = index_of(node->input(3), Role::kSide);
    if (!mask) mask = index_of(node->input(3), Role::kFixed);
    if (!mask) return std::nullopt;
    found.mask = static_cast<int>(*mask);
  }
  for (const AttentionInput& input : inputs) {
    if (input.role == Role::kQuery || input.role == Role::kKey) continue;
    if (input.role == Role::kSide && found.mask < 0) return std::nullopt;
  }
  const auto tensors =
      static_cast<std::size_t>(std::count_if(inputs.begin(), inputs.end(), [](const AttentionInput& input) {
        return input.role == Role::kQuery || input.role == Role::kKey || input.role == Role::kSide;
      }));
  if (tensors > known) return std::nullopt;
  if (!analysis_->findings->ask([&] { return sdpa_agrees(attention_op, found, values); })) return std::nullopt;
  return found;
}

/// Does the operator give what the graph gives, from keys whose heads are not repeated yet?
bool TokenLevel::sdpa_agrees(const PackedAttention& attention_op, const SdpaOp& found, const Values& values) const {
  const auto& inputs = attention_op.region.inputs;
  try {
    const auto tensor = [&](std::size_t i) { return values.at(inputs[i].value).toTensor(); };
    std::optional<at::Tensor> mask;
    if (found.mask >= 0) mask = tensor(static_cast<std::size_t>(found.mask));
    for (const auto i : {found.query, found.key, found.value}) {
      if (tensor(i).dim() != 4 || tensor(i).size(0) != 1 || inputs[i].token_dim != 2) return false;
    }
    const auto got = attend(found.settings, tensor(found.query),
                            {{tensor(found.key).size(2), {tensor(found.key), tensor(found.value)}}}, mask, {});
    return nearly_equal(got, values.at(attention_op.region.output).toTensor());
  } catch (const std::exception&) {
    return false;
  }
}

const Values& TokenLevel::values_of_layer(std::int64_t l) {
  const FlatGraph& flat = analysis_->flat;
  if (analysis_->findings->known || l < layers_of_values_) return values_;
  // Layers are mostly alike, and then the first tells of all.
  layers_of_values_ = layers_of_values_ == 0 ? l + 1 : flat.layers;
  const auto wanted = [&](const Node* node) { return flat.part.at(node) <= layers_of_values_; };
  values_ = run_some(flat, analysis_->module, probe_inputs(*analysis_, 1, 5), wanted);
  return values_;
}

bool TokenLevel::alike(const PackedAttention& a, const PackedAttention& b) const {
  const Region& left = a.region;
  const Region& right = b.region;
  if (!a.subgraph.same_without_weights(b.subgraph) || left.inputs.size() != right.inputs.size()) return false;
  if ((left.sdpa == nullptr) != (right.sdpa == nullptr) || left.output_dim != right.output_dim) return false;
  for (std::size_t i = 0; i < left.inputs.size(); ++i) {
    const Value* one = left.inputs[i].value;
    const Value* other = right.inputs[i].value;
    if (analysis_->dependent.count(one) != analysis_->dependent.count(other)) return false;
    if (!(analysis_->infos.at(one) == analysis_->infos.at(other))) return false;
    if ((one == left.keys) != (other == right.keys) || (one == left.values) != (other == right.values)) return false;
  }
  return true;
}

bool TokenLevel::take_roles(PackedAttention& attention_op) {
  for (const PackedLayer& layer : layers_) {
    for (const PackedAttention& known : layer.attention_ops) {
      if (!alike(known, attention_op)) continue;
      auto& inputs = attention_op.region.inputs;
      for (std::size_t i = 0; i < inputs.size(); ++i) {
        const Value* own = inputs[i].value;
        inputs[i] = known.region.inputs[i];
        inputs[i].value = own;
      }
      attention_op.region.partial = known.region.partial;
      attention_op.sdpa = known.sdpa;
      return true;
    }
  }
  return false;
}

namespace {

constexpr std::size_t kMostOpen = 10;  ///< inputs of a region whose roles are found by trying

/// The other role that an input may have.
void flip(AttentionInput& input) {
  switch (input.role) {
    case Role::kQuery:
      input.role = Role::kKey;
      break;
    case Role::kKey:
      input.role = Role::kQuery;
      break;
    case Role::kLength:
      input.length_of_keys = !input.length_of_keys;
      break;
    default:
      std::swap(input.query_dim, input.key_dim);
  }
}

}  // namespace

bool TokenLevel::find_roles(std::int64_t l, PackedAttention& attention_op, std::string& reason) {
  const Values& values = values_of_layer(l);
  auto& inputs = attention_op.region.inputs;
  std::vector<AttentionInput*> open;  // inputs that are either on the query or on the key side
  for (AttentionInput& input : inputs) {
    const bool single_side = input.role == Role::kSide && (input.query_dim < 0) != (input.key_dim < 0);
    if (input.role == Role::kKey || input.role == Role::kLength || single_side) open.push_back(&input);
  }
  if (open.size() > kMostOpen) {
    reason = fmt::format("its attention has {} inputs per token", open.size());
    return false;
  }
  // Of pairs of tokens the first dimension is usually the queries'. Whether it is matters only where they are fewer.
  const std::size_t usual = open.size();
  for (AttentionInput& input : inputs) {
    const bool pairs = input.role == Role::kSide && input.query_dim >= 0 && input.key_dim >= 0;
    if (pairs && open.size() < kMostOpen) open.push_back(&input);
  }
  // Start from the usual order (query first, all else keys), and from what find_inputs guessed of
  // single-sided inputs; bit i flips input i.
  for (std::size_t i = 0; i < open.size(); ++i) {
    if (open[i]->role == Role::kKey) {
      open[i]->role = Role::kQuery;
      break;
    }
  }
  // Attention to the source: its keys are the same for all of the sequence's tokens.
  const bool reads_source = std::any_of(inputs.begin(), inputs.end(), [&](const AttentionInput& input) {
    return input.role == Role::kSide && analysis_->infos.at(input.value).count(Label::Kind::kSource) > 0;
  });
  const auto start = inputs;
  std::vector<unsigned> order(std::size_t{1} << open.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [](unsigned a, unsigned b) { return __builtin_popcount(a) < __builtin_popcount(b); });
  struct Attempt {
    bool partial, other_pairs;
  };
  for (const Attempt& attempt : {Attempt{true, false}, Attempt{true, true}, Attempt{false, false}}) {
    for (const unsigned flips : order) {
      if ((flips >> usual != 0) != attempt.other_pairs) continue;
      inputs = start;
      bool has_query = false;
      bool has_key = false;
      for (std::size_t i = 0; i < open.size(); ++i) {
        AttentionInput& input = *open[i];
        if (flips >> i & 1U) flip(input);
        has_query = has_query || input.role == Role::kQuery;
        has_key = has_key || input.role == Role::kKey;
      }
      const auto tried = [&] { return try_roles(attention_op, values, attempt.partial); };
      if (!has_query || !(has_key || reads_source) || !analysis_->findings->ask(tried)) continue;
      attention_op.region.partial = attempt.partial;
      partial_ = partial_ && attempt.partial;
      if (attention_op.region.sdpa != nullptr) attention_op.sdpa = find_sdpa(attention_op, values);
      return true;
    }
  }
  reason = "its attention could not be reproduced one sequence at a time";
  return false;
}

}  // namespace llmcache::ts
