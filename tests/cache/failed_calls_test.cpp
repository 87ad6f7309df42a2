// Calls that fail, in every fidelity, while the cache is full of another tenant's entries: it is as it was before.
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "failing_allocation.h"
#include "support.h"

namespace llmcache::test {
namespace {

constexpr std::int64_t kPoison = 20;  ///< an id that none of the requests but those that fail has

/// Where the model raises.
enum class Fails { kInALayer, kInTheHead };

struct Way {
  std::string name;
  Fails fails = Fails::kInALayer;
  bool causal = false;
  Options options;
  std::string mechanism, setting;   ///< of a calibration for kBudget; empty: none
  std::vector<Fidelity> requested;  ///< fidelities of the calls
};

Script script_for(const Way& way) {
  Script script;
  const std::string raise =
      "far = (x.abs().amax(-1) > 1.0e4).long() * 1000000\n"
      "    x = x + 0.0 * torch.embedding(self.TABLE, far)\n";
  if (way.fails == Fails::kInALayer) {
    script.layer = Script::with(script.layer, "    x = x + torch.matmul(mixed, self.wo)\n",
                                "    x = x + torch.matmul(mixed, self.wo)\n    " + Script::with(raise, "TABLE", "up"));
  } else {
    script.forward = Script::with(script.forward, "    return torch.tanh(x)",
                                  "    " + Script::with(raise, "TABLE", "table") + "    return torch.tanh(x)");
  }
  if (way.causal) {
    script.forward =
        Script::with(script.forward, "* -1.0e9",
                     "* -1.0e9 + torch.triu(torch.full([input_ids.size(1), input_ids.size(1)], -1.0e9), 1)");
  }
  return script;
}

/// Rows of these ids, padded on the right.
Request request_with(const std::vector<std::vector<std::int64_t>>& rows) {
  std::vector<std::int64_t> lengths;
  for (const auto& row : rows) lengths.push_back(std::ssize(row));
  auto request = right_padded(script_info({}), lengths, 1);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t t = 0; t < rows[r].size(); ++t) {
      request.ids()[static_cast<std::int64_t>(r)][static_cast<std::int64_t>(t)] = rows[r][t];
    }
  }
  return request;
}

/// `count` ids from 30 on that follow from `seed`.
std::vector<std::int64_t> ids(std::int64_t count, std::int64_t seed) {
  std::vector<std::int64_t> all;
  for (std::int64_t t = 0; t < count; ++t) all.push_back(30 + (seed * 37 + t * (7 + seed % 5)) % 260);
  return all;
}

class FaultsOfFullCaches : public ::testing::TestWithParam<Way> {
 protected:
  /// A cache that is full of requests of tenant "a".
  std::unique_ptr<LayerCache<Module>> full_cache() {
    Module module = make_module(script_for(GetParam()));
    {
      const c10::NoGradGuard no_grad;
      module.attr("table").toTensor()[kPoison].fill_(1e6);
    }
    auto cache = std::make_unique<LayerCache<Module>>(std::move(module), GetParam().options);
    if (!GetParam().setting.empty()) {
      CalibrationProfile profile;
      profile.budget = GetParam().options.budget.budget;
      profile.model_digest = cache->profile().digest;
      ReuseChoice choice;
      choice.mechanism = GetParam().mechanism;
      choice.setting = GetParam().setting;
      choice.match_threshold = 1;
      choice.typical_distance = 1;
      profile.reuse = choice;
      cache->use_calibration(profile);
    }
    for (std::int64_t n = 0; n < kRequests; ++n) ask(*cache, n);
    return cache;
  }
  /// Request number n of tenant "a": its second row is the next one's first, with another end.
  static Request request(std::int64_t n) {
    auto second = ids(40, n + 1);
    second.resize(36);
    second.insert(second.end(), {31, 32});
    return request_with({ids(40, n), second});
  }
  static std::string ask(LayerCache<Module>& cache, std::int64_t n) {
    std::string told;
    for (const Fidelity fidelity : GetParam().requested) {
      cache.forward(request(n).inputs, {.fidelity = fidelity, .tenant = "a"});
      for (const SequenceReport& row : cache.last_report().sequences) {
        told += std::string(to_string(row.source)) + " " + std::to_string(row.reused_tokens) + " " +
                std::to_string(row.layers.at(0).computed) + "; ";
      }
    }
    return told;
  }

  static constexpr std::int64_t kRequests = 24;
};

