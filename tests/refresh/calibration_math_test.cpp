// The statistics behind an error budget: bounds, tests, regressions. No model and no LibTorch; all draws are seeded.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "refresh/candidate_choice.h"
#include "refresh/logistic.h"
#include "refresh/ridge.h"
#include "refresh/risk_bound.h"
#include "simulation.h"

namespace llmcache {
namespace {

using Losses = std::vector<double>;

Losses bernoulli(std::mt19937_64& generator, std::size_t n, double p) {
  Losses losses(n);
  for (double& loss : losses) loss = uniform(generator) < p ? 1 : 0;
  return losses;
}

double sum(const Losses& losses) {
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

/// The share of `draws` in which `happens`.
double share_of(int draws, const std::function<bool()>& happens) {
  int count = 0;
  for (int i = 0; i < draws; ++i) count += happens() ? 1 : 0;
  return static_cast<double>(count) / draws;
}

TEST(RiskBound, BinomialAgainstTheSumOfItsTerms) {
  for (const double p : {0.001, 0.02, 0.5, 0.97}) {
    for (const int n : {1, 7, 60}) {
      double term = std::pow(1 - p, n);
      double total = 0;
      for (int k = 0; k <= n; ++k) {
        total += term;
        EXPECT_NEAR(binomial_cdf(k, n, p), total, 1e-12) << k << " of " << n << ", p " << p;
        term *= static_cast<double>(n - k) / (k + 1) * p / (1 - p);
      }
    }
  }
  EXPECT_EQ(binomial_cdf(0, 10, 0), 1);
  EXPECT_EQ(binomial_cdf(9, 10, 1), 0);
  EXPECT_NEAR(binomial_cdf(1000000, 2000000, 0.5), 0.5 + 0.5 / std::sqrt(3.14159265358979 * 1e6),
              1e-8);  // half, and half of P(X = n/2)
}

TEST(RiskBound, ClopperPearsonSolvesItsEquation) {
  EXPECT_NEAR(clopper_pearson_upper(0, 100, 0.05), 1 - std::pow(0.05, 0.01), 1e-12);  // the closed form at 0 errors
  EXPECT_EQ(clopper_pearson_upper(5, 5, 0.1), 1);
  EXPECT_EQ(clopper_pearson_upper(0, 0, 0.1), 1);
  for (const int n : {10, 300, 5000}) {
    for (const int errors : {0, 1, n / 50, n / 2, n - 1}) {
      const double upper = clopper_pearson_upper(errors, n, 0.1);
      EXPECT_NEAR(binomial_cdf(errors, n, upper), 0.1, 1e-9) << errors << " of " << n;
      EXPECT_GT(upper, static_cast<double>(errors) / n);
    }
  }
}

TEST(RiskBound, ClopperPearsonCovers) {
  std::mt19937_64 generator(1);
  constexpr int kDraws = 4000;
  for (const int n : {5, 40, 200}) {
    for (const double risk : {0.01, 0.1, 0.5}) {
      const double missed = share_of(kDraws, [&] {
        const auto errors = static_cast<std::int64_t>(sum(bernoulli(generator, static_cast<std::size_t>(n), risk)));
        return clopper_pearson_upper(errors, n, 0.1) < risk;
      });
      EXPECT_LE(missed, 0.1 + three_errors(kDraws, 0.1)) << "n " << n << ", risk " << risk;
    }
  }
}

/// Losses of mean `mean` whose shape differs: mostly 0 and seldom 1, all alike, anything between.
const std::vector<std::function<double(std::mt19937_64&, double)>> kShapes = {
    [](std::mt19937_64& generator, double mean) { return uniform(generator) < mean ? 1.0 : 0.0; },
    [](std::mt19937_64& generator, double mean) { return 2 * mean * uniform(generator); },
    [](std::mt19937_64& generator, double mean) { return uniform(generator) < 0.2 ? 5 * mean * 0.99 : mean * 0.0125; },
};

TEST(RiskBound, PValuesAreValidWhereTheMeanIsEpsilon) {
  std::mt19937_64 generator(2);
  constexpr int kDraws = 3000;
  for (const double epsilon : {0.01, 0.1}) {
    for (const std::size_t n : {20U, 150U}) {
      for (std::size_t shape = 0; shape < kShapes.size(); ++shape) {
        int betting = 0;
        int bentkus = 0;
        for (int draw = 0; draw < kDraws; ++draw) {
          Losses losses(n);
          for (double& loss : losses) loss = kShapes[shape](generator, epsilon);
          betting += betting_p_value(losses, epsilon) <= 0.1 ? 1 : 0;
          bentkus += hoeffding_bentkus_p_value(sum(losses) / static_cast<double>(n), static_cast<std::int64_t>(n),
                                               epsilon) <= 0.1
                         ? 1
                         : 0;
        }
        const double limit = (0.1 + three_errors(kDraws, 0.1)) * kDraws;
        EXPECT_LE(betting, limit) << "epsilon " << epsilon << ", n " << n << ", shape " << shape;
        EXPECT_LE(bentkus, limit) << "epsilon " << epsilon << ", n " << n << ", shape " << shape;
      }
    }
  }
}

TEST(RiskBound, BettingKnowsSmallVariance) {
  std::mt19937_64 generator(3);
  constexpr double kEpsilon = 0.05;
  Losses losses(300);
  for (double& loss : losses) loss = 2 * 0.6 * kEpsilon * uniform(generator);
  EXPECT_LE(betting_p_value(losses, kEpsilon), 0.05);
  EXPECT_GE(hoeffding_bentkus_p_value(sum(losses) / 300, 300, kEpsilon), 0.1);
  // Binary losses have no small variance to know: the exact test is close to the best there is.
  EXPECT_NEAR(binomial_cdf(0, 300, 0.01), std::pow(0.99, 300), 1e-12);
  EXPECT_EQ(betting_p_value({}, kEpsilon), 1);
  EXPECT_EQ(betting_p_value(Losses(50, 1.0), kEpsilon), 1);
}

TEST(RiskBound, ChosenLevelsAreSafe) {
  std::mt19937_64 generator(4);
  constexpr int kDraws = 3000;
  constexpr double kEpsilon = 0.05;
  const std::vector<double> risks = {0.005, 0.02, 0.04, 0.055, 0.09};  // the last two are not
  for (const LossKind kind : {LossKind::kBinary, LossKind::kReal}) {
    const auto shape = kind == LossKind::kBinary ? kShapes[0] : kShapes[2];
    const auto choose = [&](std::size_t n) {
      std::vector<Losses> levels(risks.size(), Losses(n));
      for (std::size_t level = 0; level < risks.size(); ++level) {
        for (double& loss : levels[level]) loss = shape(generator, risks[level]);
      }
      return choose_level(levels, kEpsilon, 0.1, kind);
    };
    for (const std::size_t n : {60U, 300U}) {
      const double unsafe = share_of(kDraws, [&] { return choose(n) >= 3; });
      EXPECT_LE(unsafe, 0.1 + three_errors(kDraws, 0.1)) << "n " << n;
    }
    EXPECT_GE(share_of(200, [&] { return choose(1000) >= 1; }), 0.9);  // power
    EXPECT_GE(share_of(200, [&] { return choose(4000) >= 2; }), 0.6);
  }
}

TEST(RiskBound, LevelsStopAtTheFirstNotProven) {
  const Losses clean(500, 0.0);
  const Losses dirty(500, 1.0);
  const std::vector<Losses> levels = {clean, clean, dirty, clean};
  EXPECT_EQ(choose_level(levels, 0.01, 0.1, LossKind::kBinary), 1);
  EXPECT_EQ(choose_level(levels, 0.01, 0.1, LossKind::kReal), 1);
  EXPECT_EQ(choose_level(std::vector<Losses>{dirty, clean}, 0.01, 0.1, LossKind::kBinary), -1);
  EXPECT_EQ(choose_level(std::vector<Losses>{Losses(100, 0.0)}, 0.01, 0.1, LossKind::kBinary), -1);  // too few: .99^100
  EXPECT_EQ(choose_level({}, 0.01, 0.1, LossKind::kBinary), -1);
}

TEST(RiskBound, RefusesWhatIsNoLoss) {
  expect_error(ErrorCode::kInvalidOptions, "epsilon is 0", [] { betting_p_value(Losses{0.0}, 0); });
  expect_error(ErrorCode::kInvalidOptions, "delta is 1", [] { clopper_pearson_upper(0, 5, 1); });
  expect_error(ErrorCode::kInvalidInput, "6 of 5", [] { clopper_pearson_upper(6, 5, 0.1); });
  expect_error(ErrorCode::kInvalidInput, "loss is -0.5", [] { betting_p_value(Losses{-0.5}, 0.1); });
  expect_error(ErrorCode::kInvalidInput, "loss is nan", [] { hoeffding_bentkus_p_value(std::nan(""), 5, 0.1); });
  expect_error(ErrorCode::kInvalidInput, "binary loss is 0.5",
               [] { choose_level(std::vector<Losses>{{0.5}}, 0.1, 0.1, LossKind::kBinary); });
}

TEST(Logistic, FindsTheWeightsOfItsOwnModel) {
  std::mt19937_64 generator(5);
  std::normal_distribution<double> normal;
  std::vector<double> rows;
  std::vector<double> labels;
  const auto truth = [](double a, double b) { return 1 / (1 + std::exp(-(0.5 + 2 * a - 0.01 * (b - 100)))); };
  for (int i = 0; i < 20000; ++i) {
    const double a = normal(generator);
    const double b = 100 + 50 * normal(generator);
    rows.insert(rows.end(), {a, b, 7.0});  // the last one never varies
    labels.push_back(uniform(generator) < truth(a, b) ? 1 : 0);
  }
  const LogisticModel model = LogisticModel::fit(rows, labels, 3);
  for (const auto& [a, b] : std::vector<std::pair<double, double>>{{-2, 50}, {0, 100}, {1, 180}}) {
    EXPECT_NEAR(model.predict(std::vector<double>{a, b, 7.0}), truth(a, b), 0.02);
  }
  EXPECT_EQ(model.weights[2], 0);
  // At the optimum the gradient, penalty included, is zero.
  std::vector<double> gradient(3);
  double intercept = 0;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const std::span x(rows.data() + 3 * i, 3);
    const double residual = model.predict(x) - labels[i];
    for (std::size_t j = 0; j < 3; ++j) gradient[j] += residual * (x[j] - model.means[j]) / model.scales[j];
    intercept += residual;
  }
  for (std::size_t j = 0; j < 3; ++j) EXPECT_NEAR(gradient[j] + model.weights[j], 0, 1e-3);
  EXPECT_NEAR(intercept, 0, 1e-3);
}

TEST(Logistic, StaysFiniteWhereClassesAreSeparableOrAlone) {
  const std::vector<double> rows = {1, 2, 3, 4, 5, 6};
  const std::vector<double> labels = {0, 0, 0, 1, 1, 1};
  for (const double l2 : {0.0, 1.0}) {
    const LogisticModel model = LogisticModel::fit(rows, labels, 1, l2);
    EXPECT_TRUE(std::isfinite(model.weights[0]));
    EXPECT_LT(model.predict(std::vector{3.0}), 0.5);
    EXPECT_GT(model.predict(std::vector{4.0}), 0.5);
  }
  EXPECT_GT(LogisticModel::fit(rows, labels, 1, 0.0).weights[0], LogisticModel::fit(rows, labels, 1, 1.0).weights[0]);
  const std::vector<double> alone(6, 1);
  const LogisticModel one = LogisticModel::fit(rows, alone, 1);
  EXPECT_NEAR(one.predict(std::vector{100.0}), 6.5 / 7, 1e-12);
  EXPECT_NEAR(one.predict(std::vector{-100.0}), 6.5 / 7, 1e-12);
}

TEST(Logistic, RefusesWhatDoesNotFit) {
  const std::vector<double> rows = {1, 2, 3};
  const std::vector<double> labels = {0, 1, 2};
  expect_error(ErrorCode::kInvalidInput, "not in 0 to 1", [&] { LogisticModel::fit(rows, labels, 1); });
  expect_error(ErrorCode::kInvalidInput, "3 values and 3 labels for 2", [&] { LogisticModel::fit(rows, labels, 2); });
  const std::vector<double> bad = {1, std::nan(""), 3};
  expect_error(ErrorCode::kInvalidInput, "not finite", [&] {
    LogisticModel::fit(bad, std::vector<double>{0, 1, 1}, 1);
  });
  expect_error(ErrorCode::kInvalidOptions, "l2 is -1", [&] {
    LogisticModel::fit(rows, std::vector<double>{0, 1, 1}, 1, -1);
  });
}

struct Linear {
  std::vector<float> x, y;
};

/// y = 3 - x0 + 2 x1 (first output), x0 / 2 (second), with noise; inputs about 1000.
Linear linear_sample(std::size_t n, double noise, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  Linear sample;
  for (std::size_t i = 0; i < n; ++i) {
    const double a = 1000 + normal(generator);
    const double b = 1000 + normal(generator);
    sample.x.insert(sample.x.end(), {static_cast<float>(a), static_cast<float>(b)});
    sample.y.push_back(static_cast<float>(3 - a + 2 * b + noise * normal(generator)));
    sample.y.push_back(static_cast<float>(a / 2 + noise * normal(generator)));
  }
  return sample;
}

TEST(Ridge, FindsALinearMapFarFromTheOrigin) {
  const Linear sample = linear_sample(500, 0, 6);
  const RidgeModel model = RidgeModel::fit(sample.x, sample.y, 2, 2, 1e-9);
  EXPECT_THAT(model.weights, ::testing::Pointwise(::testing::FloatNear(1e-3F), {-1.0F, 0.5F, 2.0F, 0.0F}));
  std::vector<float> y(4);
  const std::vector<float> x = {1001, 1002, 999, 1000};
  model.predict(x, y);
  EXPECT_THAT(y, ::testing::Pointwise(::testing::FloatNear(0.01F), {1006.0F, 500.5F, 1004.0F, 499.5F}));
  EXPECT_TRUE(std::isnan(model.held_out_error));
}

TEST(Ridge, ShrinksByItsPenalty) {
  // One centred input of variance v: the weight is 1 / (1 + lambda) of the least-squares one, by the unit of lambda.
  const std::vector<float> x = {-1, 1, -1, 1};
  const std::vector<float> y = {-2, 2, -2, 2};
  EXPECT_NEAR(RidgeModel::fit(x, y, 1, 1, 1.0).weights[0], 1.0, 1e-6);
  EXPECT_NEAR(RidgeModel::fit(x, y, 1, 1, 3.0).weights[0], 0.5, 1e-6);
}

TEST(Ridge, ChoosesLambdaByHeldOutError) {
  const Linear clean = linear_sample(500, 0.01, 7);
  const RidgeModel good = RidgeModel::fit(clean.x, clean.y, 2, 2);
  EXPECT_LE(good.lambda, 1e-3);
  EXPECT_LT(good.held_out_error, 0.01);

  // 30 rows of 25 inputs that mean nothing: the largest penalty is the best, and no better than the mean.
  std::mt19937_64 generator(8);
  std::normal_distribution<float> normal;
  std::vector<float> x(std::size_t{30} * 25);
  std::vector<float> y(30);
  for (float& value : x) value = normal(generator);
  for (float& value : y) value = normal(generator);
  const RidgeModel noise = RidgeModel::fit(x, y, 25, 1);
  EXPECT_GE(noise.lambda, 1.0);
  EXPECT_GT(noise.held_out_error, 0.5);
}

TEST(Ridge, HeldOutErrorIsThatOfTheHeldOutRows) {
  const Linear sample = linear_sample(400, 0.5, 9);
  const RidgeModel model = RidgeModel::fit(sample.x, sample.y, 2, 2);
  Linear fitted;
  Linear held;
  for (std::size_t row = 0; row < 400; ++row) {
    Linear& to = row % 5 == 4 ? held : fitted;
    to.x.insert(to.x.end(), sample.x.begin() + 2 * row, sample.x.begin() + 2 * row + 2);
    to.y.insert(to.y.end(), sample.y.begin() + 2 * row, sample.y.begin() + 2 * row + 2);
  }
  std::vector<float> prediction(held.y.size());
  RidgeModel::fit(fitted.x, fitted.y, 2, 2, model.lambda).predict(held.x, prediction);
  double error = 0;
  double spread = 0;
  double means[2] = {};
  for (std::size_t i = 0; i < fitted.y.size(); ++i) means[i % 2] += fitted.y[i] / (0.5 * fitted.y.size());
  for (std::size_t i = 0; i < held.y.size(); ++i) {
    error += std::pow(held.y[i] - prediction[i], 2);
    spread += std::pow(held.y[i] - means[i % 2], 2);
  }
  EXPECT_NEAR(model.held_out_error, error / spread, 1e-4);
}

TEST(Ridge, RefusesWhatDoesNotFit) {
  const std::vector<float> x = {1, 2, 3, 4};
  const std::vector<float> y = {1, 2};
  expect_error(ErrorCode::kInvalidInput, "4 values for 3 inputs", [&] { RidgeModel::fit(x, y, 3, 1, 1); });
  expect_error(ErrorCode::kInvalidInput, "at least 10", [&] { RidgeModel::fit(x, y, 2, 1); });
  expect_error(ErrorCode::kInvalidOptions, "lambda is -1", [&] { RidgeModel::fit(x, y, 2, 1, -1); });
  const std::vector<float> bad = {1, INFINITY, 3, 4};
  expect_error(ErrorCode::kInvalidInput, "not finite", [&] { RidgeModel::fit(bad, y, 2, 1, 1); });
  std::vector<float> room(3);
  expect_error(ErrorCode::kInvalidInput, "room for 3", [&] { RidgeModel::fit(x, y, 2, 1, 1).predict(x, room); });
}

TEST(Candidates, ComputeLessAndErrMore) {
  const auto draws = [](const std::vector<std::pair<double, double>>& settings) {
    CandidateDraw draw;
    for (const auto& [error, computed] : settings) {
      draw.errors.push_back(error);
      draw.computed.push_back(computed);
    }
    return std::vector<CandidateDraw>{draw, draw};
  };
  using Candidates = std::vector<std::size_t>;
  // The safest comes first where it is not safe at all; what computes more and errs more never does.
  EXPECT_EQ(choose_candidates(draws({{0.08, 0.3}, {0.05, 0.5}, {0.06, 0.6}, {0.2, 0.1}}), 0.1), (Candidates{1, 0}));
  EXPECT_EQ(choose_candidates(draws({{0.01, 0.7}, {0.02, 0.6}, {0.05, 0.4}, {0.09, 0.3}}), 0.1), (Candidates{1, 2, 3}));
  // One that computes less than all safer ones, and errs no more.
  EXPECT_EQ(choose_candidates(draws({{0.01, 0.2}, {0.05, 0.4}}), 0.1), (Candidates{0}));
  EXPECT_EQ(choose_candidates(draws({{0.2, 0.2}, {0.3, 0.1}}), 0.1), Candidates{});
  EXPECT_EQ(choose_candidates(draws({{0, 1}, {0, 1}}), 0.1), Candidates{});
  EXPECT_EQ(choose_candidates({}, 0.1), Candidates{});
}

}  // namespace
}  // namespace llmcache
