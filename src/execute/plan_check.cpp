#include "execute/plan_check.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include "llmcache/error.h"

namespace llmcache {
namespace {

/// Are these the key-side tensors of layer l, over `tokens` tokens?
bool fits(const TokenLevelModel& model, const std::vector<std::vector<at::Tensor>>& attention_ops, std::int64_t l,
          std::int64_t tokens) {
  if (static_cast<std::int64_t>(attention_ops.size()) != model.attention_ops(l)) return false;
  for (std::size_t s = 0; s < attention_ops.size(); ++s) {
    const auto& dims = model.key_dims(l, static_cast<std::int64_t>(s));
    if (attention_ops[s].size() != dims.size()) return false;
    for (std::size_t i = 0; i < dims.size(); ++i) {
      const at::Tensor& key = attention_ops[s][i];
      if (!key.defined() || key.dim() <= dims[i] || key.size(dims[i]) != tokens) return false;
    }
  }
  return true;
}

void check_granularity(const Model& model, const ModelProfile& profile) {
  if (profile.granularity == Granularity::kWholeLayers || model.token_level() == nullptr) {
    throw Error(ErrorCode::kNotAvailable, "this model runs whole layers only; its profile says why");
  }
}

void check_padding(const Batch& batch, const ModelProfile& profile) {
  if (!batch.contiguous) throw Error(ErrorCode::kInvalidInput, "the mask has holes: such a batch cannot be packed");
  if (!batch.reads_real_tokens()) {
    throw Error(
        ErrorCode::kNotAvailable,
        "the output of a row is read at its padding, of which nothing is computed in a packed batch: pad with the "
        "id that the model takes for padding");
  }
  if (!batch.right_padded && !profile.left_padding) {
    throw Error(ErrorCode::kNotAvailable, "this model's left-padded batches are not packed; its profile says why");
  }
}

}  // namespace

void check_packable(const Batch& batch, const Model& model, const ModelProfile& profile) {
  check_granularity(model, profile);
  check_padding(batch, profile);
}

void check_plan(const Plan& plan, const Batch& batch, const Model& model, const ModelProfile& profile,
                const Donors& donors) {
  const auto invalid = [](const std::string& what) { throw Error(ErrorCode::kInvalidOptions, "plan: " + what); };
  plan.validate(donors.size());
  if (plan.rows != batch.rows || plan.padded_length != batch.padded_length || plan.layers != model.layers()) {
    invalid(fmt::format("made for {} rows, padded length {}, {} layers; these inputs and this model have {}, {}, {}",
                        plan.rows, plan.padded_length, plan.layers, batch.rows, batch.padded_length, model.layers()));
  }
  check_granularity(model, profile);
  std::vector<char> named(static_cast<std::size_t>(batch.rows), 0);
  bool whole = true;
  bool constant = true;
  for (const SequencePlan& sequence : plan.sequences) {
    const RowSpan& span = batch.spans[static_cast<std::size_t>(sequence.row)];
    if (sequence.first != span.first || sequence.tokens != span.tokens) {
      invalid(fmt::format("row {} has {} real tokens from position {}, the plan says {} from {}", sequence.row,
                          span.tokens, span.first, sequence.tokens, sequence.first));
    }
    named[static_cast<std::size_t>(sequence.row)] = 1;
    whole = whole && sequence.computes_all(plan.layers);
    const SequenceState* donor = sequence.donor < 0 ? nullptr : donors[static_cast<std::size_t>(sequence.donor)].get();
    if (sequence.donor >= 0 && donor == nullptr) invalid(fmt::format("donor {} is null", sequence.donor));
    for (const TokenRange& range : sequence.ranges) {
      if (range.first_layer == 0 && range.last_layer == plan.layers) continue;
      if (range.first_layer != 0 || range.last_layer != 0) constant = false;
      const std::int64_t count = range.end - range.begin;
      const auto has_layer = [&](std::int32_t l) {
        return donor->keys.size() == static_cast<std::size_t>(plan.layers) &&
               fits(*model.token_level(), donor->keys[static_cast<std::size_t>(l)], l, donor->tokens);
      };
      const auto has_hidden = [&](std::int32_t l) {
        if (donor->hidden.size() != static_cast<std::size_t>(plan.layers) + 1) return false;
        const at::Tensor& state = donor->hidden[static_cast<std::size_t>(l)];
        return state.defined() && state.scalar_type() == profile.dtype &&
               state.sizes() == at::IntArrayRef({1, donor->tokens, profile.hidden});
      };
      if (range.donor_begin > donor->tokens - count) {  // their sum may overflow
        invalid(fmt::format("row {}: {} tokens from position {} of a donor of {}", sequence.row, count,
                            range.donor_begin, donor->tokens));
      }
      if (range.first_layer > 0 && range.first_layer < range.last_layer && !has_hidden(range.first_layer)) {
        invalid(fmt::format("row {}: its donor has no hidden state before layer {}", sequence.row, range.first_layer));
      }
      if (range.last_layer < plan.layers && !has_hidden(plan.layers)) {
        invalid(fmt::format("row {}: its donor has no final state", sequence.row));
      }
      for (std::int32_t l = 0; l < plan.layers; ++l) {
        if (l >= range.first_layer && l < range.last_layer) continue;
        bool needed = false;
        for (const TokenRange& other : sequence.ranges) {
          needed = needed || (l >= other.first_layer && l < other.last_layer);
        }
        if (needed && !has_layer(l)) invalid(fmt::format("row {}: its donor has no keys of layer {}", sequence.row, l));
      }
    }
  }
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    if (!named[static_cast<std::size_t>(row)] && batch.spans[static_cast<std::size_t>(row)].tokens > 0) {
      invalid(fmt::format("row {} has real tokens, but no sequence", row));
    }
  }
  if (plan.sequences.empty()) invalid("no sequence");
  check_padding(batch, profile);
  if (!whole && profile.granularity != Granularity::kTokens) {
    throw Error(ErrorCode::kNotAvailable, "this model runs whole sequences only; its profile says why");
  }
  if (!constant && !model.token_level()->self_contained()) {
    throw Error(ErrorCode::kNotAvailable, "this model's layers need the same tokens throughout; its profile says why");
  }
}

}  // namespace llmcache
