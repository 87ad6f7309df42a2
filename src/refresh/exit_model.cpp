#include "refresh/exit_model.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <span>

#include "caller_failed.h"
#include "llmcache/error.h"

namespace llmcache {
namespace {

at::Tensor scores_of(const at::Tensor& outputs, const ScoreFunction& scores) {
  if (!scores) return outputs;
  auto result = call_the_callers("BudgetOptions.scores", [&] { return scores(outputs); });
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
  if (own.size(1) < 2) {
    return {at::zeros({own.size(0)}, own.options().dtype(at::kLong)), own.select(1, 0),
            at::zeros_like(own.select(1, 0))};
  }
  const auto [values, places] = own.topk(2, 1);
  const auto probability = (values.select(1, 0) - own.logsumexp(1)).exp();
  return {places.select(1, 0), values.select(1, 0) - values.select(1, 1), (1 - probability).clamp_min(1e-6).log()};
}

constexpr double kNoise = 0.1;  // variance of what states do not tell, in units of the process's own

/// Row after row on the host.
template <class T>
std::vector<T> values_of(const at::Tensor& tensor) {
  const auto own = tensor.to(at::kCPU, c10::CppTypeToScalarType<T>::value).contiguous();
  const T* values = own.template const_data_ptr<T>();
  return {values, values + own.numel()};
}

std::size_t bytes_of(std::initializer_list<at::Tensor> tensors) {
  std::size_t total = 0;
  for (const at::Tensor& tensor : tensors) total += tensor.defined() ? tensor.nbytes() : 0;
  return total;
}

}  // namespace

std::size_t ExitLayer::bytes() const {
  return bytes_of({centre, states, lengths, projection, projected, translator}) +
         gate.means.size() * 3 * sizeof(double);
}

void ExitLayer::keep(const at::Tensor& centred) {
  constexpr std::int64_t kSearchedWhole = 512;
  states = centred;
  lengths = centred.norm(2, 1).clamp_min(1e-12);
  measure();
  if (states.size(0) <= kSearchedWhole || axes_for(states.size(1)) == 0) return;
  const auto directions = states / lengths.unsqueeze(1);
  // Ascending eigenvalues: the principal axes are the last ones.
  const auto axes = std::get<1>(at::linalg_eigh(at::mm(directions.t(), directions)));
  projection = axes.narrow(1, axes.size(1) - kAxes, kAxes).contiguous();
  projected = at::mm(directions, projection);
}

/// The mean squared distance between entries is twice their mean square.
void ExitLayer::measure() { mean_distance = std::max(2 * lengths.square().mean().item<double>(), 1e-12); }

at::Tensor ExitLayer::nearest(const at::Tensor& wanted, std::int64_t count) const {
  const auto similarity = projected.defined() ? at::mm(at::mm(wanted, projection), projected.t())
                                              : at::mm(wanted, states.t()).div_(lengths);
  return std::get<1>(similarity.topk(count, 1, true, false));
}

ExitLayer::Kriged ExitLayer::krige(const at::Tensor& wanted, const at::Tensor& numbers) const {
  const auto n = numbers.size(0);
  const auto count = numbers.size(1);
  const auto flat = numbers.reshape({-1});
  const auto near = states.index_select(0, flat).view({n, count, -1});
  const auto length = lengths.index_select(0, flat).view({n, count});
  const auto own = wanted.norm(2, 1, true).clamp_min(1e-12);
  const auto products = at::bmm(near, wanted.unsqueeze(2)).squeeze(2);
  // Squared distances by products.
  const auto squares = length.square();
  const auto like = [&](at::Tensor squared) { return squared.clamp_min_(0).mul_(-1 / mean_distance).exp_(); };
  auto among = like(at::baddbmm(squares.unsqueeze(1) + squares.unsqueeze(2), near, near.transpose(1, 2), 1, -2));
  among.diagonal(0, 1, 2).fill_(1 + kNoise);
  const auto here = like(squares + own.square() - 2 * products);
  const auto weights = std::get<0>(at::linalg_solve_ex(among, here.unsqueeze(2))).squeeze(2);
  const auto met = at::bmm(weights.unsqueeze(1), near).squeeze(1);
  return {products / (length * own), weights, met, 1 - (weights * here).sum(1)};
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
    move(layer.states);
    move(layer.lengths);
    move(layer.projection);
    move(layer.projected);
    move(layer.translator);
    if (layer.lengths.defined()) layer.measure();
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
  const auto n = states.size(0);
  const auto rows = static_cast<std::size_t>(n);
  const auto centred = states - own.centre;
  const auto regressed = mean_output + at::mm(centred, own.translator);
  const double distance = std::max(typical_distance, 1e-12);
  if (cache_free) {
    const Decided decided = decide(regressed, scores);
    return {regressed, values_of<double>(at::stack(
                           {decided.margin, decided.doubt, (regressed - mean_output).norm(2, 1) / distance}, 1))};
  }
  const auto weighted = std::min(kWeighted, outputs.size(0));
  const auto numbers = own.nearest(centred, weighted);
  const auto kriged = own.krige(centred, numbers);
  const auto [similarity, places] = kriged.similarity.topk(kNeighbours, 1);
  const auto neighbours = numbers.gather(1, places);
  // Weighted sums of what the answers differ in from the mean one, less what the regression tells of that.
  const auto answers = at::_embedding_bag_forward_only(
      outputs, numbers.reshape({-1}), at::arange(0, n * weighted, weighted, numbers.options()),
      /*scale_grad_by_freq=*/false, /*mode=*/0, /*sparse=*/false, kriged.weights.reshape({-1}));
  const auto correction =
      std::get<0>(answers) - kriged.weights.sum(1, true) * mean_output - at::mm(kriged.met, own.translator);
  const auto corrected = regressed + correction;
  const auto cached = outputs.index_select(0, neighbours.select(1, 0));
  // The host gets all that the gate is to know at once, and one call of `scores` serves all three answers.
  const Decided decided = decide(at::cat({corrected, regressed, regressed + correction / 2}), scores);
  const auto clear = values_of<double>(at::stack({decided.margin, decided.doubt}));
  const auto far = values_of<double>(at::stack({correction, corrected - cached, regressed - cached}).norm(2, 2));
  const auto best = values_of<double>(similarity);
  const auto unknown = values_of<double>(kriged.unknown);
  const auto chosen = values_of<std::int64_t>(decided.decision);
  const auto near = values_of<std::int64_t>(decisions.index_select(0, neighbours.reshape({-1})));
  const auto count = static_cast<std::size_t>(kNeighbours);
  Described described{corrected, {}};
  for (std::size_t i = 0; i < rows; ++i) {
    const auto margin = [&](std::size_t answer) { return clear[answer * rows + i]; };
    const auto doubt = [&](std::size_t answer) { return clear[(3 + answer) * rows + i]; };
    const auto own_near = std::span(near).subspan(i * count, count);
    const auto share = [&](std::int64_t decision) {
      return static_cast<double>(std::count(own_near.begin(), own_near.end(), decision)) / static_cast<double>(count);
    };
    const std::int64_t by_correction = chosen[i];
    const std::int64_t by_regression = chosen[rows + i];
    const double nearest = best[i * count];
    for (const double feature :
         {nearest, nearest - best[i * count + count - 1], share(own_near[0]), share(by_correction), margin(0),
          margin(1), margin(2), doubt(0), doubt(1), doubt(2), by_correction == by_regression ? 1.0 : 0.0,
          by_correction == own_near[0] ? 1.0 : 0.0, margin(0) * margin(1), nearest * margin(0), far[i] / distance,
          far[rows + i] / distance, far[2 * rows + i] / distance, std::log(std::max(unknown[i], 1e-6))}) {
      described.features.push_back(feature);
    }
  }
  return described;
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
