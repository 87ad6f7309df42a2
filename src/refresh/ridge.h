// Ridge regression from vectors to vectors, such as a translator from states of an early layer to the final output.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace llmcache {

/// y = intercept + x * weights. Plain data, to be kept or saved; reading it from several threads at once is safe.
struct RidgeModel {
  std::int64_t inputs = 0;
  std::int64_t outputs = 0;
  std::vector<float> weights;    ///< [inputs, outputs]
  std::vector<float> intercept;  ///< [outputs]
  /// Penalty on the squared weights, in units of the mean variance of an input times the number of rows, so that one
  /// value means the same for samples of any size and scale.
  double lambda = 0;
  /// Of the held-out rows: ||y - prediction||^2 / ||y - mean||^2. NaN where lambda was given.
  double held_out_error = 0;

  /// `x` [n, inputs] and `y` [n, outputs], row after row, finite, n at least 2. lambda > 0: that one. lambda = 0: the
  /// best of 1e-4 .. 10 on every fifth row after fitting the others (n at least 10), then all rows are fitted with it.
  /// Normal equations in double precision by Cholesky: O(n inputs (inputs + outputs)), and inputs^3 for each lambda
  /// tried. Throws Error(kInvalidInput), Error(kInvalidOptions).
  static RidgeModel fit(std::span<const float> x, std::span<const float> y, std::int64_t inputs, std::int64_t outputs,
                        double lambda = 0);

  /// Writes `outputs` values for each row of `x`. Throws Error(kInvalidInput) where the sizes do not fit.
  void predict(std::span<const float> x, std::span<float> y) const;
};

}  // namespace llmcache
