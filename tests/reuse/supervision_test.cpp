// Supervision of Fidelity::kBudget where audits fail: what is counted, what is closed, and how it opens again.
#include "reuse/budget/supervision.h"

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "budget_support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

std::exception_ptr some_error(const char* text) { return std::make_exception_ptr(std::runtime_error(text)); }

// --- by itself ----------------------------------------------------------------------------------------

class SupervisionOfGates : public ::testing::Test {
 protected:
  SupervisionOfGates() : supervision_(failures_, {settings(1), settings(2)}) {}

  static RiskGate::Settings settings(std::uint64_t seed) { return {.epsilon = 0.2, .audit_rate = 1, .seed = seed}; }
  AskedAudit ask(std::size_t level = 0) { return {level, supervision_.next(level, true)}; }
  void fail(AuditPlace place = AuditPlace::kWithinCall) {
    supervision_.fail({ask()}, place, some_error("no memory left"));
  }
  void succeed(AuditPlace place = AuditPlace::kWithinCall) { supervision_.record(ask(), 0, place); }

  Warnings warnings_;
  const c10::WarningUtils::WarningHandlerGuard guard_{&warnings_};
  AuditFailures failures_;
  Supervision supervision_;
};

TEST_F(SupervisionOfGates, FailuresInARowCloseAllLevels) {
  for (std::uint64_t i = 1; i < Supervision::kMostFailed; ++i) fail();
  EXPECT_EQ(supervision_.threshold_index(), 0U);
  succeed();
  for (std::uint64_t i = 1; i < Supervision::kMostFailed; ++i) fail();
  EXPECT_EQ(supervision_.threshold_index(), 0U) << "not in a row";
  fail();
  EXPECT_EQ(supervision_.threshold_index(), supervision_.thresholds());
  EXPECT_FALSE(supervision_.next(0, true).reuse);
  EXPECT_EQ(supervision_.counters().closings, 2U);
  EXPECT_EQ(failures_.count(), 2 * Supervision::kMostFailed - 1);
  EXPECT_THAT(failures_.last_reason(), HasSubstr("no memory left"));
  // One warning for failures, one for the stop.
  for (int i = 0; i < 20; ++i) fail();
  EXPECT_EQ(warnings_.count, 2) << warnings_.texts;
  EXPECT_THAT(warnings_.texts, HasSubstr("no memory left"));
  fail(AuditPlace::kInBackground);
  EXPECT_EQ(warnings_.count, 3) << warnings_.texts;
}

/// A budget is for the mean over all requests. One in four is served here and wrong in half of all cases.
TEST_F(SupervisionOfGates, RequestsThatAreServedElsewhereCount) {
  for (int i = 0; i < 400; ++i) {
    supervision_.record(ask(), i % 2, AuditPlace::kWithinCall);
    for (int k = 0; k < 3; ++k) supervision_.pass_over();
  }
  EXPECT_EQ(supervision_.threshold_index(), 0U) << "the mean is 0.125";
  for (int i = 0; i < 400; ++i) supervision_.record(ask(), i % 2, AuditPlace::kWithinCall);
  EXPECT_GT(supervision_.threshold_index(), 0U);
}

TEST_F(SupervisionOfGates, OnlyAuditsThatSucceedOpenAgain) {
  for (std::uint64_t i = 0; i < Supervision::kMostFailed; ++i) fail();
  // Requests without a proposal, and more failures, say nothing.
  for (int i = 0; i < 1000; ++i) supervision_.next(0, false);
  for (int i = 0; i < 1000; ++i) fail();
  ASSERT_EQ(supervision_.threshold_index(), supervision_.thresholds());
  int audits = 0;
  for (; supervision_.threshold_index() == supervision_.thresholds() && audits < 500; ++audits) succeed();
  EXPECT_EQ(supervision_.threshold_index(), 0U);
  EXPECT_GT(audits, 5);    // by the gate's rule, not at once
  EXPECT_LT(audits, 100);  // and no later because so many failed
}

TEST_F(SupervisionOfGates, WhatFailsAmongAuditsThatSucceedIsNotTakenForRight) {
  for (std::uint64_t i = 0; i < Supervision::kMostFailed; ++i) fail();
  for (int i = 0; i < 3000; ++i) {
    i % 2 == 0 ? succeed() : fail();
    ASSERT_EQ(supervision_.threshold_index(), supervision_.thresholds())
        << "after " << i << " audits of which half failed";
  }
}

