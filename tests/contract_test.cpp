// What LayerCache promises beside the numbers: what is found and what is not, what a bad input does,
// what a failed call leaves behind, and all of it from many threads.
#include <atomic>
#include <fstream>
#include <random>
#include <thread>

#include "bank/output_bank.h"
#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::HasSubstr;

class CacheTest : public ::testing::Test {
 protected:
  CacheTest() : info(model_info("tiny-bert-sdpa")), plain(load_model("tiny-bert-sdpa")), cache(plain, Options{}) {}

  ModelInfo info;
  Module plain;
  LayerCache<Module> cache;
};

using Cache = CacheTest;
using Faults = CacheTest;

TEST_F(Cache, IdenticalRequestIsFoundBitForBit) {
  const auto request = right_padded(info, {9, 9}, 1);
  const auto first = cache.forward(request.inputs);
  const auto again = cache.forward(copy_of(request.inputs));
  EXPECT_TRUE(same_bits(again, first));
  EXPECT_TRUE(same_bits(again, run_plain(plain, request.inputs)));
  EXPECT_EQ(cache.stats().identical_hits, 2u);
  const auto report = cache.last_report();
  EXPECT_EQ(report.execution, Execution::kNone);
  EXPECT_EQ(report.sequences.at(0).source, Source::kIdentical);
  EXPECT_EQ(report.computed_fraction(), 0.0);
}

TEST_F(Cache, RowIsFoundInAnotherBatchOrderAndWidth) {
  const auto request = right_padded(info, {9, 4, 6}, 2);
  const auto first = cache.forward(request.inputs).toTensor();
  const auto alone = request.alone(1);
  EXPECT_TRUE(at::equal(cache.forward(alone.inputs).toTensor()[0], first[1].narrow(0, 0, 4)));
  EXPECT_EQ(cache.last_report().execution, Execution::kNone);

  const auto order = at::tensor({2, 0, 1}, at::kLong);
  const Inputs turned{request.ids().index_select(0, order), request.mask().index_select(0, order)};
  EXPECT_TRUE(at::equal(cache.forward(turned).toTensor(), first.index_select(0, order)));
  EXPECT_EQ(cache.stats().identical_hits, 4u);
}

TEST_F(Cache, KnownAndNewRowsOfOneBatch) {
  const auto request = right_padded(info, {9, 4, 6}, 3);
  cache.forward(request.alone(1).inputs);
  const auto mixed = cache.forward(request.inputs);
  EXPECT_TRUE(close_on_real(mixed, run_plain(plain, request.inputs), request, tolerance_of(info)));
  EXPECT_TRUE(padding_is_zero(mixed, request));
  const auto report = cache.last_report();
  EXPECT_EQ(report.sequences.at(0).source, Source::kComputed);
  EXPECT_EQ(report.sequences.at(1).source, Source::kIdentical);
}

TEST_F(Cache, OneOtherTokenTenantOrMaskIsAMiss) {
  const auto request = right_padded(info, {9}, 4);
  cache.forward(request.inputs);
  auto other = copy_of(request.inputs);
  other[0].toTensor()[0][8].add_(1).remainder_(info.vocab);
  EXPECT_TRUE(same_bits(cache.forward(other), run_plain(plain, other)));
  cache.forward(request.inputs, {.tenant = "acme"});
  auto masked = copy_of(request.inputs);
  masked[1].toTensor()[0][4].fill_(0);
  EXPECT_TRUE(same_bits(cache.forward(masked), run_plain(plain, masked)));
  EXPECT_EQ(cache.stats().identical_hits, 0u);
  cache.forward(request.inputs, {.tenant = "acme"});
  EXPECT_EQ(cache.stats().identical_hits, 1u);
}

