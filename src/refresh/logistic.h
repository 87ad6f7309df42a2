// Logistic regression for small sets of features, such as the gate that decides whether an answer may be reused.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// P(y = 1 | x) = 1 / (1 + exp(-(intercept + sum of weights * (x - means) / scales))). Plain data, to be kept or saved;
/// reading it from several threads at once is safe.
struct LogisticModel {
  std::vector<double> means;
  std::vector<double> scales;   ///< standard deviations of the sample; 1 where a feature does not vary
  std::vector<double> weights;  ///< of the standardised features
  double intercept = 0;

  /// `rows`: [n, features], row after row, finite; `labels`: n from 0 to 1, such as errors whose mean is to be
  /// predicted (a quasi-likelihood: Papke and Wooldridge, 1996). `l2` (0 or more) is the penalty on half the
  /// squared weights, the intercept left out, beside the sum of the n log losses; a little of it keeps the weights
  /// finite where the classes can be separated. Newton's method with step halving: O(n features^2) a step, some 10
  /// steps. With one class only the weights are 0 and the intercept is that of one half more observation of each class.
  /// Throws Error(kInvalidInput), Error(kInvalidOptions).
  static LogisticModel fit(std::span<const double> rows, std::span<const double> labels, std::int64_t features,
                           double l2 = 1.0);

  /// `features` values. NaN where one of them is. Throws Error(kInvalidInput) for another number of them.
  [[nodiscard]] double predict(std::span<const double> x) const;
};

}  // namespace llmcache
