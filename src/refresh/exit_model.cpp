#include "refresh/exit_model.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <span>

#include "llmcache/error.h"

namespace llmcache {
namespace {

at::Tensor scores_of(const at::Tensor& outputs, const ScoreFunction& scores) {
  if (!scores) return outputs;
  auto result = scores(outputs);
  if (!result.defined() || result.dim() != 2 || result.size(0) != outputs.size(0)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("BudgetOptions.scores returned {} for outputs of shape [{}, {}]; [{}, classes] is expected",
                            result.defined() ? fmt::format("a tensor of {} dimensions", result.dim()) : "nothing",
                            outputs.size(0), outputs.size(1), outputs.size(0)));
  }
  return result.to(at::kFloat);
}

/// What a decision is, and how clear.
struct Decided {
  at::Tensor decision;  ///< int64 [n]
  at::Tensor margin;    ///< [n], largest score less the second
  at::Tensor doubt;     ///< [n], log of the probability (softmax of the scores) of every other decision
};

Decided decide(const at::Tensor& outputs, const ScoreFunction& scores) {
  const auto own = scores_of(outputs, scores);
  if (own.size(1) < 2) return {at::zeros({own.size(0)}, at::kLong), own.select(1, 0), at::zeros_like(own.select(1, 0))};
  const auto [values, places] = own.topk(2, 1);
  const auto probability = (values.select(1, 0) - own.logsumexp(1)).exp();
  return {places.select(1, 0), values.select(1, 0) - values.select(1, 1), (1 - probability).clamp_min(1e-6).log()};
}

constexpr std::int64_t kCandidates = 32;  // entries that are then looked at in full

at::Tensor same(const at::Tensor& a, const at::Tensor& b) { return a.eq(b).to(at::kFloat); }

std::size_t bytes_of(std::initializer_list<at::Tensor> tensors) {
  std::size_t total = 0;
  for (const at::Tensor& tensor : tensors) total += tensor.defined() ? tensor.nbytes() : 0;
  return total;
}

}  // namespace

std::size_t ExitLayer::bytes() const {
  return bytes_of({centre, directions, lengths, projection, projected, translator, regressor}) +
         gate.means.size() * 3 * sizeof(double);
}

std::pair<at::Tensor, at::Tensor> ExitLayer::nearest(const at::Tensor& wanted, std::int64_t count) const {
  if (!projected.defined()) {
    auto [similarity, numbers] = at::mm(wanted, directions.t()).topk(count, 1);
    return {similarity, numbers};
  }
  const auto tried = std::min(kCandidates, directions.size(0));
  const auto candidates = std::get<1>(at::mm(at::mm(wanted, projection), projected.t()).topk(tried, 1, true, false));
  const auto rows = directions.index_select(0, candidates.reshape({-1})).view({wanted.size(0), tried, -1});
  const auto [similarity, places] = at::bmm(rows, wanted.unsqueeze(2)).squeeze(2).topk(count, 1);
  return {similarity, candidates.gather(1, places)};
}

void ExitLayer::index() {
  constexpr std::int64_t kSearchedWhole = 512;
  if (directions.size(0) <= kSearchedWhole || axes_for(directions.size(1)) == 0) return;
  // Ascending eigenvalues: the principal axes are the last ones.
  const auto axes = std::get<1>(at::linalg_eigh(at::mm(directions.t(), directions)));
  projection = axes.narrow(1, axes.size(1) - kAxes, kAxes).contiguous();
  projected = at::mm(directions, projection);
}

ExitModel ExitModel::to(at::Device device) const {
  ExitModel moved = *this;
  const auto move = [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.to(device);
  };
  move(moved.outputs);
  move(moved.decisions);
  move(moved.mean_output);
  for (ExitLayer& layer : moved.layers) {
    move(layer.centre);
    move(layer.directions);
    move(layer.lengths);
    move(layer.projection);
    move(layer.projected);
    move(layer.translator);
    move(layer.regressor);
  }
  return moved;
}

