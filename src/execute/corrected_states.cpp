#include "execute/corrected_states.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "model/index_tensor.h"

namespace llmcache {

CorrectedStates::CorrectedStates(const TokenLevelModel& model, std::int32_t layers,
                                 const std::vector<ReusedSequence>& sequences, at::Device device, Monitor monitor)
    : model_(model), layers_(layers), sequences_(sequences), monitor_(std::move(monitor)), state_(sequences.size()) {
  const auto tensor = [&](const std::vector<std::int64_t>& numbers) { return index_tensor(numbers, device); };
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const ReusedSequence& sequence = sequences[i];
    if (!sequence.donor) continue;
    State& state = state_[i];
    state.widened = sequence.widened;
    state.shifts.resize(static_cast<std::size_t>(layers));
    auto gather = sequence.donor_positions;
    for (std::int64_t& position : gather) position = std::max<std::int64_t>(position, 0);
    std::vector<std::int64_t> known_rows, known_donor, sample_rows, sample_donor;
    const auto& active = sequence.set.active;
    for (std::size_t row = 0; row < active.size(); ++row) {
      const auto position = sequence.donor_positions[static_cast<std::size_t>(active[row])];
      if (position < 0) continue;
      known_rows.push_back(static_cast<std::int64_t>(row));
      known_donor.push_back(position);
      if (!std::binary_search(sequence.set.samples.begin(), sequence.set.samples.end(), active[row])) continue;
      sample_rows.push_back(static_cast<std::int64_t>(row));
      sample_donor.push_back(position);
    }
    state.gather = tensor(gather);
    state.active = tensor(active);
    state.known_rows = tensor(known_rows);
    state.known_donor = tensor(known_donor);
    state.sample_rows = tensor(sample_rows);
    state.sample_donor = tensor(sample_donor);
  }
}

/// `fresh`: rows of the active tokens; `cached`: of all tokens of the donor.
CorrectedStates::Shift CorrectedStates::measure(const State& state, const at::Tensor& fresh, const at::Tensor& cached) {
  const auto samples = state.sample_rows.size(0);
  if (samples < 2) return {};
  const auto before = cached.index_select(0, state.sample_donor).flatten(1).to(at::kFloat);
  const auto difference = fresh.index_select(0, state.sample_rows).flatten(1).to(at::kFloat).sub(before);
  const auto mean = difference.mean(0);
  const double length = mean.square().sum().item<double>();
  const double all = difference.square().sum().item<double>();
  const double scale = before.square().sum().item<double>() / static_cast<double>(samples);
  if (!(length > 0) || !std::isfinite(all)) return {{}, {std::isfinite(all) ? 0.0 : all, 0}};
  const auto n = static_cast<double>(samples);
  const double trace = std::max(0.0, all - n * length) / (n - 1);
  const double a = std::max(0.0, 1 - trace / n / length);
  Shift shift{{}, {std::sqrt(length / std::max(scale, 1e-30)), a}};
  if (a > 0) {
    auto sizes = cached.sizes().vec();
    sizes[0] = 1;
    shift.add = mean.mul(a).to(cached.scalar_type()).view(sizes);
  }
  return shift;
}

/// Of all tokens, as the donor has them; those that it does not have hold anything.
at::Tensor CorrectedStates::reused_rows(const State& state, const at::Tensor& cached, const Shift& shift) {
  auto rows = cached.index_select(0, state.gather);
  if (shift.add.defined()) rows.add_(shift.add);
  return rows;
}

void CorrectedStates::embedded(std::size_t sequence, at::Tensor rows) {
  if (!sequences_[sequence].donor) return;
  const State& state = at(sequence);
  rows[0].index_copy_(0, state.known_rows, sequences_[sequence].donor->hidden(0).index_select(0, state.known_donor));
}

LayerAction CorrectedStates::before_layer(std::size_t sequence, std::int32_t layer, const at::Tensor& active) {
  const ReusedSequence& reused = sequences_[sequence];
  State& state = at(sequence);
  if (!reused.donor || layer > state.widened) return LayerAction::kGoOn;
  LayerAction course = LayerAction::kGoOn;
  if (monitor_) course = monitor_(sequence, layer, state.shifts[static_cast<std::size_t>(layer) - 1]);
  const bool planned = layer == state.widened;
  if (planned && course == LayerAction::kComputeAll) course = LayerAction::kGoOn;
  const auto cached = planned || course == LayerAction::kComputeAll ? reused.donor->hidden(layer) : at::Tensor();
  if (!cached.defined() && course == LayerAction::kComputeAll) course = LayerAction::kGoOn;
  if (!cached.defined() && planned) course = LayerAction::kStop;
  state.stopped = course == LayerAction::kStop;
  if (!cached.defined() || state.stopped) return course;
  state.entering = reused_rows(state, cached, measure(state, active[0], cached));
  state.widened = layer;
  return course;
}

std::vector<KeySegment> CorrectedStates::keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                                              std::vector<at::Tensor> fresh) {
  const ReusedSequence& reused = sequences_[sequence];
  State& state = at(sequence);
  const auto& dims = model_.key_dims(layer, attention_op);
  if (!reused.donor || layer >= state.widened) return {{fresh.at(0).size(dims[0]), std::move(fresh)}};
  SampleShift& measured = state.shifts[static_cast<std::size_t>(layer)];
  const double share = 1.0 / static_cast<double>(fresh.size() * static_cast<std::size_t>(model_.attention_ops(layer)));
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    const auto own = fresh[i].movedim(dims[i], 0);
    const auto cached = reused.donor->keys(layer, attention_op, i);
    // Known tokens enter layer 0 as they did in the donor.
    const Shift shift = layer == 0 ? Shift{} : measure(state, own, cached);
    measured.relative += share * shift.measured.relative;
    measured.shrinkage += share * shift.measured.shrinkage;
    fresh[i] = reused_rows(state, cached, shift).index_copy_(0, state.active, own).movedim(0, dims[i]);
  }
  return {{static_cast<std::int64_t>(reused.donor_positions.size()), std::move(fresh)}};
}

at::Tensor CorrectedStates::entering(std::size_t sequence, std::int32_t /*layer*/, std::int64_t begin,
                                     std::int64_t end) {
  return at(sequence).entering.narrow(0, begin, end - begin).unsqueeze(0);
}

at::Tensor CorrectedStates::final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) {
  const ReusedSequence& reused = sequences_[sequence];
  const State& state = at(sequence);
  if (!reused.donor || state.widened < layers_) return state.finished.narrow(1, begin, end - begin);
  const auto cached = reused.donor->hidden(layers_);
  const auto all = reused_rows(state, cached, measure(state, state.finished[0], cached))
                       .index_copy_(0, state.active, state.finished[0]);
  return all.narrow(0, begin, end - begin).unsqueeze(0);
}

}  // namespace llmcache