TEST_F(SupervisionOfGates, ThoseInTheBackgroundAreARowOfTheirOwn) {
  for (std::uint64_t i = 0; i < Supervision::kMostFailed; ++i) {
    fail(AuditPlace::kInBackground);
    succeed();
  }
  ASSERT_EQ(supervision_.threshold_index(), supervision_.thresholds());
  for (int i = 0; supervision_.threshold_index() == supervision_.thresholds() && i < 500; ++i) succeed();
  ASSERT_EQ(supervision_.threshold_index(), 0U);
  fail(AuditPlace::kInBackground);
  EXPECT_EQ(supervision_.threshold_index(), supervision_.thresholds()) << "none has succeeded there since";
  for (int i = 0; supervision_.threshold_index() == supervision_.thresholds() && i < 500; ++i) succeed();
  succeed(AuditPlace::kInBackground);
  fail(AuditPlace::kInBackground);
  EXPECT_EQ(supervision_.threshold_index(), 0U);
}

TEST_F(SupervisionOfGates, AQueueThatStaysFullClosesToo) {
  for (std::uint64_t i = 1; i < Supervision::kMostDropped; ++i) supervision_.drop({ask()});
  supervision_.queued();
  for (std::uint64_t i = 1; i < Supervision::kMostDropped; ++i) supervision_.drop({ask()});
  EXPECT_EQ(supervision_.threshold_index(), 0U);
  supervision_.drop({ask()});
  EXPECT_EQ(supervision_.threshold_index(), supervision_.thresholds());
  EXPECT_EQ(failures_.count(), 0U) << "they did not fail";
  EXPECT_EQ(warnings_.count, 2) << warnings_.texts;
  for (int i = 0; supervision_.threshold_index() == supervision_.thresholds() && i < 500; ++i) succeed();
  EXPECT_EQ(supervision_.threshold_index(), 0U);
}

TEST_F(SupervisionOfGates, AHandlerThatThrowsEndsNothing) {
  class Throws final : public c10::WarningHandler {
   public:
    void process(const c10::Warning&) override { throw std::runtime_error("warnings are errors here"); }
  } throws;
  const c10::WarningUtils::WarningHandlerGuard guard(&throws);
  EXPECT_NO_THROW(fail());
  EXPECT_EQ(failures_.count(), 1U);
}

TEST_F(SupervisionOfGates, AnythingThrownHasAReason) {
  supervision_.fail({ask()}, AuditPlace::kWithinCall, std::make_exception_ptr(42));
  EXPECT_THAT(failures_.last_reason(), HasSubstr("no std::exception"));
}

// --- in a cache ---------------------------------------------------------------------------------------

/// Scores that the test lets fail.
struct Scores {
  enum class Mode { kFine, kThrow, kThrowElsewhere, kBlockElsewhere, kThrowEveryThird };

  at::Tensor operator()(const at::Tensor& outputs) {
    const bool elsewhere = std::this_thread::get_id() != serving;
    if (mode == Mode::kThrow || (mode == Mode::kThrowElsewhere && elsewhere) ||
        (mode == Mode::kThrowEveryThird && ++calls % 3 == 0)) {
      throw std::runtime_error("my classifier is gone");
    }
    if (mode == Mode::kBlockElsewhere && elsewhere) {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return mode != Mode::kBlockElsewhere; });
    }
    return classes(outputs);
  }
  void set(Mode next) {
    {
      const std::lock_guard lock(mutex);
      mode = next;
    }
    changed.notify_all();
  }

  std::atomic<Mode> mode{Mode::kFine};
  std::atomic<int> calls{0};
  const std::thread::id serving = std::this_thread::get_id();
  std::mutex mutex;
  std::condition_variable changed;
};
using Mode = Scores::Mode;

/// Decisions of a pooled model, by early exits or by states of tokens.
class SupervisionOf : public ::testing::TestWithParam<bool> {
 protected:
  [[nodiscard]] static bool exits() { return GetParam(); }

  void make(bool background, double audit_rate) {
    Options options{.fidelity = Fidelity::kBudget};
    options.budget.budget = {BudgetMetric::kDecision, 0.3, 0.1};
    options.budget.audit_rate = audit_rate;
    options.budget.background_audit = background;
    options.budget.scores = [scores = scores_](const at::Tensor& outputs) { return (*scores)(outputs); };
    if (exits()) {
      options.budget.exit_layers = {0, 1, 2};
      options.budget.token_reuse = false;
    } else {
      options.budget.early_exit = EarlyExit::kOff;
    }
    cache_ = std::make_unique<LayerCache<Module>>(cache_of(kModel, options));
    const auto profile =
        cache_->calibrate(exits() ? Traffic(1).sample(400) : inputs_of(documents(model_info(kModel), 300, 100)));
    ASSERT_TRUE(exits() ? profile.exit != nullptr : profile.reuse.has_value()) << profile.to_string();
  }
  void TearDown() override {
    scores_->set(Mode::kFine);  // whoever waits goes on
    cache_.reset();
  }