std::size_t ExitModel::bytes() const {
  std::size_t total = bytes_of({outputs, decisions, mean_output});
  for (const ExitLayer& layer : layers) total += layer.bytes();
  return total;
}

at::Tensor decisions_of(const at::Tensor& outputs, const ScoreFunction& scores) {
  const auto own = scores_of(outputs, scores);
  if (own.size(1) < 2) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("a decision needs two scores or more, and there is {}; set BudgetOptions.scores, or choose "
                            "BudgetMetric::kRelativeError",
                            own.size(1)));
  }
  return own.argmax(1);
}

ExitModel::Described ExitModel::describe(std::size_t layer, const at::Tensor& states,
                                         const ScoreFunction& scores) const {
  const ExitLayer& own = layers[layer];
  const auto centred = states - own.centre;
  const auto regressed = mean_output + at::mm(centred, own.regressor);
  const Decided by_regression = decide(regressed, scores);
  const auto distance = [&](const at::Tensor& a, const at::Tensor& b) {
    return (a - b).norm(2, 1) / std::max(typical_distance, 1e-12);
  };
  const auto described = [](const at::Tensor& answers, const std::vector<at::Tensor>& features) {
    const auto table = at::stack(features, 1).to(at::kCPU, at::kDouble).contiguous();
    const auto* values = table.const_data_ptr<double>();
    return Described{answers, {values, values + table.numel()}};
  };
  if (cache_free) {
    return described(regressed, {by_regression.margin, by_regression.doubt, distance(regressed, mean_output)});
  }
  const auto length = centred.norm(2, 1, true).clamp_min(1e-12);
  const auto [similarity, neighbours] = own.nearest(centred / length, kNeighbours);
  const auto nearest = neighbours.select(1, 0);
  const auto best = similarity.select(1, 0);
  const auto cached = outputs.index_select(0, nearest);
  const auto difference =
      centred - own.directions.index_select(0, nearest) * own.lengths.index_select(0, nearest).unsqueeze(1);
  const auto corrected = cached + at::mm(difference, own.translator);
  const auto near = decisions.index_select(0, neighbours.reshape({-1})).view_as(neighbours);
  const auto by_cache = near.select(1, 0);
  const Decided by_correction = decide(corrected, scores);
  const Decided by_mean = decide((corrected + regressed) / 2, scores);
  return described(corrected,
                   {best, best - similarity.select(1, kNeighbours - 1), same(near, by_cache.unsqueeze(1)).mean(1),
                    same(near, by_correction.decision.unsqueeze(1)).mean(1), by_correction.margin, by_regression.margin,
                    by_mean.margin, by_correction.doubt, by_regression.doubt, by_mean.doubt,
                    same(by_correction.decision, by_regression.decision), same(by_correction.decision, by_cache),
                    by_correction.margin * by_regression.margin, best * by_correction.margin,
                    distance(corrected, regressed), distance(corrected, cached), distance(regressed, cached)});
}

Proposal ExitModel::propose(std::size_t layer, const at::Tensor& states, const ScoreFunction& scores) const {
  const auto described = describe(layer, states, scores);
  Proposal proposal{described.answers, {}};
  for (std::int64_t i = 0; i < states.size(0); ++i) {
    const auto own = std::span(described.features).subspan(static_cast<std::size_t>(i) * features(), features());
    proposal.expected.push_back(layers[layer].gate.predict(own));
  }
  return proposal;
}

std::vector<double> ExitModel::errors(const at::Tensor& answers, const at::Tensor& full,
                                      const ScoreFunction& scores) const {
  at::Tensor loss;
  if (metric == BudgetMetric::kRelativeError) {
    loss = ((answers - full).norm(2, 1) / std::max(typical_distance, 1e-12)).clamp_max(1.0);
    loss = loss.nan_to_num(1.0);
  } else {
    loss = decisions_of(answers, scores).ne(decisions_of(full, scores));
  }
  const auto flat = loss.to(at::kCPU, at::kDouble).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

}  // namespace llmcache
