// LayerHook: what hooks see, change and stop, and that nobody else ever gets that.
#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "support.h"

namespace llmcache::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

/// Keeps what it sees, by row and layer.
class Recorder : public LayerHook {
 public:
  HookAction at_layer(LayerStates& at) override {
    const std::lock_guard lock(mutex_);
    seen_[{at.row, at.layer}] = at.states.clone();
    return HookAction::kGoOn;
  }
  std::map<std::pair<std::int64_t, std::int64_t>, at::Tensor> seen() const {
    const std::lock_guard lock(mutex_);
    return seen_;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::int64_t, std::int64_t>, at::Tensor> seen_;
};

/// Calls a function in front of one layer.
class At : public LayerHook {
 public:
  using Act = std::function<HookAction(LayerStates&)>;
  At(std::int64_t layer, Act act) : layer_(layer), act_(std::move(act)) {}
  bool watches(std::int64_t layer) const override { return layer == layer_; }
  bool writes() const override { return true; }
  HookAction at_layer(LayerStates& at) override { return act_(at); }

 private:
  std::int64_t layer_;
  Act act_;
};

std::shared_ptr<At> adding(std::int64_t layer, double value) {
  return std::make_shared<At>(layer, [value](LayerStates& at) {
    at.states.add_(value);
    return HookAction::kGoOn;
  });
}

/// Wraps it; null if it is refused, or refuses hooks, which it then says.
std::unique_ptr<LayerCache<Module>> hookable(const std::string& name) {
  std::unique_ptr<LayerCache<Module>> cache;
  try {
    cache = std::make_unique<LayerCache<Module>>(cache_of(name));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupportedModel) << error.what();
    return nullptr;
  }
  if (cache->profile().granularity != Granularity::kWholeLayers) return cache;
  const auto request = right_padded(model_info(name), {5}, 1);
  EXPECT_THAT([&] { cache->forward(request.inputs, {.hook = std::make_shared<Recorder>()}); },
              ThrowsError(ErrorCode::kNotAvailable));
  return nullptr;
}

/// All but the one whose outputs are no numbers, so that they cannot be compared.
std::vector<std::string> names_of_numbers() {
  auto names = wrappable_names({"tiny-", "zoo-"});
  std::erase(names, "tiny-nan");
  return names;
}

class HooksOf : public ::testing::TestWithParam<std::string> {};

TEST_P(HooksOf, SeeEveryLayerAndChangeNothing) {
  const auto info = model_info(GetParam());
  const auto made = hookable(GetParam());
  if (!made) return;
  LayerCache<Module>& cache = *made;
  Module plain = load_model(GetParam());
  const auto request = right_padded(info, {7, 3, 5}, 11);
  const auto want = run_plain(plain, request.inputs);
  const auto recorder = std::make_shared<Recorder>();
  const auto got = cache.forward(request.inputs, {.hook = recorder});
  EXPECT_TRUE(close_on_real(got, want, request, tolerance_of(info)));
  const auto layers = cache.profile().layers;
  const auto seen = recorder->seen();
  ASSERT_EQ(static_cast<std::int64_t>(seen.size()), 3 * (layers + 1));
  for (const std::int64_t layer : {std::int64_t{0}, layers / 2, layers}) {
    const auto pooled = cache.pooled_state(request.inputs, layer);
    for (std::int64_t row = 0; row < 3; ++row) {
      const auto& states = seen.at({row, layer});
      EXPECT_EQ(states.size(0), request.spans[static_cast<std::size_t>(row)].tokens);
      const auto mean = states.to(at::kFloat).mean(0);
      const auto expected = at::tensor(pooled[static_cast<std::size_t>(row)]);
      EXPECT_TRUE(at::allclose(mean, expected, 1e-2, 1e-2)) << "row " << row << ", layer " << layer;
    }
  }
  EXPECT_EQ(cache.stats().entries, 0U) << "a call with a hook keeps nothing";
}

