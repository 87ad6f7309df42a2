// Many threads on one LayerCache; what each gets is compared with what the plain model gave before.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "support.h"

namespace llmcache::test {
namespace {

class Threads : public ::testing::TestWithParam<std::string> {
 protected:
  Threads() : info_(model_info(GetParam())) {
    // Plain results of overlapping requests: some rows are in several of them.
    const auto plain = std::make_unique<Module>(load_plain(GetParam()));
    const auto pool = right_padded(info_, {9, 4, 12, 1, 7, 10}, 1);
    for (const std::vector<std::int64_t>& rows :
         std::vector<std::vector<std::int64_t>>{{0, 1}, {1, 2, 3}, {4}, {5, 0}, {2}, {3, 4, 5, 1}}) {
      const auto index = at::tensor(rows, at::kLong);
      Request request;
      for (const auto row : rows) {
        request.spans.push_back(pool.spans[static_cast<std::size_t>(row)]);
        request.padded_length = std::max(request.padded_length, request.spans.back().tokens);
      }
      for (const auto& input : pool.inputs) {
        request.inputs.emplace_back(
            input.toTensor().index_select(0, index).narrow(1, 0, request.padded_length).contiguous());
      }
      wanted_.push_back(run_plain(*plain, request.inputs));
      requests_.push_back(std::move(request));
    }
  }

  /// `count` threads, each with `turns` calls; all at once.
  void hammer(LayerCacheBase& cache, unsigned count, int turns) {
    std::atomic<unsigned> waiting{count};
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < count; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        --waiting;
        while (waiting > 0) std::this_thread::yield();
        for (int turn = 0; turn < turns; ++turn) {
          const std::size_t i = random() % requests_.size();
          const auto fidelity = random() % 2 == 0 ? Fidelity::kLossless : Fidelity::kIdentical;
          if (random() % 20 == 0) cache.clear();
          try {
            const auto got = cache.forward(requests_[i].inputs, {.fidelity = fidelity});
            if (real_difference(got, wanted_[i], requests_[i]) > tolerance_of(info_)) ++wrong;
            if (cache.last_report().sequences.size() != requests_[i].spans.size()) ++wrong;
            const auto stats = cache.stats();
            if (stats.bytes > cache.options().capacity_bytes) ++wrong;
          } catch (const std::exception&) {
            ++wrong;
          }
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0) << "of " << count * static_cast<unsigned>(turns) << " calls";
  }

