// RiskGate against simulated traffic. No model and no LibTorch.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "llmcache/error.h"
#include "refresh/sequential_test.h"
#include "simulation.h"

namespace llmcache {
namespace {

/// A stream of requests of which a share can be answered by reuse, each such answer wrong with some probability.
class Traffic {
 public:
  Traffic(RiskGate::Settings settings, double reusable = 1)
      : gate(settings), reusable_(reusable), generator_(settings.seed + 1000) {}

  /// `error`: of all requests, were every reusable one answered by reuse. Returns the wrong answers served.
  int serve(int requests, double error) {
    int wrong = 0;
    for (int i = 0; i < requests; ++i) {
      const bool could = uniform(generator_) < reusable_;
      const bool bad = could && uniform(generator_) < error / reusable_;
      const RiskGate::Decision decision = gate.next(could);
      if (decision.audit) {
        gate.record(decision, bad ? 1 : 0);
      } else if (decision.reuse && bad) {
        ++wrong;
      }
    }
    return wrong;
  }

  RiskGate gate;

 private:
  double reusable_;
  std::mt19937_64 generator_;
};

constexpr double kBudget = 0.01;

TEST(RiskGate, StaysOpenWithinItsBudget) {
  constexpr int kSeeds = 200;
  for (const double reusable : {1.0, 0.4}) {
    // At the very budget too: the promise holds up to there.
    for (const double error : {0.6 * kBudget, kBudget}) {
      int closed = 0;
      double audits = 0;
      for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
        Traffic traffic({.epsilon = kBudget, .audit_rate = 0.05, .seed = seed}, reusable);
        traffic.serve(20000, error);
        const RiskGate::Counters counters = traffic.gate.counters();
        closed += counters.closings > 0 ? 1 : 0;
        audits += static_cast<double>(counters.audits) / static_cast<double>(counters.candidates) / kSeeds;
      }
      EXPECT_LE(closed, (0.01 + three_errors(kSeeds, 0.01)) * kSeeds) << "error " << error;
      EXPECT_LE(audits, error < kBudget ? 0.08 : 0.15);
    }
  }
}

TEST(RiskGate, DriftIsAnsweredByAuditsAndThenByClosing) {
  constexpr int kSeeds = 200;
  struct Case {
    double audit_rate, drift, below;
  };
  for (const Case& c : {Case{0.1, 3, 0.65}, Case{0.1, 5, 0.7}, Case{0.05, 5, 0.45}}) {
    int below = 0;
    int closed = 0;
    double wrong = 0;
    for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
      Traffic traffic({.epsilon = kBudget, .audit_rate = c.audit_rate, .seed = seed});
      traffic.serve(20000, 0.4 * kBudget);
      const int served = traffic.serve(2000, c.drift * kBudget);
      wrong += static_cast<double>(served) / kSeeds;
      below += served < 2000 * kBudget ? 1 : 0;
      traffic.serve(4000, c.drift * kBudget);
      closed += traffic.gate.open() ? 0 : 1;
    }
    EXPECT_GE(below, c.below * kSeeds) << "audit rate " << c.audit_rate << ", drift " << c.drift;
    EXPECT_GE(closed, 0.9 * kSeeds);
    EXPECT_LE(wrong, 0.6 * 2000 * c.drift * kBudget);  // of what would have been served
  }
}

TEST(RiskGate, OpensAgainWhenTheDriftIsOver) {
  constexpr int kSeeds = 50;
  int opened = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    Traffic traffic({.epsilon = kBudget, .seed = seed}, 0.7);
    traffic.serve(5000, 8 * kBudget);
    ASSERT_FALSE(traffic.gate.open());
    EXPECT_EQ(traffic.serve(100, 8 * kBudget), 0);
    traffic.serve(8000, 0.2 * kBudget);
    opened += traffic.gate.open() ? 1 : 0;
  }
  EXPECT_GE(opened, 0.9 * kSeeds);
}

