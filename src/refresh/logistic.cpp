#include "refresh/logistic.h"

#include <fmt/core.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "llmcache/error.h"
#include "refusal.h"

namespace llmcache {
namespace {

using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
constexpr int kMaxSteps = 100;

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

/// log(1 + exp(x)) without overflow.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

/// What is minimised. The last column of `design` is 1, its weight is the intercept and goes free.
double objective(const RowMatrix& design, const Eigen::VectorXd& labels, const Eigen::VectorXd& weights, double l2) {
  const Eigen::VectorXd score = design * weights;
  return score.unaryExpr(&softplus).sum() - labels.dot(score) +
         0.5 * l2 * weights.head(weights.size() - 1).squaredNorm();
}

Eigen::VectorXd minimise(const RowMatrix& design, const Eigen::VectorXd& labels, double l2) {
  const Eigen::Index size = design.cols();
  // Without a penalty the weights of separable classes would grow for ever, and features that are sums of others have
  // no unique ones: this much is below what can be seen in a probability.
  const double penalty = std::max(l2, 1e-8);
  Eigen::VectorXd diagonal = Eigen::VectorXd::Constant(size, penalty);
  diagonal[size - 1] = 0;
  Eigen::VectorXd weights = Eigen::VectorXd::Zero(size);
  double value = objective(design, labels, weights, penalty);
  for (int step = 0; step < kMaxSteps; ++step) {
    const Eigen::VectorXd probability = (design * weights).unaryExpr(&sigmoid);
    const Eigen::VectorXd gradient = design.transpose() * (probability - labels) + diagonal.cwiseProduct(weights);
    const Eigen::VectorXd curvature = probability.array() * (1 - probability.array());
    Eigen::MatrixXd hessian = design.transpose() * curvature.asDiagonal() * design;
    hessian.diagonal() += diagonal;
    hessian(size - 1, size - 1) += 1e-12;  // all probabilities may be 0 or 1 in double precision
    const Eigen::VectorXd direction = hessian.ldlt().solve(gradient);
    double length = 1;
    double next = value;
    Eigen::VectorXd moved = weights;
    for (; length > 1e-10; length /= 2) {
      moved = weights - length * direction;
      next = objective(design, labels, moved, penalty);
      if (next <= value) break;
    }
    if (!(next <= value)) break;
    const double gain = value - next;
    weights = moved;
    value = next;
    if (gain <= 1e-12 * (1 + std::abs(value))) break;
  }
  return weights;
}

}  // namespace

LogisticModel LogisticModel::fit(std::span<const double> rows, std::span<const double> labels, std::int64_t features,
                                 double l2) {
  if (features < 1 || labels.empty() || rows.size() != labels.size() * static_cast<std::size_t>(features)) {
    refuse_input(
        fmt::format("logistic regression got {} values and {} labels for {} features; n * features values and n "
                    "labels are expected, n and features at least 1",
                    rows.size(), labels.size(), features));
  }
  if (!(l2 >= 0 && std::isfinite(l2))) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("l2 is {}; 0 or more is expected", l2));
  }
  if (!std::all_of(rows.begin(), rows.end(), [](double value) { return std::isfinite(value); })) {
    refuse_input("logistic regression got a feature that is not finite; leave out such rows");
  }
  if (std::any_of(labels.begin(), labels.end(), [](double label) { return !(label >= 0 && label <= 1); })) {
    refuse_input("logistic regression got a label that is not in 0 to 1");
  }
  const auto n = static_cast<Eigen::Index>(labels.size());
  RowMatrix design(n, features + 1);
  design.leftCols(features) = Eigen::Map<const RowMatrix>(rows.data(), n, features);
  design.col(features).setOnes();

  LogisticModel model;
  model.weights.assign(static_cast<std::size_t>(features), 0.0);
  for (Eigen::Index i = 0; i < features; ++i) {
    auto column = design.col(i);
    const double mean = column.mean();
    column.array() -= mean;
    const double deviation = std::sqrt(column.squaredNorm() / static_cast<double>(n));
    const double scale = deviation > 1e-12 * std::abs(mean) && deviation > 0 ? deviation : 1;
    column /= scale;
    model.means.push_back(mean);
    model.scales.push_back(scale);
  }
  Eigen::VectorXd target(n);
  std::copy(labels.begin(), labels.end(), target.data());
  const double ones = target.sum();
  if (ones == 0 || ones == static_cast<double>(n)) {
    model.intercept = std::log((ones + 0.5) / (static_cast<double>(n) - ones + 0.5));
    return model;
  }
  const Eigen::VectorXd weights = minimise(design, target, l2);
  std::copy_n(weights.data(), features, model.weights.begin());
  model.intercept = weights[features];
  return model;
}

double LogisticModel::predict(std::span<const double> x) const {
  if (x.size() != weights.size()) {
    refuse_input(fmt::format("logistic regression got {} features; {} are expected", x.size(), weights.size()));
  }
  double score = intercept;
  for (std::size_t i = 0; i < x.size(); ++i) score += weights[i] * ((x[i] - means[i]) / scales[i]);
  return sigmoid(score);
}

}  // namespace llmcache