TEST_F(Cache, IdenticalFidelityNeverServesWhatPackingComputed) {
  const auto request = right_padded(info, {9, 4}, 5);
  cache.forward(request.inputs);
  const auto exact = cache.forward(request.inputs, {.fidelity = Fidelity::kIdentical});
  EXPECT_TRUE(same_bits(exact, run_plain(plain, request.inputs)));
  EXPECT_EQ(cache.stats().identical_hits, 0u);
  cache.forward(request.inputs);  // either will do here
  EXPECT_EQ(cache.stats().identical_hits, 2u);
}

TEST_F(Cache, ResultsAndInputsAreTheCallers) {
  const auto request = right_padded(info, {7}, 6);
  const auto inputs = copy_of(request.inputs);
  const auto first = cache.forward(inputs).toTensor();
  const auto kept = first.clone();
  first.fill_(3);
  const auto second = cache.forward(inputs).toTensor();
  EXPECT_TRUE(at::equal(second, kept));
  second.fill_(4);
  EXPECT_TRUE(at::equal(cache.forward(inputs).toTensor(), kept));
  EXPECT_TRUE(at::equal(inputs[0].toTensor(), request.ids()));
}

TEST_F(Cache, ClearDropsEverything) {
  const auto request = right_padded(info, {7}, 7);
  cache.forward(request.inputs);
  EXPECT_GT(cache.stats().bytes, 0u);
  cache.clear();
  EXPECT_EQ(cache.stats().entries, 0u);
  EXPECT_EQ(cache.stats().bytes, 0u);
  cache.forward(request.inputs);
  EXPECT_EQ(cache.stats().identical_hits, 0u);
}

TEST_F(Cache, CapacityIsNeverPassed) {
  for (const std::size_t capacity : {0u, 100u, 3000u, 20000u}) {
    LayerCache<Module> small(plain, {.capacity_bytes = capacity});
    std::mt19937 random(9);
    for (int i = 0; i < 60; ++i) {
      const auto request = right_padded(info, {1 + static_cast<int>(random() % 20)}, random() % 12);
      const auto got = small.forward(request.inputs);
      ASSERT_TRUE(same_bits(got, run_plain(plain, request.inputs)));
      const auto stats = small.stats();
      ASSERT_LE(stats.bytes, capacity);
      ASSERT_LE(stats.peak_bytes, capacity);
    }
    if (capacity == 100u) EXPECT_GT(small.stats().rejected, 0u);
    if (capacity == 20000u) EXPECT_GT(small.stats().evictions, 0u);
  }
}

TEST(Bank, RandomisedAgainstAModel) {
  constexpr std::size_t kCapacity = 40000;
  OutputBank bank(kCapacity);
  std::map<std::string, at::Tensor> oracle;  // everything ever inserted; what is found must be it
  std::mt19937 random(3);
  for (int i = 0; i < 3000; ++i) {
    const std::string key = "key " + std::to_string(random() % 150);
    if (const auto found = bank.find(key, false)) {
      ASSERT_TRUE(at::equal(found->tensors()[0], oracle.at(key)));
    } else {
      auto value = at::full({1, 1 + static_cast<std::int64_t>(random() % 300)}, i);
      bank.insert(key, {value}, true);
      oracle[key] = value;
    }
    if (random() % 500 == 0) bank.clear();
    ASSERT_LE(bank.counters().bytes, kCapacity);
    ASSERT_LE(bank.counters().peak_bytes, kCapacity);
  }
  EXPECT_GT(bank.counters().evictions, 0u);
  std::size_t held = 0;
  for (const auto& [key, value] : oracle) {
    if (const auto found = bank.find(key, false)) held += found->tensors()[0].nbytes() + key.size();
  }
  EXPECT_LE(held, bank.counters().bytes);
  bank.clear();
  EXPECT_EQ(bank.counters().bytes, 0u);
}