  /// Serves `requests`, or until `stop`. What was not reused must be right, whatever happens to audits.
  void serve(
      int requests, const std::function<bool()>& stop = [] { return false; }) {
    for (int i = 0; i < requests && !stop(); ++i) {
      const auto inputs = next();
      const auto got = cache_->forward(inputs).toTensor();
      const auto want = run_plain(plain_, inputs).toTensor();
      const auto report = cache_->last_report();
      for (std::size_t row = 0; row < report.sequences.size(); ++row) {
        const auto source = report.sequences[row].source;
        if (source == Source::kEarlyExit || source == Source::kPartial) continue;
        const auto r = static_cast<std::int64_t>(row);
        EXPECT_TRUE(at::allclose(got[r], want[r], 1e-4, 1e-4)) << to_string(source);
      }
    }
  }
  Inputs next() {
    if (exits()) return traffic_.next().inputs;
    if (number_ % 200 == 0) documents_ = documents(model_info(kModel), 200, 9000 + number_);
    return documents_[number_++ % 200].inputs;
  }

  [[nodiscard]] BudgetStats stats() const { return *cache_->stats().budget; }
  [[nodiscard]] std::uint64_t reused() const { return stats().early_exits + stats().token_reuses; }
  [[nodiscard]] bool closed() const { return stats().threshold_index == stats().thresholds; }

  std::shared_ptr<Scores> scores_ = std::make_shared<Scores>();
  Module plain_ = load_model(kModel);
  std::unique_ptr<LayerCache<Module>> cache_;
  Traffic traffic_{2};
  std::vector<Request> documents_;
  std::uint64_t number_ = 0;
};

TEST_P(SupervisionOf, ScoresThatAlwaysThrowLeaveAnswersExact) {
  make(false, 0.5);
  scores_->set(Mode::kThrow);
  Warnings warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const auto before = reused();
  serve(60);
  if (exits()) {
    EXPECT_EQ(reused(), before) << "without scores nothing can be proposed";
    EXPECT_EQ(stats().audits_failed, 0U);
  } else {
    // Proposing needs no scores, auditing does.
    EXPECT_GE(stats().audits_failed, Supervision::kMostFailed);
    EXPECT_THAT(stats().audit_failure, HasSubstr("my classifier is gone"));
    EXPECT_TRUE(closed());
    EXPECT_EQ(stats().closings, 1U);
    EXPECT_EQ(stats().audits, 0U);
    EXPECT_EQ(warnings.count, 2) << warnings.texts;
    const auto closed_at = reused();
    serve(60);
    EXPECT_EQ(reused(), closed_at) << "nobody can tell whether that is right";
  }
  scores_->set(Mode::kFine);
  serve(2000, [&] { return !closed() && reused() > before + 20; });
  EXPECT_FALSE(closed());
  EXPECT_GT(reused(), before + 20);
  EXPECT_GT(stats().audits, 0U);
}

TEST_P(SupervisionOf, ScoresThatSometimesThrowAreCounted) {
  make(false, 0.5);
  scores_->set(Mode::kThrowEveryThird);
  serve(150);
  scores_->set(Mode::kFine);
  EXPECT_GT(stats().audits_failed, 2U);
  EXPECT_GT(stats().audits, 5U);
  EXPECT_THAT(stats().audit_failure, HasSubstr("my classifier is gone"));
  serve(20);
  EXPECT_FALSE(closed());
}

TEST_P(SupervisionOf, AuditsThatFailInTheBackgroundCloseIt) {
  make(true, 1);
  scores_->set(Mode::kThrowElsewhere);
  serve(500, [&] {
    wait_for_audits(*cache_);
    return closed();
  });
  ASSERT_TRUE(closed()) << "audits_failed " << stats().audits_failed;
  EXPECT_GE(stats().audits_failed, Supervision::kMostFailed);
  EXPECT_LE(stats().audits_failed, Supervision::kMostFailed + 4) << "of one batch more may have been waiting";
  EXPECT_THAT(stats().audit_failure, HasSubstr("my classifier is gone"));
  EXPECT_GE(stats().closings, 1U);
  // Within calls audits still succeed, and open it; the next one in the background closes it again.
  serve(2000, [&] { return stats().reopenings > 0; });
  ASSERT_GT(stats().reopenings, 0U);
  const auto opened_at = reused();
  serve(500, [&] {
    wait_for_audits(*cache_);
    return closed();
  });
  EXPECT_TRUE(closed());
  EXPECT_LE(reused(), opened_at + 8);
  // They work again.
  scores_->set(Mode::kFine);
  serve(4000, [&] { return !closed(); });
  EXPECT_FALSE(closed());
  const auto failed = stats().audits_failed;
  const auto audits = stats().audits;
  const auto again = reused();
  serve(60);
  wait_for_audits(*cache_);
  EXPECT_FALSE(closed());
  EXPECT_GT(reused(), again + 10);
  EXPECT_GT(stats().audits, audits);
  EXPECT_EQ(stats().audits_failed, failed);
}

