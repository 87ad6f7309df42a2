#include "reuse/segment_reuse/segment_pass.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "llmcache/error.h"
#include "model/index_tensor.h"

namespace llmcache {

void SegmentSettings::validate() const {
  const auto invalid = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidOptions, "SegmentSettings." + what);
  };
  if (!(recompute_share >= 0 && recompute_share <= 1)) {
    invalid(fmt::format("recompute_share is {}, 0 to 1 is expected", recompute_share));
  }
  if (head_tokens < 0) invalid(fmt::format("head_tokens is {}, 0 or more is expected", head_tokens));
  if (least_segment < 1) invalid(fmt::format("least_segment is {}, 1 or more is expected", least_segment));
}

std::vector<TokenRange> ranges_of(const SegmentRow& row) {
  const auto& last = row.last;
  std::vector<TokenRange> ranges;
  for (std::size_t t = 0; t < last.size(); ++t) {
    const auto at = static_cast<std::int64_t>(t);
    if (ranges.empty() || ranges.back().last_layer != last[t]) ranges.push_back({at, at, 0, last[t], at});
    ranges.back().end = at + 1;
  }
  return ranges;
}

SegmentPass::SegmentPass(const TokenLevelModel& model, const SegmentLayout& layout, std::vector<SegmentRow>& rows,
                         const SegmentSettings& settings)
    : level_(model), layout_(layout), rows_(rows), settings_(settings), merges_(rows.size()), final_(rows.size()) {
  bool any = false;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    any = any || !rows[i].reused.empty();
    std::vector<std::int64_t>& moves = merges_[i].moves;
    moves.assign(static_cast<std::size_t>(rows[i].span.tokens), 0);
    for (const SegmentHit& segment : rows[i].segments) {
      const auto first = moves.begin() + segment.begin;
      std::fill(first, first + segment.tokens, segment.move());
    }
    if (std::ranges::all_of(moves, [](std::int64_t move) { return move == 0; })) moves.clear();
    merges_[i].angles.resize(layout.positions.rotations.size());
  }
  choosing_ = any && settings.chooses() ? settings.choosing_layer : -1;
}

std::vector<TokenRange> SegmentPass::choose(std::size_t sequence, const std::vector<at::Tensor>& fresh) {
  SegmentRow& row = rows_[sequence];
  const auto count = static_cast<std::int64_t>(row.reused.size());
  if (count == 0) return ranges_of(row);
  const auto device = fresh[0].device();
  const auto reused = index_tensor(row.reused, device);
  const auto& dims = level_.key_dims(choosing_, 0);
  at::Tensor deviation = at::zeros({count}, fresh[0].options().dtype(at::kFloat));
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    // What is active here stands behind the known prefix, without gap.
    const auto now = fresh[i].index_select(dims[i], reused - row.beginning).to(at::kFloat);
    const auto then = known(sequence, choosing_, 0, i, fresh[i], dims[i]).index_select(dims[i], reused).to(at::kFloat);
    const auto squares = [&](const at::Tensor& all) { return all.square().movedim(dims[i], 0).flatten(1).sum(1); };
    const auto scale = squares(now).mean().clamp_min(1e-12);
    deviation += squares(now - then) / scale;
  }
  const auto chosen = static_cast<std::int64_t>(std::ceil(settings_.recompute_share * static_cast<double>(count)));
  const auto best = std::get<1>(deviation.nan_to_num(0.0).topk(chosen)).cpu();
  const auto* number = best.const_data_ptr<std::int64_t>();
  for (const std::int64_t t : row.reused) row.last[static_cast<std::size_t>(t)] = choosing_;
  for (std::int64_t i = 0; i < chosen; ++i) {
    row.last[static_cast<std::size_t>(row.reused[static_cast<std::size_t>(number[i])])] = layout_.layers;
  }
  return ranges_of(row);
}