std::vector<Request> failing_requests() {
  auto poisoned = ids(40, 900);
  poisoned[33] = kPoison;
  auto late = ids(90, 901);
  late.back() = kPoison;
  auto alike = ids(30, 901);
  std::vector<std::vector<std::int64_t>> many;
  for (std::int64_t n = 0; n < 12; ++n) many.push_back(ids(60, 950 + n));
  many.back()[5] = kPoison;
  return {request_with({poisoned}), request_with({alike, late}), request_with({late, ids(8, 3), poisoned, alike}),
          request_with(many)};
}

TEST_P(FaultsOfFullCaches, LeaveThemAsTheyWere) {
  const auto disturbed = full_cache();
  const auto calm = full_cache();
  ASSERT_GT(disturbed->stats().evictions, 0U) << disturbed->stats().to_string();
  ASSERT_EQ(counters_of(*disturbed), counters_of(*calm));
  for (int round = 0; round < 2; ++round) {
    for (const Request& bad : failing_requests()) {
      for (const Fidelity fidelity : GetParam().requested) {
        for (const Output output : {Output::kAll, Output::kLastToken}) {
          const RequestOptions asked{.fidelity = fidelity, .output = output, .tenant = "b"};
          EXPECT_THAT([&] { disturbed->forward(bad.inputs, asked); }, ThrowsError(ErrorCode::kModelFailed));
          ASSERT_EQ(counters_of(*disturbed), counters_of(*calm));
        }
      }
    }
  }
  EXPECT_EQ(disturbed->stats().bytes, calm->stats().bytes);
  EXPECT_EQ(disturbed->stats().peak_bytes, calm->stats().peak_bytes);
  // Newest first: what the full cache still has is not pressed out by what it lacks.
  std::string served;
  for (std::int64_t n = kRequests; n-- > 0;) {
    const auto told = ask(*disturbed, n);
    EXPECT_EQ(told, ask(*calm, n)) << "request " << n;
    served += told;
  }
  EXPECT_EQ(disturbed->stats().evictions, calm->stats().evictions);
  EXPECT_THAT(served, ::testing::AnyOf(::testing::HasSubstr("identical"), ::testing::HasSubstr("prefix"),
                                       ::testing::HasSubstr("partial"), ::testing::HasSubstr("similar")));
}

/// Calls in which one allocation fails, the first, the second, ...: they throw and leave nothing, or give the answer.
TEST_P(FaultsOfFullCaches, LeaveThemAsTheyWereWhereMemoryFails) {
  const auto cache = full_cache();
  const auto fresh = request_with({ids(24, 700), ids(20, 700), ids(9, 701)});
  const auto want = [&] {
    LayerCache<Module> plain(make_module(script_for(GetParam())), {.capacity_bytes = 0});
    return plain.forward(fresh.inputs, {.fidelity = Fidelity::kIdentical});
  }();
  const Fidelity fidelity = GetParam().requested.back();
  int failed = 0;
  std::size_t number = 0;
  for (bool fired = true; fired; number += 1 + number / 40) {
    const auto before = counters_of(*cache);
    const RequestOptions asked{.fidelity = fidelity, .tenant = "b" + std::to_string(number)};
    c10::IValue got;
    bool threw = false;
    {
      const FailingAllocation failing(number);
      try {
        got = cache->forward(fresh.inputs, asked);
      } catch (const std::exception&) {
        threw = true;
      }
      fired = failing.fired();
    }
    SCOPED_TRACE(::testing::Message() << "allocation " << number);
    if (threw) {
      ++failed;
      ASSERT_EQ(counters_of(*cache), before);
    } else {
      ASSERT_TRUE(close_on_real(got, want, fresh, 1e-4));
    }
    ASSERT_LE(cache->stats().peak_bytes, cache->options().capacity_bytes);
  }
  EXPECT_GT(failed, 5);
  EXPECT_GT(number, 300U);
}

Options options_for(Fidelity fidelity, std::size_t capacity) {
  Options options{.fidelity = fidelity, .capacity_bytes = capacity};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.3, 0.1};
  options.budget.early_exit = EarlyExit::kOff;
  options.budget.audit_rate = 0;
  options.refresh.audit_rate = 0;
  return options;
}