TEST(RiskGate, LastingDriftDoesNotMakeItFlap) {
  constexpr int kSeeds = 100;
  std::uint64_t reopenings = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    // Hardly over the budget: the hardest to tell.
    Traffic traffic({.epsilon = kBudget, .seed = seed});
    traffic.serve(3000, 20 * kBudget);
    ASSERT_FALSE(traffic.gate.open());
    traffic.serve(30000, 1.05 * kBudget);
    reopenings += traffic.gate.counters().reopenings;
  }
  EXPECT_LE(static_cast<double>(reopenings), (0.1 + three_errors(kSeeds, 0.1)) * kSeeds);
}

TEST(RiskGate, EstimateIsUnbiased) {
  constexpr int kSeeds = 100;
  double mean = 0;
  double squares = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    Traffic traffic({.epsilon = 0.2, .audit_rate = 0.1, .max_audit_rate = 0.5, .seed = seed}, 0.5);
    traffic.serve(2000, 0.1);
    const RiskGate::Counters counters = traffic.gate.counters();
    ASSERT_TRUE(counters.open);
    EXPECT_EQ(counters.period_requests, 2000U);
    mean += counters.error_estimate / kSeeds;
    squares += counters.error_estimate * counters.error_estimate / kSeeds;
  }
  EXPECT_NEAR(mean, 0.1, 4 * std::sqrt((squares - mean * mean) / kSeeds));
}

TEST(RiskGate, AuditsAreFrequentAfterAnErrorAndAfterOpeningAgain) {
  constexpr RiskGate::Settings kSettings{.epsilon = kBudget, .audit_rate = 0.05};
  Traffic traffic(kSettings);
  // What was certified begins with few audits.
  traffic.serve(2000, 0);
  EXPECT_NEAR(static_cast<double>(traffic.gate.counters().audits), 100, 4 * std::sqrt(2000 * 0.05 * 0.95));
  EXPECT_NEAR(traffic.gate.counters().audit_rate, 0.05, 1e-9);
  while (traffic.gate.counters().losses == 0) traffic.serve(1, 1);
  EXPECT_GE(traffic.gate.counters().audit_rate, 0.5);
  while (traffic.gate.open()) traffic.serve(1, 1);
  while (!traffic.gate.open()) traffic.serve(1, 0);
  const std::uint64_t opened = traffic.gate.counters().audits;
  traffic.serve(50, 0);
  EXPECT_GE(traffic.gate.counters().audits - opened, 25U);
  traffic.serve(5000, 0);
  EXPECT_NEAR(traffic.gate.counters().audit_rate, 0.05, 1e-9);
}

TEST(RiskGate, ClosedGateObservesOnlyItsShare) {
  Traffic traffic({.epsilon = kBudget, .closed_audit_rate = 0.2});
  traffic.serve(1000, 1);
  ASSERT_FALSE(traffic.gate.open());
  const std::uint64_t before = traffic.gate.counters().audits;
  traffic.serve(5000, 0.5);
  EXPECT_NEAR(static_cast<double>(traffic.gate.counters().audits - before), 1000, 4 * std::sqrt(5000 * 0.2 * 0.8));
  EXPECT_NEAR(traffic.gate.counters().error_estimate, 0.5, 0.15);
  traffic.serve(20000, 0);
  EXPECT_TRUE(traffic.gate.open());
}

TEST(RiskGate, ClosesOnSmallRealLosses) {
  RiskGate gate({.epsilon = kBudget});
  int requests = 0;
  for (; gate.open() && requests < 5000; ++requests) {
    const RiskGate::Decision decision = gate.next(true);
    if (decision.audit) gate.record(decision, 0.05);
  }
  EXPECT_LE(requests, 300);
}