  ModelInfo info_;
  std::vector<Request> requests_;
  std::vector<c10::IValue> wanted_;
};

TEST_P(Threads, TwoAtOnce) {
  LayerCache<Module> cache(load_model(GetParam()));
  hammer(cache, 2, 20);
  EXPECT_EQ(cache.stats().requests, 40U);
  EXPECT_GT(cache.stats().identical_hits, 0U);
}

// Any one of the requests fits in the capacity, all six do not.
TEST_P(Threads, EightAtOnceUnderPressure) {
  std::size_t capacity = 0;
  {
    LayerCache<Module> roomy(load_model(GetParam()));
    for (const auto& request : requests_) roomy.forward(request.inputs);
    capacity = roomy.stats().bytes / 2;
  }
  LayerCache<Module> cache(load_model(GetParam()), {.capacity_bytes = capacity});
  hammer(cache, 8, 12);
  EXPECT_EQ(cache.stats().requests, 96U);
  // However the threads' calls fell: these six press one another out.
  for (const auto& request : requests_) cache.forward(request.inputs);
  const auto stats = cache.stats();
  EXPECT_GT(stats.entries, 0U);
  EXPECT_GT(stats.evictions, 0U);
  EXPECT_LE(stats.peak_bytes, capacity);
  cache.clear();
  EXPECT_EQ(cache.stats().bytes, 0U);
}

TEST_P(Threads, StatsAddUpWhileOthersCall) {
  LayerCache<Module> cache(load_model(GetParam()));
  std::atomic<bool> done{false};
  int wrong = 0;
  std::thread reader([&] {
    do {
      const auto stats = cache.stats();
      wrong += stats.balance.requested != stats.tokens;
      wrong += stats.balance.requested != stats.balance.reused() + stats.balance.computed();
      wrong += stats.times.total.count != stats.requests;
      wrong += stats.sequences != std::accumulate(stats.sequences_from.begin(), stats.sequences_from.end(), 0U);
    } while (!done);
  });
  hammer(cache, 64, 4);
  done = true;
  reader.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(cache.stats().requests, 256U);
}

TEST_P(Threads, ForcedPlansBesideOrdinaryCalls) {
  LayerCache<Module> cache(load_model(GetParam()));
  const auto& request = requests_[1];
  Donors donors;
  auto plan = cache.full_plan(request.inputs);
  cache.forward_plan(request.inputs, plan, {}, &donors);
  for (std::int32_t i = 0; i < 3; ++i) {
    auto& sequence = plan.sequences[static_cast<std::size_t>(i)];
    sequence = compute_some(i, 0, sequence.tokens, plan.layers, {sequence.tokens - 1}, i);
  }
  std::atomic<int> wrong{0};
  std::thread planner([&] {
    for (int turn = 0; turn < 15; ++turn) {
      const auto got = cache.forward_plan(request.inputs, plan, donors);
      if (real_difference(got, wanted_[1], request) > tolerance_of(info_)) ++wrong;
    }
  });
  hammer(cache, 2, 15);
  planner.join();
  EXPECT_EQ(wrong, 0);
}

// Conversations that begin alike and grow at the same time, in a cache that is too small for all of them.
TEST(ThreadsOfConversations, GrowWithoutSeeingEachOther) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-llama-sdpa"}) {
    SCOPED_TRACE(name);
    constexpr std::int64_t kLength = 40;
    constexpr unsigned kThreads = 8;
    constexpr std::size_t kCapacity = std::size_t{400} << 10;
    const auto info = model_info(name);
    Module plain = load_model(name);
    LayerCache<Module> cache(load_model(name), {.capacity_bytes = kCapacity});
    ASSERT_TRUE(cache.profile().prefix_reuse);
    // All positions of a causal model's result at once. Some conversations have their first half in common.
    std::vector<Request> whole;
    std::vector<at::Tensor> wanted;
    for (unsigned t = 0; t < kThreads; ++t) {
      whole.push_back(right_padded(info, {kLength}, 1 + t / 2));
      whole.back().ids().narrow(1, kLength / 2, kLength / 2).fill_(20 + static_cast<std::int64_t>(t));
      wanted.push_back(run_plain(plain, whole.back().inputs).toTensor());
    }
    std::atomic<int> wrong{0};
    std::atomic<int> reused{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        try {
          for (std::int64_t n = 6; n <= kLength; n += 1 + n % 3) {
            Inputs inputs;
            for (const auto& input : whole[t].inputs)
              inputs.emplace_back(input.toTensor().narrow(1, 0, n).contiguous());
            const auto got = cache.forward(inputs, {.output = Output::kLastToken}).toTensor();
            const auto want = wanted[t].narrow(1, n - 1, 1);
            const auto scale = std::max(want.abs().max().item<double>(), 1e-3);
            if ((got - want).abs().max().item<double>() > tolerance_of(info) * scale) ++wrong;
            if (cache.last_report().sequences.at(0).reused_tokens > 0) ++reused;
            if (cache.stats().bytes > kCapacity) ++wrong;
            if (t == 0 && n % 7 == 0) cache.clear();
          }
        } catch (const std::exception&) {
          ++wrong;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_GT(reused, 0);
    EXPECT_LE(cache.stats().peak_bytes, kCapacity);
    cache.clear();
    EXPECT_EQ(cache.stats().bytes, 0U);
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, Threads,
                         ::testing::Values("tiny-scripted", "tiny-llama-eager", "tiny-bert-sdpa-bf16",
                                           "tiny-gpt2-sdpa.pt2"),
                         test_name);

/// What the plain module gives for `inputs` in this thread and in others that run at once, its first runs and later
/// ones: a platform's kernels need not give the same bits in all of these, and what the module gives is right.
std::vector<c10::IValue> plain_results(Module& plain, const Inputs& inputs, unsigned threads) {
  std::vector<c10::IValue> results(2 * threads + 1);
  results[2 * threads] = run_plain(plain, inputs);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      const c10::NoGradGuard no_grad;
      for (const unsigned turn : {0U, 1U}) results[2 * t + turn] = run_plain(plain, inputs);
    });
  }
  for (auto& thread : running) thread.join();
  return results;
}

