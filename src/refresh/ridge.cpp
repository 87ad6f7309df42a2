#include "refresh/ridge.h"

#include <fmt/core.h>

#include <Eigen/Dense>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "llmcache/error.h"
#include "refusal.h"

namespace llmcache {
namespace {

using FloatRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstRows = Eigen::Map<const FloatRows>;

constexpr std::int64_t kFold = 5;     ///< every fifth row is held out
constexpr std::int64_t kBlock = 256;  ///< rows that are turned to double at a time
constexpr std::array kLambdas = {1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0};

/// Sums over rows: all that the normal equations need. Centred about `origin`, so that a large common mean costs no
/// precision.
struct Moments {
  Eigen::RowVectorXd x_origin, y_origin;
  Eigen::RowVectorXd x_sum, y_sum;
  Eigen::MatrixXd xx;  ///< lower half
  Eigen::MatrixXd xy;
  double yy = 0;
  double count = 0;

  Moments(Eigen::RowVectorXd x_mean, Eigen::RowVectorXd y_mean)
      : x_origin(std::move(x_mean)),
        y_origin(std::move(y_mean)),
        x_sum(Eigen::RowVectorXd::Zero(x_origin.size())),
        y_sum(Eigen::RowVectorXd::Zero(y_origin.size())),
        xx(Eigen::MatrixXd::Zero(x_origin.size(), x_origin.size())),
        xy(Eigen::MatrixXd::Zero(x_origin.size(), y_origin.size())) {}