TEST(RiskGate, LateRecordsCountButBelongToTheirPeriod) {
  RiskGate gate({.epsilon = kBudget, .audit_rate = 1});
  std::vector<RiskGate::Decision> late(300);
  for (RiskGate::Decision& decision : late) decision = gate.next(true);
  while (gate.open()) gate.record(gate.next(true), 1);
  const RiskGate::Counters closed = gate.counters();
  for (const RiskGate::Decision& decision : late) gate.record(decision, 0);
  EXPECT_FALSE(gate.open());
  EXPECT_EQ(gate.counters().audits, closed.audits + late.size());
  EXPECT_EQ(gate.counters().capital, closed.capital);
  // What is no loss counts as the worst: the gate must not open on it.
  for (int i = 0; i < 5000; ++i) gate.record(gate.next(true), std::nan(""));
  EXPECT_FALSE(gate.open());
}

TEST(RiskGate, ClosedByForceItOpensByAuditsAlone) {
  RiskGate gate({.epsilon = 0.1, .audit_rate = 0.5});
  gate.close();
  EXPECT_FALSE(gate.open());
  EXPECT_EQ(gate.counters().closings, 1U);
  for (int i = 0; i < 5000; ++i) gate.next(false);
  EXPECT_FALSE(gate.open()) << "nothing was audited";
  gate.record(gate.next(true), 0);
  for (int i = 0; i < 5000 && !gate.open(); ++i) gate.next(false);
  EXPECT_TRUE(gate.open());
  EXPECT_EQ(gate.counters().reopenings, 1U);
}

TEST(RiskGate, ClosingByForceDoesNotBluntTheTest) {
  RiskGate gate({.epsilon = 0.1, .audit_rate = 0.5});
  const double level = gate.counters().level;
  for (int times = 0; times < 3; ++times) {
    gate.close();
    gate.close();
    for (int i = 0; i < 20000 && !gate.open(); ++i) gate.record(gate.next(true), 0);
    ASSERT_TRUE(gate.open());
  }
  EXPECT_EQ(gate.counters().closings, 3U);
  EXPECT_EQ(gate.counters().level, level);
}

TEST(RiskGate, FailedAuditsCountAsLossesWhileClosedAndAsNothingWhileOpen) {
  RiskGate gate({.epsilon = kBudget, .audit_rate = 1});
  for (int i = 0; i < 5000; ++i) gate.fail(gate.next(true));
  EXPECT_TRUE(gate.open());
  EXPECT_EQ(gate.counters().audits, 0U);
  while (gate.open()) gate.record(gate.next(true), 1);
  // One in ten fails: right or not, that is more than the budget.
  for (int i = 0; i < 20000; ++i) {
    const auto decision = gate.next(true);
    i % 10 == 0 ? gate.fail(decision) : gate.record(decision, 0);
    ASSERT_FALSE(gate.open());
  }
  // However many failed, it opens no later once they do not.
  int audits = 0;
  for (; audits < 20000 && !gate.open(); ++audits) gate.record(gate.next(true), 0);
  EXPECT_TRUE(gate.open());
  EXPECT_LT(audits, 3000);
}

TEST(RiskGate, ManyThreads) {
  constexpr int kThreads = 4;
  constexpr int kRequests = 5000;
  RiskGate gate({.epsilon = 0.1});
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kRequests; ++i) {
        const RiskGate::Decision decision = gate.next(true);
        if (decision.audit) gate.record(decision, 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const RiskGate::Counters counters = gate.counters();
  EXPECT_EQ(counters.requests, static_cast<std::uint64_t>(kThreads * kRequests));
  EXPECT_TRUE(counters.open);
  EXPECT_EQ(counters.losses, 0);
}

TEST(RiskGate, RefusesBadSettings) {
  expect_error(ErrorCode::kInvalidOptions, "epsilon is 0", [] { RiskGate gate({.epsilon = 0}); });
  expect_error(ErrorCode::kInvalidOptions, "audit_rate is 0.6",
               [] { RiskGate gate({.audit_rate = 0.6, .max_audit_rate = 0.5}); });
  expect_error(ErrorCode::kInvalidOptions, "close_level is 1", [] { RiskGate gate({.close_level = 1}); });
  expect_error(ErrorCode::kInvalidOptions, "closed_audit_rate is 0", [] { RiskGate gate({.closed_audit_rate = 0}); });
}

}  // namespace
}  // namespace llmcache