TEST(Bank, EvictsTheLeastRecentlyUsed) {
  OutputBank bank(12000);
  for (const char* key : {"a", "b"}) bank.insert(key, {at::ones({1, 1000})}, true);
  ASSERT_TRUE(bank.find("a", true));
  bank.insert("c", {at::ones({1, 1000})}, true);
  EXPECT_TRUE(bank.find("a", true));
  EXPECT_FALSE(bank.find("b", true));
  EXPECT_TRUE(bank.find("c", true));
}

TEST(Wrapping, RefusesWithTheReason) {
  const auto wrap = [](const char* name) { return [name] { LayerCache<Module> cache(load_model(name)); }; };
  EXPECT_THAT(wrap("tiny-bert-frozen"), ThrowsError(ErrorCode::kUnsupportedModel, "frozen"));
  EXPECT_THAT(wrap("tiny-bert-training"), ThrowsError(ErrorCode::kUnsupportedModel, "training mode"));
  EXPECT_THAT(wrap("tiny-mlp"), ThrowsError(ErrorCode::kUnsupportedModel, "no chain of layers"));
  EXPECT_THAT([] { LayerCache<Module> cache(load_model("tiny-bert-sdpa"), {.layers = "model.nowhere"}); },
              ThrowsError(ErrorCode::kUnsupportedModel, "model.nowhere"));
  EXPECT_THAT([] { LayerCache<Module> cache(load_model("tiny-bert-sdpa"), {.layers = ".x"}); },
              ThrowsError(ErrorCode::kInvalidOptions, "Options.layers"));
  EXPECT_THAT([] { LayerCache<Module> cache(load_model("tiny-bert-sdpa"), {.mask_argument = 5}); },
              ThrowsError(ErrorCode::kInvalidOptions, "mask_argument"));
}

TEST(Wrapping, ProfileTellsWhatWasFound) {
  const auto& bert = subject("tiny-bert-sdpa").cache.profile();
  EXPECT_EQ(bert.layers, 3);
  EXPECT_EQ(bert.layers_path, "model.encoder.layer");
  EXPECT_EQ(bert.hidden, 64);
  EXPECT_FALSE(bert.causal);
  EXPECT_EQ(bert.mask_argument, 1);
  EXPECT_THAT(bert.to_string(), HasSubstr("model.encoder.layer"));
  EXPECT_TRUE(subject("tiny-gpt2-eager").cache.profile().causal);
  EXPECT_TRUE(subject("tiny-llama-sdpa").cache.profile().causal);
  LayerCache<Module> named(load_model("tiny-bert-sdpa"), {.layers = "model.encoder.layer"});
  EXPECT_EQ(named.profile().layers, 3);
}

std::size_t resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) return std::stoul(line.substr(6)) * 1024;
  }
  return 0;
}

TEST(Wrapping, SharesTheWeights) {
  auto module = load_model("minilm");
  const auto ids = at::ones({1, 4}, at::kLong);
  const auto before_result = run_plain(module, {ids, at::ones_like(ids)});
  const auto graph = module.get_method("forward").graph()->toString();
  const std::size_t before = resident_bytes();
  LayerCache<Module> cache(module);
  const std::size_t after = resident_bytes();
  EXPECT_GT(cache.profile().weight_bytes, 80u << 20);
  EXPECT_LT(after - std::min(before, after), cache.profile().weight_bytes / 2);
  EXPECT_EQ(module.get_method("forward").graph()->toString(), graph);
  EXPECT_TRUE(same_bits(run_plain(module, {ids, at::ones_like(ids)}), before_result));
}

TEST(ModelChanged, IsNoticed) {
  const auto request = right_padded(model_info("tiny-bert-sdpa"), {5}, 1);
  const auto check = [&](const char* what, auto change) {
    auto module = load_model("tiny-bert-sdpa");
    LayerCache<Module> cache(module);
    cache.forward(request.inputs);
    const auto before = counters_of(cache);
    change(module);
    EXPECT_THAT([&] { cache.forward(request.inputs); }, ThrowsError(ErrorCode::kModelChanged)) << what;
    EXPECT_EQ(counters_of(cache), before) << what;
  };
  check("dtype", [](Module& module) { module.to(at::kBFloat16); });
  check("training", [](Module& module) { module.train(); });
  check("written", [](Module& module) {
    const c10::NoGradGuard guard;
    (*module.parameters().begin()).add_(1);
  });
}

