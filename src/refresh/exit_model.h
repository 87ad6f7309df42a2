// Early exit with the cached neighbour: what a sequence's answer is taken from before its last layer has run.
//
// At layer l let f be the mean over a sequence's tokens of the state that enters it. The bank of l holds (f', y') of
// earlier sequences, y' being the final output. Proposed is what the nearest of them answered, corrected:
//   sum of w' y' + W (f - sum of w' f') + (1 - sum of w') mean y
// with W a ridge regression from f to y, and w' the weights of kriging (a Gaussian process over the nearest entries:
// Rasmussen and Williams, 2006, 2.2; Datta et al., arXiv 1406.7343), so that what W misses at the neighbours is put
// right in their midst, and nothing is changed far from them. A gate (a logistic regression) tells the error to expect.
// What W says by itself is one of the gate's features, or itself the answer (EarlyExit::kCacheFree).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "llmcache/refresh/budget.h"
#include "refresh/exit_sizes.h"
#include "refresh/logistic.h"

namespace llmcache {

/// Bank, translator and gate of one layer; all undefined where nothing leaves in front of it. float32 on the model's
/// device.
struct ExitLayer {
  static constexpr std::int64_t kAxes = 64;  ///< k of `projection`
  /// Axes that states of this width are searched on, if there are many entries; 0: they are searched as they are.
  static constexpr std::int64_t axes_for(std::int64_t hidden) { return hidden > 2 * kAxes ? kAxes : 0; }

  at::Tensor centre;   ///< [hidden], mean of the kept states
  at::Tensor states;   ///< [entries, hidden], kept states less the centre
  at::Tensor lengths;  ///< [entries], theirs
  at::Tensor
      projection;  ///< [hidden, k], principal axes of their directions; undefined: few enough to search as they are
  at::Tensor projected;   ///< [entries, k], directions on these
  at::Tensor translator;  ///< [hidden, values]: W, from f - centre to y - mean output
  LogisticModel gate;
  double mean_distance = 1;  ///< squared, between kept states; follows from `lengths`

  [[nodiscard]] bool used() const { return centre.defined(); }
  [[nodiscard]] std::size_t bytes() const;
  /// Takes the states of the bank, less the centre, and makes what they are searched by.
  void keep(const at::Tensor& centred);
  /// Sets mean_distance.
  void measure();
  /// Numbers of the `count` most similar entries, by cosine (of many entries on the principal axes), of each state less
  /// the centre, `[n, hidden]`: `[n, count]`, in no order.
  [[nodiscard]] at::Tensor nearest(const at::Tensor& wanted, std::int64_t count) const;
  struct Kriged {
    at::Tensor similarity;  ///< [n, count], cosines
    at::Tensor weights;     ///< [n, count]
    at::Tensor met;         ///< [n, hidden], sum of the weighted states less the centre
    at::Tensor unknown;     ///< [n], share of the variance that the entries leave unknown, 0 to 1
  };
  /// For states less the centre `[n, hidden]`, and entries near them `[n, count]`.
  [[nodiscard]] Kriged krige(const at::Tensor& wanted, const at::Tensor& numbers) const;
};

/// Answers proposed for some sequences in front of one layer.
struct Proposal {
  at::Tensor answers;            ///< [n, values]
  std::vector<double> expected;  ///< error that the gate expects, one a sequence; NaN: not to be used
};

/// Immutable once made: safe from many threads.
struct ExitModel {
  static constexpr std::int64_t kNeighbours = 5;  ///< whose decisions are features of the gate
  static constexpr std::int64_t kWeighted = 32;   ///< nearest entries that make the answer
  static constexpr std::int64_t kLeastEntries = kLeastExitEntries;

  BudgetMetric metric = BudgetMetric::kDecision;
  bool cache_free = false;
  at::Tensor outputs;           ///< [entries, values], of the kept sequences
  at::Tensor decisions;         ///< int64 [entries]
  at::Tensor mean_output;       ///< [values]
  double typical_distance = 0;  ///< mean distance between outputs of different sequences
  std::vector<ExitLayer> layers;

  /// Largest expected error at which a sequence leaves in front of each layer, [threshold][layer]: threshold 0 is the
  /// certified one, each further one is safer. Below 0: none leaves there.
  std::vector<std::vector<double>> thresholds;

  [[nodiscard]] std::size_t bytes() const;
  [[nodiscard]] std::size_t features() const noexcept { return gate_features(cache_free); }  ///< of gates
  /// The same with all tensors on `device`.
  [[nodiscard]] ExitModel to(at::Device device) const;
  /// Proposals for `states` `[n, hidden]` in front of `layer`, whose gate has been fitted.
  [[nodiscard]] Proposal propose(std::size_t layer, const at::Tensor& states, const ScoreFunction& scores) const;
  /// The same before the gate: answers, and its features, `[n, features()]` row after row.
  struct Described {
    at::Tensor answers;
    std::vector<double> features;
  };
  [[nodiscard]] Described describe(std::size_t layer, const at::Tensor& states, const ScoreFunction& scores) const;

  /// Error of `answers` against `full`, both `[n, values]`, one a row, 0 to 1.
  [[nodiscard]] std::vector<double> errors(const at::Tensor& answers, const at::Tensor& full,
                                           const ScoreFunction& scores) const;
};

/// int64 [n]: the decisions that `outputs` `[n, values]` lead to; `scores` may be empty. Throws Error(kInvalidOptions)
/// if it does not return [n, classes] with two classes or more, and with what it throws nested.
at::Tensor decisions_of(const at::Tensor& outputs, const ScoreFunction& scores);

}  // namespace llmcache