TEST_P(SupervisionOf, AQueueThatNobodyWorksOffClosesIt) {
  make(true, 1);
  scores_->set(Mode::kBlockElsewhere);
  serve(3000, [&] { return closed(); });
  ASSERT_TRUE(closed()) << "dropped " << stats().audits_dropped << ", waiting " << stats().audits_waiting;
  EXPECT_GE(stats().audits_dropped, Supervision::kMostDropped);
  EXPECT_LE(stats().audits_dropped, Supervision::kMostDropped + 4);
  EXPECT_EQ(stats().audits_failed, 0U);
  const auto closed_at = reused();
  scores_->set(Mode::kFine);
  wait_for_audits(*cache_);
  EXPECT_EQ(stats().audits_waiting, 0U);
  serve(4000, [&] {
    wait_for_audits(*cache_);
    return reused() > closed_at + 20;
  });
  EXPECT_GT(reused(), closed_at + 20);
}

INSTANTIATE_TEST_SUITE_P(Reuse, SupervisionOf, ::testing::Bool(),
                         [](const auto& param) { return std::string(param.param ? "EarlyExits" : "TokenStates"); });

/// Memory that the test lets run out: what asks for `limit` bytes or more at once.
class LimitedMemory final : public c10::Allocator {
 public:
  LimitedMemory() : base_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, 200); }

  at::DataPtr allocate(std::size_t bytes) override {
    largest = std::max(largest.load(), bytes);
    if (bytes >= limit && failures > 0) {
      --failures;
      TORCH_CHECK(false, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes");
    }
    return base_->allocate(bytes);
  }
  at::DeleterFnPtr raw_deleter() const override { return base_->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t count) const override { base_->copy_data(to, from, count); }

  std::atomic<std::size_t> limit{~std::size_t{0}}, largest{0};
  std::atomic<int> failures{0};

 private:
  c10::Allocator* const base_;
};

TEST(SupervisionOfMemory, AnAuditThatRunsOutOfItLeavesTheExactAnswer) {
  // Stays the allocator until the process ends: memory that came from it may.
  static LimitedMemory& memory = *new LimitedMemory;
  const auto info = model_info("tiny-bert-sdpa");
  Module plain = load_model(info.name);
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.audit_rate = 0.5;
  LayerCache<Module> cache = cache_of(info.name, options);
  ASSERT_TRUE(cache.calibrate(inputs_of(documents(info, 300, 100))).reuse);
  const auto requests = documents(info, 240, 9000);
  std::size_t partial = 0;  // bytes that a run with reuse asks for at most, and a full one
  std::size_t full = 0;
  std::size_t i = 0;
  for (; i < 100; ++i) {
    memory.largest = 0;
    cache.forward(requests[i].inputs);
    const auto told = cache.last_report().sequences[0];
    auto& most = told.source == Source::kPartial ? partial : full;
    most = std::max(most, memory.largest.load());
  }
  ASSERT_GT(partial, 0U);
  ASSERT_GT(full, partial);
  memory.limit = partial + 1;
  int ran_out = 0;
  for (; i < requests.size(); ++i) {
    const auto before = cache.stats().budget->audits_failed;
    memory.failures = 1;
    at::Tensor got;
    ASSERT_NO_THROW(got = leaves(cache.forward(requests[i].inputs))[0]);
    memory.failures = 0;
    const auto told = cache.last_report().sequences[0];
    if (told.source == Source::kPartial) continue;
    EXPECT_TRUE(at::allclose(got, leaves(run_plain(plain, requests[i].inputs))[0], 1e-4, 1e-4));
    if (cache.stats().budget->audits_failed == before) continue;
    ++ran_out;
    EXPECT_FALSE(told.audited);
    EXPECT_EQ(told.source, Source::kComputed);
  }
  EXPECT_GT(ran_out, 0);
  EXPECT_THAT(cache.stats().budget->audit_failure, HasSubstr("can't allocate memory"));
}

}  // namespace
}  // namespace llmcache::test