  void add(const Eigen::MatrixXd& x, const Eigen::MatrixXd& y) {
    if (x.rows() == 0) return;
    xx.selfadjointView<Eigen::Lower>().rankUpdate(x.transpose());
    xy.noalias() += x.transpose() * y;
    x_sum += x.colwise().sum();
    y_sum += y.colwise().sum();
    yy += y.squaredNorm();
    count += static_cast<double>(x.rows());
  }
  void add(const Moments& other) {
    xx += other.xx;
    xy += other.xy;
    x_sum += other.x_sum;
    y_sum += other.y_sum;
    yy += other.yy;
    count += other.count;
  }
};

struct Solution {
  Eigen::MatrixXd weights;       ///< [inputs, outputs]
  Eigen::RowVectorXd intercept;  ///< between the origins
};

Solution solve(const Moments& moments, double lambda) {
  const Eigen::RowVectorXd x_mean = moments.x_sum / moments.count;
  const Eigen::RowVectorXd y_mean = moments.y_sum / moments.count;
  Eigen::MatrixXd normal = moments.xx;
  normal.triangularView<Eigen::Lower>() -= moments.count * (x_mean.transpose() * x_mean);
  const double scale = normal.trace() / static_cast<double>(normal.rows());
  // Inputs that do not vary get weights of 0.
  normal.diagonal().array() += lambda * (scale > 0 ? scale : 1.0);
  Solution solution;
  solution.weights = moments.xy - moments.count * (x_mean.transpose() * y_mean);
  const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> factor(normal);
  if (factor.info() != Eigen::Success) {
    refuse_input(fmt::format("ridge regression is singular with lambda {}; give a larger one", lambda));
  }
  factor.solveInPlace(solution.weights);
  solution.intercept = y_mean - x_mean * solution.weights;
  return solution;
}

/// Sum of squared errors over the rows of `moments`, from the moments alone.
double squared_error(const Solution& solution, const Moments& moments) {
  const auto& w = solution.weights;
  const auto& b = solution.intercept;
  const Eigen::MatrixXd xxw = moments.xx.selfadjointView<Eigen::Lower>() * w;
  return moments.yy - 2 * (w.cwiseProduct(moments.xy).sum() + b.dot(moments.y_sum)) + w.cwiseProduct(xxw).sum() +
         2 * (moments.x_sum * w).dot(b) + moments.count * b.squaredNorm();
}

Eigen::RowVectorXd mean_of(const ConstRows& rows) {
  return rows.cast<double>().colwise().sum() / static_cast<double>(rows.rows());
}

void check(std::span<const float> x, std::span<const float> y, std::int64_t inputs, std::int64_t outputs) {
  const bool whole = inputs >= 1 && outputs >= 1 && x.size() % static_cast<std::size_t>(inputs) == 0 &&
                     x.size() / static_cast<std::size_t>(inputs) * static_cast<std::size_t>(outputs) == y.size();
  if (!whole || x.size() < 2 * static_cast<std::size_t>(inputs)) {
    refuse_input(
        fmt::format("ridge regression got {} values for {} inputs and {} for {} outputs; as many whole rows of both, "
                    "at least 2, are expected",
                    x.size(), inputs, y.size(), outputs));
  }
  const auto finite = [](float value) { return std::isfinite(value); };
  if (!std::all_of(x.begin(), x.end(), finite) || !std::all_of(y.begin(), y.end(), finite)) {
    refuse_input("ridge regression got a value that is not finite; leave out such rows");
  }
}

}  // namespace

RidgeModel RidgeModel::fit(std::span<const float> x, std::span<const float> y, std::int64_t inputs,
                           std::int64_t outputs, double lambda) {
  check(x, y, inputs, outputs);
  const std::int64_t n = static_cast<std::int64_t>(x.size()) / inputs;
  if (!(lambda >= 0 && std::isfinite(lambda))) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("lambda is {}; 0 (choose) or more is expected", lambda));
  }
  const bool choose = lambda == 0;
  if (choose && n < 2 * kFold) {
    refuse_input(fmt::format("ridge regression got {} rows; at least {} are needed to choose lambda", n, 2 * kFold));
  }
  const ConstRows x_rows(x.data(), n, inputs);
  const ConstRows y_rows(y.data(), n, outputs);
  const Eigen::RowVectorXd x_origin = mean_of(x_rows);
  const Eigen::RowVectorXd y_origin = mean_of(y_rows);
  Moments fitted(x_origin, y_origin);
  Moments held(x_origin, y_origin);
  const auto add = [&](Moments& moments, const std::vector<Eigen::Index>& rows) {
    const Eigen::MatrixXd x_block = x_rows(rows, Eigen::all).cast<double>().rowwise() - x_origin;
    const Eigen::MatrixXd y_block = y_rows(rows, Eigen::all).cast<double>().rowwise() - y_origin;
    moments.add(x_block, y_block);
  };
  for (std::int64_t start = 0; start < n; start += kBlock) {
    std::vector<Eigen::Index> fitted_rows;
    std::vector<Eigen::Index> held_rows;
    for (std::int64_t row = start; row < std::min(n, start + kBlock); ++row) {
      (choose && row % kFold == kFold - 1 ? held_rows : fitted_rows).push_back(row);
    }
    add(fitted, fitted_rows);
    add(held, held_rows);
  }

  RidgeModel model;
  model.inputs = inputs;
  model.outputs = outputs;
  model.lambda = lambda;
  model.held_out_error = std::numeric_limits<double>::quiet_NaN();
  if (choose) {
    const Solution mean_only{Eigen::MatrixXd::Zero(inputs, outputs), fitted.y_sum / fitted.count};
    const double spread = squared_error(mean_only, held);
    double best = std::numeric_limits<double>::infinity();
    for (const double candidate : kLambdas) {
      const double error = squared_error(solve(fitted, candidate), held);
      if (error < best) {
        best = error;
        model.lambda = candidate;
      }
    }
    model.held_out_error = spread > 0 ? best / spread : 0;
    fitted.add(held);
  }
  const Solution solution = solve(fitted, model.lambda);
  model.weights.resize(static_cast<std::size_t>(inputs * outputs));
  Eigen::Map<FloatRows>(model.weights.data(), inputs, outputs) = solution.weights.cast<float>();
  const Eigen::RowVectorXd intercept = y_origin + solution.intercept - x_origin * solution.weights;
  model.intercept.resize(static_cast<std::size_t>(outputs));
  Eigen::Map<Eigen::RowVectorXf>(model.intercept.data(), outputs) = intercept.cast<float>();
  return model;
}

void RidgeModel::predict(std::span<const float> x, std::span<float> y) const {
  const auto rows = inputs > 0 ? static_cast<std::int64_t>(x.size()) / inputs : 0;
  if (rows * inputs != static_cast<std::int64_t>(x.size()) || rows * outputs != static_cast<std::int64_t>(y.size())) {
    refuse_input(
        fmt::format("ridge regression of {} inputs and {} outputs got {} values and room for {}; whole rows are "
                    "expected",
                    inputs, outputs, x.size(), y.size()));
  }
  if (rows == 0) return;
  const ConstRows matrix(weights.data(), inputs, outputs);
  Eigen::Map<FloatRows> out(y.data(), rows, outputs);
  out.noalias() = ConstRows(x.data(), rows, inputs) * matrix;
  out.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(intercept.data(), outputs);
}

}  // namespace llmcache