std::vector<Way> ways() {
  std::vector<Way> all;
  for (const Fails fails : {Fails::kInALayer, Fails::kInTheHead}) {
    const std::string where = fails == Fails::kInALayer ? "InALayer" : "InTheHead";
    all.push_back({"Identical" + where,
                   fails,
                   false,
                   options_for(Fidelity::kIdentical, 150000),
                   "",
                   "",
                   {Fidelity::kIdentical, Fidelity::kLossless}});
    all.push_back({"Prefix" + where,
                   fails,
                   true,
                   options_for(Fidelity::kLossless, 400000),
                   "",
                   "",
                   {Fidelity::kIdentical, Fidelity::kLossless}});
    all.push_back({"TokenStates" + where,
                   fails,
                   false,
                   options_for(Fidelity::kBudget, 400000),
                   "token reuse",
                   "16 samples, 0 full layers",
                   {Fidelity::kBudget}});
    all.push_back({"Segments" + where,
                   fails,
                   true,
                   options_for(Fidelity::kBudget, 600000),
                   "segment reuse",
                   "recompute 0.1, 4 head tokens, means of 16",
                   {Fidelity::kLossless, Fidelity::kBudget}});
    all.push_back({"Threshold" + where,
                   fails,
                   false,
                   options_for(Fidelity::kThreshold, 300000),
                   "",
                   "",
                   {Fidelity::kIdentical, Fidelity::kThreshold}});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, FaultsOfFullCaches, ::testing::ValuesIn(ways()),
                         [](const auto& param) { return param.param.name; });

// --- how much is held ---------------------------------------------------------------------------------

TEST(CachePeak, IsTheMostThatWasHeldAtOnce) {
  // Outputs first, then prefixes beside fewer of them: the sum of the banks' peaks would be more than was ever held.
  const auto info = model_info("tiny-gpt2-sdpa");
  for (const std::size_t capacity : {std::size_t{200} << 10, std::size_t{2} << 20}) {
    LayerCache<Module> cache(load_model("tiny-gpt2-sdpa"), {.capacity_bytes = capacity});
    std::size_t most = 0;
    for (std::uint64_t n = 0; n < 30; ++n) {
      const auto request = right_padded(info, {20, 7}, 1 + n / 2);
      cache.forward(request.inputs, {.fidelity = n < 15 ? Fidelity::kIdentical : Fidelity::kLossless});
      if (n == 14) {
        most = std::max(most, cache.stats().bytes);
        cache.clear();
        EXPECT_EQ(cache.stats().bytes, 0U);
      }
      const auto stats = cache.stats();
      most = std::max(most, stats.bytes);
      ASSERT_GE(stats.peak_bytes, most);
      ASSERT_LE(stats.peak_bytes, capacity);
    }
    // What is taken and given back within a call (a table that grows, room for a copy) is not sampled between calls.
    EXPECT_LE(cache.stats().peak_bytes, most + most / 10 + 4096);
  }
}

TEST(CachePeak, CountsCalibratedBanksWhileTheyAreInUse) {
  Options options{.fidelity = Fidelity::kBudget};
  options.budget.budget = {BudgetMetric::kRelativeError, 0.5, 0.1};
  options.budget.audit_rate = 0;
  options.budget.exit_layers = {0, 1, 2};
  options.budget.token_reuse = false;
  const auto info = model_info("tiny-bert-pooled");
  LayerCache<Module> cache(load_model("tiny-bert-pooled"), options);
  std::vector<Inputs> sample;
  for (std::uint64_t n = 0; n < 150; ++n) sample.push_back(right_padded(info, {6, 5, 7, 6}, 1 + n % 10).inputs);
  for (std::uint64_t n = 0; n < 150; ++n) sample[n][0].toTensor()[0][2] = 10 + static_cast<std::int64_t>(n);
  const auto profile = cache.calibrate(sample);
  const auto stats = cache.stats();
  EXPECT_EQ(stats.bytes, profile.bytes);
  EXPECT_EQ(stats.budget->bytes, profile.bytes);
  EXPECT_GE(stats.peak_bytes, profile.bytes);
  ASSERT_TRUE(profile.exit) << profile.to_string();
  ASSERT_GT(profile.bytes, 0U);
  cache.use_calibration(profile);
  EXPECT_EQ(cache.stats().bytes, profile.bytes) << "counted once";
  EXPECT_EQ(cache.stats().peak_bytes, stats.peak_bytes);
  CalibrationProfile none;
  none.budget = options.budget.budget;
  none.model_digest = cache.profile().digest;
  cache.use_calibration(none);
  EXPECT_EQ(cache.stats().bytes, 0U);
  EXPECT_EQ(cache.stats().peak_bytes, stats.peak_bytes);
}

}  // namespace
}  // namespace llmcache::test