TEST_P(HooksOf, ChangeWhatIsReturnedAndNothingThatIsKept) {
  const auto info = model_info(GetParam());
  const auto made = hookable(GetParam());
  if (!made) return;
  LayerCache<Module>& cache = *made;
  Module plain = load_model(GetParam());
  const auto request = right_padded(info, {7, 3, 5}, 12);
  const auto want = run_plain(plain, request.inputs);
  cache.forward(request.inputs);
  const auto kept = cache.stats().entries;
  const auto layer = cache.profile().layers / 2;
  const auto changed = cache.forward(request.inputs, {.hook = adding(layer, 0)});
  EXPECT_TRUE(close_on_real(changed, want, request, tolerance_of(info))) << "zero was added";
  const auto other = cache.forward(request.inputs, {.hook = std::make_shared<At>(layer, [](LayerStates& at) {
                                                      at.states = at.states.flip({1}).mul(3).contiguous();
                                                      return HookAction::kGoOn;
                                                    })});
  EXPECT_FALSE(close_on_real(other, want, request, tolerance_of(info)));
  EXPECT_EQ(cache.stats().entries, kept);
  EXPECT_TRUE(close_on_real(cache.forward(request.inputs), want, request, tolerance_of(info)));
}

INSTANTIATE_TEST_SUITE_P(All, HooksOf, ::testing::ValuesIn(names_of_numbers()), test_name);

TEST(Hooks, WriteWhatTheNextLayerGets) {
  const std::string name = "tiny-bert-sdpa";
  const auto info = model_info(name);
  LayerCache<Module> cache = cache_of(name);
  const auto request = right_padded(info, {6}, 3);
  const auto layers = static_cast<std::int32_t>(cache.profile().layers);
  constexpr std::int32_t kLayer = 1;
  std::vector<std::shared_ptr<const SequenceState>> captured;
  cache.forward_plan(request.inputs, cache.full_plan(request.inputs), {}, &captured);
  // The same by hand: the pass goes on in front of the layer from changed states.
  auto donor = std::make_shared<SequenceState>(*captured.at(0));
  donor->hidden[kLayer] = donor->hidden[kLayer] + 0.5;
  Plan resume{1, 6, layers, {{0, 0, 6, 0, {{0, 6, kLayer, layers, 0}}}}};
  const auto want = cache.forward_plan(request.inputs, resume, {donor});
  const auto got = cache.forward(request.inputs, {.hook = adding(kLayer, 0.5)});
  EXPECT_TRUE(close_on_real(got, want, request, 1e-5));
}

TEST(Hooks, StopSequences) {
  const std::string name = "tiny-bert-sdpa";
  const auto info = model_info(name);
  LayerCache<Module> cache = cache_of(name);
  Module plain = load_model(name);
  const auto request = right_padded(info, {6, 4}, 3);
  const auto want = run_plain(plain, request.inputs).toTensor();
  const auto stop = [](std::int64_t least) {
    return std::make_shared<At>(
        1, [least](LayerStates& at) { return at.row >= least ? HookAction::kStop : HookAction::kGoOn; });
  };
  const auto got = cache.forward(request.inputs, {.hook = stop(1)}).toTensor();
  EXPECT_TRUE(at::allclose(got[0], want[0], 1e-4, 1e-4));
  EXPECT_EQ(got[1].abs().max().item<double>(), 0);
  const auto report = cache.last_report();
  EXPECT_EQ(report.sequences[1].layers[0].computed, 4);
  EXPECT_EQ(report.sequences[1].layers[1].computed, 0);
  const auto none = cache.forward(request.inputs, {.hook = stop(0)}).toTensor();
  EXPECT_EQ(none.sizes(), want.sizes());
  EXPECT_EQ(none.abs().max().item<double>(), 0);
}

TEST(Hooks, OfACacheComeFirstAndAreRemoved) {
  const std::string name = "tiny-gpt2-sdpa";
  LayerCache<Module> cache = cache_of(name);
  const auto request = right_padded(model_info(name), {6}, 3);
  std::vector<int> order;
  const auto telling = [&](int number) {
    return std::make_shared<At>(0, [&order, number](LayerStates&) {
      order.push_back(number);
      return HookAction::kGoOn;
    });
  };
  const auto first = telling(1);
  cache.add_hook(first);
  cache.add_hook(telling(2));
  cache.forward(request.inputs, {.hook = telling(3)});
  EXPECT_THAT(order, ElementsAre(1, 2, 3));
  order.clear();
  cache.remove_hook(first);
  cache.remove_hook(first);
  cache.forward(request.inputs);
  EXPECT_THAT(order, ElementsAre(2));
  EXPECT_THAT([&] { cache.add_hook(nullptr); }, ThrowsError(ErrorCode::kInvalidOptions, "null"));
}