TEST_F(Faults, BadInputsAreNamed) {
  const auto request = right_padded(info, {5, 3}, 1);
  const auto ids = request.ids();
  const auto mask = request.mask();
  cache.forward(request.inputs);
  const auto before = counters_of(cache);
  const auto refuses = [&](const Inputs& inputs, const char* part) {
    EXPECT_THAT([&] { cache.forward(inputs); }, ThrowsError(ErrorCode::kInvalidInput, part));
  };
  refuses({}, "0 inputs");
  refuses({ids}, "1 inputs");
  refuses({ids, mask, mask}, "3 inputs");
  refuses({ids.to(at::kFloat), mask}, "Float");
  refuses({ids[0], mask}, "dimensions");
  refuses({ids, mask.narrow(1, 0, 3)}, "[2, 3]");
  refuses({ids, c10::IValue()}, "None");
  refuses({c10::IValue(3), mask}, "Int");
  refuses({at::Tensor(), mask}, "undefined");
  refuses({ids.to(at::kMeta), mask}, "meta");
  EXPECT_EQ(counters_of(cache), before);
}

TEST_F(Faults, OddShapesDoWhatThePlainModelDoes) {
  for (const auto& shape : {std::pair<int, int>{0, 5}, {2, 0}}) {
    const auto ids = at::ones({shape.first, shape.second}, at::kLong);
    const Inputs inputs{ids, at::ones_like(ids)};
    c10::IValue want;
    bool plain_throws = false;
    try {
      want = run_plain(plain, inputs);
    } catch (const std::exception&) {
      plain_throws = true;
    }
    if (plain_throws) {
      EXPECT_THAT([&] { cache.forward(inputs); }, ThrowsError(ErrorCode::kModelFailed));
    } else {
      EXPECT_TRUE(same_bits(cache.forward(inputs), want));
    }
  }
  const auto padding = make_request(info, {{0, 4}, {0, 0}, {0, 2}}, 4, 3);
  EXPECT_TRUE(close_on_real(cache.forward(padding.inputs), run_plain(plain, padding.inputs), padding, tolerance_of(info)));
  const auto only_padding = make_request(info, {{0, 0}}, 4, 3);
  EXPECT_TRUE(same_bits(cache.forward(only_padding.inputs), run_plain(plain, only_padding.inputs)));
}

TEST_F(Faults, IdsOutOfRangeLeaveTheCacheAsItWas) {
  const auto request = right_padded(info, {5}, 1);
  cache.forward(request.inputs);
  const auto before = counters_of(cache);
  auto bad = copy_of(request.inputs);
  bad[0].toTensor()[0][2].fill_(info.vocab + 7);
  EXPECT_THAT([&] { cache.forward(bad); }, ThrowsError(ErrorCode::kModelFailed));
  EXPECT_EQ(counters_of(cache), before);
  EXPECT_TRUE(same_bits(cache.forward(request.inputs), run_plain(plain, request.inputs)));
}

TEST_F(Faults, ExceptionInsideTheModel) {
  auto module = load_model("tiny-throws");
  LayerCache<Module> throwing(module);
  const auto own = model_info("tiny-throws");
  auto request = right_padded(own, {6}, 2);
  request.ids().masked_fill_(request.ids().eq(7), 8);
  throwing.forward(request.inputs);
  const auto before = counters_of(throwing);
  auto bad = copy_of(request.inputs);
  bad[0].toTensor()[0][1].fill_(7);
  EXPECT_THAT([&] { throwing.forward(bad); }, ThrowsError(ErrorCode::kModelFailed, "7"));
  EXPECT_EQ(counters_of(throwing), before);
  EXPECT_TRUE(same_bits(throwing.forward(request.inputs), run_plain(module, request.inputs)));
}