TEST(ThreadsAndFaults, AFailureStaysInItsThread) {
  constexpr unsigned kThreads = 4;
  LayerCache<Module> cache(load_model("tiny-throws"));
  Module plain = load_model("tiny-throws");
  const auto good = right_padded(model_info("tiny-throws"), {6, 9}, 1);
  const auto wanted = plain_results(plain, good.inputs, kThreads);
  auto bad = Inputs(copy_of(good.inputs));
  bad[0].toTensor()[1][3].fill_(7);
  std::atomic<int> raised{0};
  std::mutex mutex;
  std::vector<std::string> wrong;  // guarded by mutex
  const auto tell = [&](unsigned t, int turn, const std::string& what) {
    const std::lock_guard lock(mutex);
    wrong.push_back("thread " + std::to_string(t) + ", turn " + std::to_string(turn) + ": " + what);
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int turn = 0; turn < 10; ++turn) {
        const bool fails = (static_cast<int>(t) + turn) % 2 == 0;
        try {
          const auto got = cache.forward(fails ? bad : good.inputs, {.fidelity = Fidelity::kIdentical});
          const auto same = [&](const c10::IValue& want) { return same_bits(got, want); };
          if (fails) tell(t, turn, "the model did not raise");
          if (std::none_of(wanted.begin(), wanted.end(), same)) {
            const double off = (got.toTensor() - wanted[0].toTensor()).abs().max().item<double>();
            tell(t, turn, "off by " + std::to_string(off) + ", " + cache.last_report().summary());
          }
        } catch (const Error& error) {
          ++raised;
          if (error.code() != ErrorCode::kModelFailed) tell(t, turn, error.what());
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::IsEmpty());
  EXPECT_EQ(raised, 20);
  EXPECT_EQ(cache.stats().requests, 20U);
  EXPECT_EQ(cache.stats().entries, 2U);
}

TEST(ThreadsAndReports, EachThreadHasItsOwn) {
  LayerCache<Module> cache(load_model("tiny-scripted"));
  const auto info = model_info("tiny-scripted");
  cache.forward(right_padded(info, {5}, 1).inputs);
  std::size_t before = 1;
  std::size_t after = 0;
  std::thread other([&] {
    before = cache.last_report().sequences.size();
    cache.forward(right_padded(info, {5, 5, 5}, 2).inputs);
    after = cache.last_report().sequences.size();
  });
  other.join();
  EXPECT_EQ(before, 0U);
  EXPECT_EQ(after, 3U);
  EXPECT_EQ(cache.last_report().sequences.size(), 1U);
}

TEST(ThresholdThreads, EightThreadsFillAndAsk) {
  Subject& model = subject("tiny-scripted");
  Options options{.fidelity = Fidelity::kThreshold, .capacity_bytes = 300 << 10};  // SimHash with a running centre
  options.threshold.tau = 0.999;
  options.refresh.audit_rate = 0.2;
  LayerCache<Module> cache(load_model("tiny-scripted"), options);
  std::vector<Request> requests;
  std::vector<c10::IValue> want;
  for (std::uint64_t seed = 0; seed < 24; ++seed) {
    requests.push_back(right_padded(model.info, {6, 3}, seed));
    want.push_back(run_plain(model.plain, requests.back().inputs));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < 40; ++i) {
        const std::size_t r = (i * 5 + t * 3) % requests.size();
        const auto got = cache.forward(requests[r].inputs);
        // Distinct random requests are far apart: whatever is served must be the request itself.
        if (!close_on_real(got, want[r], requests[r], 1e-3)) ++wrong;
        if (i % 13 == 12 && cache.stats().peak_bytes > options.capacity_bytes) ++wrong;
        if (i == 25 && t == 0) cache.clear();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  const auto stats = cache.stats();
  EXPECT_EQ(stats.sequences, 8U * 40U * 2U);
  EXPECT_GT(stats.similar_hits, 0U);
  EXPECT_LE(stats.peak_bytes, options.capacity_bytes);
}

/// Four threads that serve `pool` within a budget; `beside` runs as long as they do. The mean of `error`, which gets
/// the first output of each answer and of the plain model, must stay below `most`.
void serve_within_budget(
    LayerCacheBase& cache, const std::vector<Inputs>& pool, const std::vector<at::Tensor>& wanted,
    const std::function<double(const at::Tensor& got, const at::Tensor& want)>& error, double most,
    const RequestOptions& how = {}, const std::function<void()>& beside = [] { std::this_thread::yield(); }) {
  constexpr unsigned kThreads = 4;
  constexpr int kTurns = 60;
  std::atomic<int> failed{0};
  std::atomic<unsigned> running{kThreads};
  std::array<double, kThreads> sums{};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int turn = 0; turn < kTurns; ++turn) {
        const std::size_t i = random() % pool.size();
        try {
          const auto got = leaves(cache.forward(pool[i], how))[0];
          if (!got.isfinite().all().item<bool>()) ++failed;
          sums[t] += error(got, wanted[i]);
          if (cache.last_report().sequences.empty()) ++failed;
          if (cache.stats().bytes > cache.options().capacity_bytes) ++failed;
          if (random() % 30 == 0) cache.clear();
        } catch (const std::exception&) {
          ++failed;
        }
      }
      --running;
    });
  }
  while (running > 0) beside();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_LE(std::accumulate(sums.begin(), sums.end(), 0.0) / (kThreads * kTurns), most);
}