TEST(Hooks, AnswerTheLastTokenAlone) {
  const std::string name = "tiny-gpt2-sdpa";
  const auto info = model_info(name);
  LayerCache<Module> cache = cache_of(name);
  const auto request = right_padded(info, {6, 9}, 3);
  const auto all = cache.forward(request.inputs, {.hook = adding(1, 0.25)}).toTensor();
  const auto last = cache.forward(request.inputs, {.output = Output::kLastToken, .hook = adding(1, 0.25)}).toTensor();
  ASSERT_EQ(last.size(1), 1);
  EXPECT_TRUE(at::allclose(last[0][0], all[0][5], 1e-4, 1e-4));
  EXPECT_TRUE(at::allclose(last[1][0], all[1][8], 1e-4, 1e-4));
}

TEST(HookFaults, WhatTheyThrowReachesTheCallerAndNothingIsLeft) {
  const std::string name = "tiny-gpt2-sdpa";
  LayerCache<Module> cache = cache_of(name);
  const auto request = right_padded(model_info(name), {6}, 3);
  cache.forward(request.inputs);
  const auto before = cache.stats();
  struct MyOwn {};
  const auto throwing = std::make_shared<At>(1, [](LayerStates&) -> HookAction { throw MyOwn(); });
  EXPECT_THROW(cache.forward(request.inputs, {.hook = throwing}), MyOwn);
  const auto replacing = [](at::Tensor with) {
    return std::make_shared<At>(1, [with](LayerStates& at) {
      at.states = with;
      return HookAction::kGoOn;
    });
  };
  EXPECT_THAT(
      [&] {
        cache.forward(request.inputs, {.hook = replacing(at::zeros({2, 2}))});
      },
      ThrowsError(ErrorCode::kInvalidInput, "row 0 in front of layer 1"));
  EXPECT_THAT([&] { cache.forward(request.inputs, {.hook = replacing({})}); },
              ThrowsError(ErrorCode::kInvalidInput, "undefined"));
  /// Says that it changes nothing, and does.
  class Liar final : public LayerHook {
   public:
    HookAction at_layer(LayerStates& at) override {
      at.states = at.states.clone();
      return HookAction::kGoOn;
    }
  };
  EXPECT_THAT([&] { cache.forward(request.inputs, {.hook = std::make_shared<Liar>()}); },
              ThrowsError(ErrorCode::kInvalidInput, "writes()"));
  class Unwilling final : public LayerHook {
   public:
    bool watches(std::int64_t) const override { throw MyOwn(); }
    HookAction at_layer(LayerStates&) override { return HookAction::kGoOn; }
  };
  EXPECT_THROW(cache.forward(request.inputs, {.hook = std::make_shared<Unwilling>()}), MyOwn);
  EXPECT_EQ(cache.stats().requests, before.requests);
  EXPECT_EQ(cache.stats().entries, before.entries);
  EXPECT_THAT(cache.stats().fallbacks, IsEmpty());
}

TEST(HookFaults, ModelsThatCannotBePackedRefuse) {
  LayerCache<Module> cache = cache_of("tiny-throws");
  const auto request = right_padded(model_info("tiny-throws"), {6}, 3);
  EXPECT_THAT([&] { cache.forward(request.inputs, {.hook = std::make_shared<Recorder>()}); },
              ThrowsError(ErrorCode::kNotAvailable, "whole layers"));
  Module plain = load_model("tiny-throws");
  EXPECT_TRUE(same_bits(cache.forward(request.inputs), run_plain(plain, request.inputs)));
}

TEST(HookThreads, EachCallHasItsOwn) {
  const std::string name = "tiny-bert-sdpa";
  const auto info = model_info(name);
  LayerCache<Module> cache = cache_of(name);
  const auto request = right_padded(info, {6, 4}, 3);
  const auto plain = cache.forward(request.inputs);
  std::vector<c10::IValue> wanted;
  for (int t = 0; t < 4; ++t) wanted.push_back(cache.forward(request.inputs, {.hook = adding(1, 0.1 * (t + 1))}));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int turn = 0; turn < 10; ++turn) {
        const auto got = cache.forward(request.inputs, {.hook = adding(1, 0.1 * (t + 1))});
        if (!close_on_real(got, wanted[static_cast<std::size_t>(t)], request, 1e-4)) ++wrong;
        if (!close_on_real(cache.forward(request.inputs), plain, request, 1e-4)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace llmcache::test