TEST_F(Faults, NanWeightsBehaveAsInThePlainModel) {
  auto module = load_model("tiny-nan");
  LayerCache<Module> nan(module);
  const auto request = right_padded(model_info("tiny-nan"), {6, 6}, 2);
  EXPECT_TRUE(same_bits(nan.forward(request.inputs), run_plain(module, request.inputs)));
}

TEST_F(Faults, LaterFidelitiesAreRefused) {
  const auto request = right_padded(info, {5}, 1);
  for (const auto fidelity : {Fidelity::kBudget, Fidelity::kThreshold}) {
    EXPECT_THAT([&] { cache.forward(request.inputs, {.fidelity = fidelity}); },
                ThrowsError(ErrorCode::kNotAvailable, to_string(fidelity)));
    EXPECT_THAT(([&] { LayerCache<Module> other(plain, {.fidelity = fidelity}); }),
                ThrowsError(ErrorCode::kNotAvailable));
  }
}

TEST_F(Faults, PlansThatDoNotFit) {
  const auto request = right_padded(info, {6, 3}, 1);
  const Plan full = cache.full_plan(request.inputs);
  const auto refuses = [&](auto change, const char* part) {
    Plan plan = full;
    change(plan);
    EXPECT_THAT([&] { cache.forward_plan(request.inputs, plan); }, ThrowsError(ErrorCode::kInvalidOptions, part));
  };
  refuses([](Plan& plan) { plan.width = 9; }, "width");
  refuses([](Plan& plan) { plan.layers = 2; }, "layers");
  refuses([](Plan& plan) { plan.sequences[1].row = 0; }, "order");
  refuses([](Plan& plan) { plan.sequences.pop_back(); }, "no sequence");
  refuses([](Plan& plan) { plan.sequences[0].donor = 0; }, "donor");
  refuses([](Plan& plan) { plan.sequences[0].ranges[0].end = 5; }, "ranges end");
  refuses([](Plan& plan) { plan.sequences[0].ranges[0].last_layer = 1; }, "no donor");
  refuses([](Plan& plan) { plan.sequences[0] = compute_all(0, 0, 5, 3); }, "real tokens");
  EXPECT_TRUE(close_on_real(cache.forward_plan(request.inputs, full), run_plain(plain, request.inputs), request,
                            tolerance_of(info)));
}

void hammer(int threads) {
  const auto info = model_info("tiny-gpt2-sdpa");
  auto plain = load_model("tiny-gpt2-sdpa");
  std::vector<Request> requests;
  std::vector<c10::IValue> wants;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    requests.push_back(seed % 2 == 0 ? right_padded(info, {6, 3}, seed) : right_padded(info, {5}, seed));
    wants.push_back(run_plain(plain, requests.back().inputs));
  }
  LayerCache<Module> cache(plain, {.capacity_bytes = 30000});
  std::atomic<int> wrong{0};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < 12; ++i) {
        const auto k = static_cast<std::size_t>(t * 5 + i) % requests.size();
        const auto got = cache.forward(requests[k].inputs);
        if (!close_on_real(got, wants[k], requests[k], tolerance_of(info))) ++wrong;
        if (cache.last_report().sequences.size() != requests[k].spans.size()) ++wrong;
        if (t == 0 && i == 6) cache.clear();
        if (cache.stats().bytes > 30000) ++wrong;
      }
    });
  }
  for (auto& worker : workers) worker.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(cache.stats().requests, static_cast<std::uint64_t>(12 * threads));
  EXPECT_LE(cache.stats().peak_bytes, 30000u);
}

TEST(Threads, TwoAtOnce) { hammer(2); }
TEST(Threads, EightAtOnce) { hammer(8); }

}  // namespace
}  // namespace llmcache::test