std::vector<KeySegment> SegmentPass::keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                                          std::vector<at::Tensor> fresh) {
  const SegmentRow& row = rows_[sequence];
  const auto& dims = level_.key_dims(layer, attention_op);
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    if (fresh[i].size(dims[i]) < row.span.tokens) {
      auto all = known(sequence, layer, attention_op, i, fresh[i], dims[i]);
      all.index_copy_(dims[i], active(sequence, layer, fresh[i].device()), fresh[i]);
      fresh[i] = std::move(all);
    }
    if (row.room.pending) row.room.pending->set(spec_of(layer, attention_op) + i, fresh[i]);
  }
  return {{row.span.tokens, std::move(fresh)}};
}

void SegmentPass::finished(std::size_t sequence, const at::Tensor& fresh) {
  final_[sequence] = fresh;
  SegmentRow& row = rows_[sequence];
  if (!row.room.pending) return;
  const auto all = all_final(sequence);
  if (all.isfinite().all().item<bool>()) {
    row.room.pending->set(layout_.final_spec, all);
  } else {
    row.room.pending.reset();  // it would spread to other sequences with one of its passages
  }
}

at::Tensor SegmentPass::final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) {
  const SegmentRow& row = rows_[sequence];
  if (end - begin == 1 && row.active(begin, layout_.layers - 1)) {  // the usual one: the last token alone
    const auto before = std::count(row.last.begin(), row.last.begin() + begin, layout_.layers);
    return final_[sequence].narrow(1, before, 1);
  }
  return all_final(sequence).narrow(1, begin, end - begin);
}

std::size_t SegmentPass::spec_of(std::int32_t layer, std::int64_t attention_op) const {
  return layout_.key_specs[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)];
}

/// Active tokens of a sequence in a layer. They change at the choosing layer only.
const at::Tensor& SegmentPass::active(std::size_t sequence, std::int32_t layer, at::Device device) {
  Merge& merge = merges_[sequence];
  const std::int32_t since = choosing_ >= 0 && layer >= choosing_ ? choosing_ : 0;
  if (merge.layer != since) {
    std::vector<std::int64_t> tokens;
    const SegmentRow& row = rows_[sequence];
    for (std::int64_t t = 0; t < row.span.tokens; ++t) {
      if (row.active(t, layer)) tokens.push_back(t);
    }
    merge.active = index_tensor(tokens, device);
    merge.layer = since;
  }
  return merge.active;
}

/// The donors' states of tensor `spec` in their places; what no segment covers is not set.
at::Tensor SegmentPass::gather(const SegmentRow& row, std::size_t spec, const at::Tensor& like, std::int64_t dim) {
  auto shape = like.sizes().vec();
  shape[static_cast<std::size_t>(dim)] = row.span.tokens;
  auto all = at::empty(shape, like.options());
  for (const SegmentHit& segment : row.segments) {
    all.narrow(dim, segment.begin, segment.tokens)
        .copy_(segment.donor->state(spec, segment.donor_begin, segment.tokens));
  }
  return all;
}

/// The donors' keys, turned to their places.
at::Tensor SegmentPass::known(std::size_t sequence, std::int32_t layer, std::int64_t attention_op, std::size_t i,
                              const at::Tensor& like, std::int64_t dim) {
  auto all = gather(rows_[sequence], spec_of(layer, attention_op) + i, like, dim);
  Merge& merge = merges_[sequence];
  if (merge.moves.empty()) return all;
  const int number =
      layout_.positions.rotation_of[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)][i];
  if (number < 0) return all;
  const KeyRotation& rotation = layout_.positions.rotations[static_cast<std::size_t>(number)];
  auto& angles = merge.angles[static_cast<std::size_t>(number)];
  if (!angles) angles = angles_of(rotation, merge.moves, like.device());
  rotate_(all, dim, rotation, *angles);
  return all;
}

at::Tensor SegmentPass::all_final(std::size_t sequence) {
  const SegmentRow& row = rows_[sequence];
  const at::Tensor& fresh = final_[sequence];
  if (fresh.defined() && fresh.size(1) == row.span.tokens) return fresh;
  const at::Tensor like = fresh.defined() ? fresh : row.segments[0].donor->state(layout_.final_spec, 0, 1);
  auto all = gather(row, layout_.final_spec, like, 1);
  if (fresh.defined()) all.index_copy_(1, active(sequence, layout_.layers - 1, fresh.device()), fresh);
  return all;
}

}  // namespace llmcache