std::vector<at::Tensor> plain_answers(const std::string& name, const std::vector<Inputs>& pool) {
  Module plain = load_model(name);
  std::vector<at::Tensor> answers;
  for (const Inputs& inputs : pool) answers.push_back(leaves(run_plain(plain, inputs))[0]);
  return answers;
}

TEST(BudgetThreads, LeaveEarlyAreAuditedAndCalibratedAtOnce) {
  const auto info = model_info("tiny-bert-pooled");
  const auto decide = [](const at::Tensor& outputs) {
    return at::mm(outputs, at::sin(at::arange(outputs.size(1) * 4, at::kFloat)).view({outputs.size(1), 4}));
  };
  Options options{.fidelity = Fidelity::kBudget, .capacity_bytes = 4 << 20};
  options.budget.budget = {BudgetMetric::kDecision, 0.3, 0.1};
  options.budget.scores = decide;
  options.budget.exit_layers = {0, 1};
  options.budget.audit_rate = 0.3;
  options.budget.background_audit = true;
  options.budget.token_reuse = false;
  LayerCache<Module> cache(load_model(info.name), options);
  // Ten topics of five tokens each.
  std::mt19937 random(3);
  const auto next = [&] {
    Request request = right_padded(info, {7, 9}, 1);
    for (std::int64_t row = 0; row < 2; ++row) {
      const auto topic = static_cast<std::int64_t>(random() % 10);
      auto ids = request.ids()[row];
      for (std::int64_t t = 0; t < (row == 0 ? 7 : 9); ++t)
        ids[t] = 8 + topic * 5 + static_cast<std::int64_t>(random() % 5);
    }
    return request.inputs;
  };
  std::vector<Inputs> sample;
  for (int i = 0; i < 250; ++i) sample.push_back(next());
  const auto profile = cache.calibrate(sample);
  ASSERT_TRUE(profile.exit) << profile.to_string();
  std::vector<Inputs> pool;
  for (int i = 0; i < 100; ++i) pool.push_back(next());
  const auto error = [&](const at::Tensor& got, const at::Tensor& want) {
    return decide(got).argmax(1).ne(decide(want).argmax(1)).to(at::kDouble).mean().item<double>();
  };
  serve_within_budget(cache, pool, plain_answers(info.name, pool), error, 0.45, {}, [&] {
    cache.use_calibration(profile);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  });
  EXPECT_GT(cache.stats().budget->early_exits, 0U);
}

