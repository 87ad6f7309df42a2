#include "model/torchscript_run.h"

#include <ATen/ATen.h>

#include "model/packing.h"
#include "model/tensors_of.h"

namespace llmcache::ts {

Run::Run(const TokenLevel& model, std::shared_ptr<Env> full, const at::Tensor& hidden, const PackedLayout& layout)
    : model_(model), full_(std::move(full)), env_(model.program_.slots.size()) {
  full_->resize(model.program_.slots.size());
  set_rows(layout, pack_rows(hidden, {0, 1, -1}, layout));
}

Run::Run(const TokenLevel& model, std::shared_ptr<Env> full, Env cut, const at::Tensor& positions,
         const PackedLayout& layout)
    : model_(model),
      full_(std::move(full)),
      cut_(std::move(cut)),
      positions_(positions),
      env_(model.program_.slots.size()) {
  const at::Tensor hidden = cut_[static_cast<std::size_t>(model.program_.hidden[0])].toTensor();
  set_rows(layout, pack_rows(hidden, {0, 1, -1}, narrowed(layout)));
}

/// The layout in tensors that are cut to positions_.
PackedLayout Run::narrowed(const PackedLayout& layout) const {
  PackedLayout narrow = layout;
  narrow.padded_length = positions_.size(0);
  narrow.position = at::searchsorted(positions_, layout.position);
  narrow.flat_index =
      layout.batch == 1
          ? narrow.position
          : layout.flat_index.div(layout.padded_length, "floor").mul(narrow.padded_length).add(narrow.position);
  return narrow;
}

void Run::set_rows(const PackedLayout& layout, at::Tensor hidden) {
  layout_ = layout;
  hidden_ = std::move(hidden);
  sides_.clear();
  pack_sides();
}

void Run::pack_sides() {
  const PackedLayout narrow = positions_.defined() ? narrowed(layout_) : PackedLayout{};
  for (const PackRule& rule : model_.rules_) {
    const auto slot = static_cast<std::size_t>(rule.slot);
    const c10::IValue& value = (*full_)[slot];
    switch (rule.kind) {
      case PackRule::Kind::kAsIs:
        env_[slot] = value;
        break;
      case PackRule::Kind::kFirstRow:
        env_[slot] = value.toTensor().narrow(rule.dims.batch, 0, rule.entries);
        break;
      case PackRule::Kind::kLength:
        env_[slot] = integer_like(value, length_of(rule.length, 1, layout_.rows));
        break;
      case PackRule::Kind::kRows:
        env_[slot] = cut_.empty() || cut_[slot].isNone() ? pack_rows(value.toTensor(), rule.dims, layout_)
                                                         : pack_rows(cut_[slot].toTensor(), rule.dims, narrow);
        break;
    }
  }
}

AttentionTensors Run::before(std::int64_t l, std::int64_t s) {
  const PackedLayer& layer = model_.at(l);
  if (s == 0) env_[static_cast<std::size_t>(model_.program_.hidden[static_cast<std::size_t>(l)])] = std::move(hidden_);
  layer.pieces[static_cast<std::size_t>(s)].run(model_.self_, env_);
  const PackedAttention& attention_op = layer.attention_ops[static_cast<std::size_t>(s)];
  AttentionTensors tensors;
  for (std::size_t i = 0; i < attention_op.slots.size(); ++i) {
    const Role role = attention_op.region.inputs[i].role;
    if (role != Role::kQuery && role != Role::kKey) continue;
    auto tensor = env_[static_cast<std::size_t>(attention_op.slots[i])].toTensor();
    (role == Role::kQuery ? tensors.queries : tensors.keys).push_back(std::move(tensor));
  }
  return tensors;
}

const c10::IValue& Run::side_of(const AttentionInput& input, int slot, std::size_t q) {
  const std::uint64_t key = static_cast<std::uint64_t>(slot) << 32 | q;
  const auto [it, fresh] = sides_.try_emplace(key);
  if (!fresh) return it->second;
  const PackedSequence& sequence = layout_.sequences[q];
  const bool narrow = positions_.defined() && input.query_dim >= 0;
  at::Tensor side = (narrow ? cut_ : *full_)[static_cast<std::size_t>(slot)].toTensor();
  if (input.batch_dim >= 0) {
    side = side.narrow(input.batch_dim, sequence.row * input.batch_factor, input.batch_factor);
  }
  if (input.key_dim >= 0) side = side.narrow(input.key_dim, sequence.first, sequence.tokens);
  if (narrow) {
    const auto wanted = sequence.active.defined()
                            ? sequence.active.add(sequence.first)
                            : at::arange(sequence.first, sequence.first + sequence.tokens, positions_.options());
    side = side.index_select(input.query_dim, at::searchsorted(positions_, wanted));
  } else if (input.query_dim >= 0) {
    side = side.narrow(input.query_dim, sequence.first, sequence.tokens);
    if (sequence.active.defined()) side = side.index_select(input.query_dim, sequence.active);
  }
  // What is not cut stays as the module itself sees it: it may be large (keys and values of a source).
  it->second = input.key_dim >= 0 || input.query_dim >= 0 ? side.contiguous() : side;
  return it->second;
}

const c10::IValue& Run::value_of(const AttentionInput& input, int slot) const {
  const bool packed = model_.analysis_->dependent.count(input.value) > 0;
  return packed ? env_[static_cast<std::size_t>(slot)] : (*full_)[static_cast<std::size_t>(slot)];
}

at::Tensor Run::attend(std::int64_t l, std::int64_t s, std::size_t q, const std::vector<at::Tensor>& queries,
                       const std::vector<KeySegment>& keys) {
  const PackedAttention& attention_op = model_.at(l).attention_ops[static_cast<std::size_t>(s)];
  const PackedSequence& sequence = layout_.sequences[q];
  if (attention_op.sdpa) {
    std::optional<at::Tensor> mask;
    if (attention_op.sdpa->mask >= 0) {
      const auto i = static_cast<std::size_t>(attention_op.sdpa->mask);
      const AttentionInput& input = attention_op.region.inputs[i];
      mask = input.role == Role::kSide ? side_of(input, attention_op.slots[i], q).toTensor()
                                       : value_of(input, attention_op.slots[i]).toTensor();
    }
    return llmcache::attend(attention_op.sdpa->settings, queries[0], keys, mask, sequence.active);
  }
  std::vector<c10::IValue> inputs;
  std::size_t next_query = 0;
  std::size_t next_key = 0;
  for (std::size_t i = 0; i < attention_op.slots.size(); ++i) {
    const AttentionInput& input = attention_op.region.inputs[i];
    switch (input.role) {
      case Role::kQuery:
        inputs.emplace_back(queries[next_query++]);
        break;
      case Role::kKey: {
        std::vector<at::Tensor> parts;
        for (const KeySegment& subgraph : keys) parts.push_back(subgraph.keys[next_key]);
        inputs.emplace_back(parts.size() == 1 ? parts[0] : at::cat(parts, input.token_dim));
        ++next_key;
        break;
      }
      case Role::kSide:
        inputs.push_back(side_of(input, attention_op.slots[i], q));
        break;
      case Role::kLength:
        inputs.push_back(
            integer_like(value_of(input, attention_op.slots[i]),
                         length_of(input.length, 1, input.length_of_keys ? sequence.tokens : sequence.rows)));
        break;
      case Role::kFixed:
        inputs.push_back(value_of(input, attention_op.slots[i]));
        break;
    }
  }
  return attention_op.subgraph.call(model_.self_, std::move(inputs)).toTensor();
}

void Run::after(std::int64_t l, std::int64_t s, at::Tensor attended) {
  const PackedAttention& attention_op = model_.at(l).attention_ops[static_cast<std::size_t>(s)];
  env_[static_cast<std::size_t>(attention_op.output_slot)] = std::move(attended);
}

void Run::finish(std::int64_t l) {
  const PackedLayer& layer = model_.at(l);
  const auto& hidden_slots = model_.program_.hidden;
  if (layer.attention_ops.empty()) env_[static_cast<std::size_t>(hidden_slots[static_cast<std::size_t>(l)])] = hidden_;
  layer.pieces.back().run(model_.self_, env_);
  hidden_ = env_[static_cast<std::size_t>(hidden_slots[static_cast<std::size_t>(l) + 1])].toTensor();
  for (const int slot : layer.dead) env_[static_cast<std::size_t>(slot)] = {};
}

/// What the head makes of one row a sequence. Rows of the batch that have none come out as anything.
c10::IValue Run::head_of_chosen(const PackedLayout& placed) {
  const TokenChoice& choice = model_.analysis_->choice;
  model_.packed_head_.run(model_.self_, env_);
  const at::Tensor& states = env_[static_cast<std::size_t>(model_.packed_head_.out()[0])].toTensor();
  const at::Tensor chosen = unpack_rows(states, {0, 1, -1}, placed);
  const int slot = model_.program_.slots.find(choice.node->output());
  (*full_)[static_cast<std::size_t>(slot)] = choice.keeps_dimension ? chosen : chosen.select(1, 0);
  model_.head_of_rows_.run(model_.self_, *full_);
  return std::move((*full_)[static_cast<std::size_t>(model_.head_of_rows_.out()[0])]);
}

c10::IValue Run::head(const PackedLayout& placed) {
  const auto final_slot = static_cast<std::size_t>(model_.program_.hidden.back());
  env_[final_slot] = hidden_;
  if (model_.head_tokenwise_) {
    model_.packed_head_.run(model_.self_, env_);
    auto result = std::move(env_[static_cast<std::size_t>(model_.packed_head_.out()[0])]);
    std::size_t leaf = 0;
    return map_tensors(
        result, [&](const at::Tensor& packed) { return unpack_rows(packed, model_.result_dims_.at(leaf++), placed); });
  }
  if (model_.head_chooses_) return head_of_chosen(placed);
  // Not token-wise: on the padded batch.
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

}  // namespace llmcache::ts