TEST(BudgetThreads, ReuseTokenStatesOfEachOther) {
  const auto info = model_info("tiny-bert-sdpa");
  Options options{.fidelity = Fidelity::kBudget, .capacity_bytes = 4 << 20};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0.2;
  LayerCache<Module> cache(load_model(info.name), options);
  const auto documents = [&](int count, std::uint64_t seed) {
    std::vector<Inputs> all;
    Request current = right_padded(info, {32}, seed);
    for (int i = 0; i < count; ++i) {
      if (i % 12 == 0) current = right_padded(info, {32}, seed + static_cast<std::uint64_t>(i));
      Request changed = current;
      changed.inputs = copy_of(current.inputs);
      changed.ids()[0][5 + i % 20] = 10 + (i * 7) % 200;
      all.push_back(changed.inputs);
    }
    return all;
  };
  const auto profile = cache.calibrate(documents(250, 100));
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  const auto pool = documents(60, 9000);
  const auto error = [&](const at::Tensor& got, const at::Tensor& want) {
    return std::min(1.0, (got - want).norm(2, -1).mean().item<double>() / profile.typical_distance);
  };
  serve_within_budget(cache, pool, plain_answers(info.name, pool), error, 0.3);
  EXPECT_GT(cache.stats().budget->token_reuses, 0U);
  EXPECT_GT(cache.stats().budget->audits, 0U);
}

TEST(BudgetThreads, ReuseSegmentsOfEachOther) {
  const auto info = model_info("tiny-llama-sdpa");
  Options options{.fidelity = Fidelity::kBudget, .capacity_bytes = 4 << 20};
  options.budget.budget = {BudgetMetric::kTokenAgreement, 0.5, 0.2};
  options.budget.audit_rate = 0.2;
  LayerCache<Module> cache(load_model(info.name), options);
  const auto passages = right_padded(info, {40, 40, 40, 40}, 77).ids();
  std::mt19937 random(5);
  const auto prompts = [&](int count) {
    std::vector<Inputs> all;
    for (int i = 0; i < count; ++i) {
      std::vector<at::Tensor> parts = {passages[0].narrow(0, 0, 8)};
      for (const auto p : {random() % 4, random() % 4, random() % 4})
        parts.push_back(passages[static_cast<std::int64_t>(p)]);
      parts.push_back(right_padded(info, {6}, random()).ids()[0]);
      const auto ids = at::cat(parts).unsqueeze(0);
      all.push_back({ids, at::ones_like(ids)});
    }
    return all;
  };
  const auto profile = cache.calibrate(prompts(300));
  ASSERT_TRUE(profile.reuse) << profile.to_string();
  const auto pool = prompts(60);
  const auto error = [](const at::Tensor& got, const at::Tensor& want) {
    return got[0][0].argmax().equal(want[0][want.size(1) - 1].argmax()) ? 0.0 : 1.0;
  };
  serve_within_budget(cache, pool, plain_answers(info.name, pool), error, 0.6, {.output = Output::kLastToken});
  EXPECT_GT(cache.stats().budget->segment_reuses, 0U);
}

}  // namespace
}  // namespace llmcache::test
