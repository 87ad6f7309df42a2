// What a cache asks of a device: copies and waits of a call, and the order between streams. Run as it is: it chooses
// the devices by itself, and needs no --device.
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <optional>
#include <thread>

#include "bank/stored_states.h"
#include "load_on.h"
#include "protected_device.h"
#include "support.h"

namespace llmcache::test {
namespace {

Inputs moved(const Inputs& inputs, at::Device device) {
  Inputs all;
  for (const c10::IValue& input : inputs) all.emplace_back(input.toTensor().to(device));
  return all;
}

c10::impl::VirtualGuardImpl guard_of_device() { return c10::impl::VirtualGuardImpl(c10::kPrivateUse1); }

c10::Stream fresh_stream(at::Device device) { return guard_of_device().getStreamFromGlobalPool(device); }

/// A model on device 0 or 1, and a plain copy of it there. The current device is 0 all the time.
class OnDevice : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { (void)take_stream_errors(); }
  void TearDown() override {
    for (const std::string& error : take_stream_errors()) ADD_FAILURE() << error;
    EXPECT_EQ(guard_of_device().getDevice().index(), 0);
  }

  [[nodiscard]] at::Device device() const { return protected_device(GetParam()); }
  [[nodiscard]] Module load(const std::string& name) const {
    return load_on(std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / (name + ".pt"), device());
  }
  /// A cache that compares nothing with the plain model, which would count as its own work.
  [[nodiscard]] LayerCache<Module> cache_of(const std::string& name, Options options = {}) const {
    options.verify_rate = 0;
    return LayerCache<Module>(load(name), options);
  }
  /// Ids [1, tokens] of one long sequence, and its mask.
  [[nodiscard]] Inputs beginning(const std::string& name, std::int64_t tokens) const {
    const auto request = right_padded(model_info(name), {64}, 7);
    return moved({request.ids().narrow(1, 0, tokens), request.mask().narrow(1, 0, tokens)}, device());
  }
};

INSTANTIATE_TEST_SUITE_P(Devices, OnDevice, ::testing::Values(0, 1));

TEST_P(OnDevice, ADecodeStepCopiesItsIdsInAndItsIndicesOut) {
  for (const char* name : {"tiny-gpt2-sdpa", "tiny-llama-sdpa", "tiny-gpt2-eager", "zoo-qwen2"}) {
    SCOPED_TRACE(name);
    auto cache = cache_of(name);
    const RequestOptions step{.output = Output::kLastToken};
    for (std::int64_t tokens = 20; tokens < 24; ++tokens) (void)cache.forward(beginning(name, tokens), step);
    for (std::int64_t tokens = 24; tokens < 30; ++tokens) {
      const Inputs inputs = beginning(name, tokens);
      const auto before = device_counts();
      const auto result = cache.forward(inputs, step);
      const auto asked = device_counts() - before;
      ASSERT_EQ(cache.last_report().sequences[0].reused_tokens, tokens - 1);
      EXPECT_EQ(asked.to_host, 1) << "the ids and the mask, " << asked.to_string();
      EXPECT_LE(asked.waits, 1) << asked.to_string();
      EXPECT_LE(asked.to_device, 2) << "which positions are embedded, which rows run: " << asked.to_string();
      EXPECT_EQ(asked.across, 0);
      EXPECT_EQ(result.toTensor().device(), device());
    }
  }
}

TEST_P(OnDevice, AKnownRequestCopiesItsIdsIn) {
  const std::string name = "tiny-bert-sdpa";
  auto cache = cache_of(name);
  const Inputs inputs = beginning(name, 30);
  const auto first = cache.forward(inputs);
  const auto before = device_counts();
  const auto again = cache.forward(inputs);
  const auto asked = device_counts() - before;
  ASSERT_EQ(cache.last_report().sequences[0].source, Source::kIdentical);
  EXPECT_EQ(asked.to_host, 1);
  EXPECT_EQ(asked.to_device, 0);
  EXPECT_EQ(asked.waits, 1);
  EXPECT_TRUE(same_bits(again, first));
}

TEST_P(OnDevice, APackedBatchCopiesItsIndicesOnce) {
  const std::string name = "tiny-bert-sdpa";
  auto cache = cache_of(name, {.capacity_bytes = 0});
  const auto request = right_padded(model_info(name), {9, 4, 12, 1}, 3);
  const Inputs inputs = moved(request.inputs, device());
  (void)cache.forward(inputs);
  const auto before = device_counts();
  (void)cache.forward(inputs);
  const auto asked = device_counts() - before;
  ASSERT_EQ(cache.last_report().execution, Execution::kPacked);
  EXPECT_EQ(asked.to_host, 1);
  EXPECT_LE(asked.to_device, 2) << asked.to_string();
  EXPECT_LE(asked.waits, 1);
}

/// Calls of one cache on three streams in turns.
struct Turns {
  struct Turn {
    Request request;
    Inputs inputs;
    c10::IValue got;
  };

  void run(LayerCache<Module>& cache, const std::string& name, at::Device device);
  /// Answers that are not the plain module's.
  [[nodiscard]] int wrong(Module& plain) const {
    return static_cast<int>(std::count_if(turns.begin(), turns.end(), [&](const Turn& turn) {
      return !close_on_real(turn.got, run_plain(plain, turn.inputs), turn.request, 1e-4);
    }));
  }

  std::vector<Turn> turns;
  std::int64_t reused = 0;  ///< tokens
};

void Turns::run(LayerCache<Module>& cache, const std::string& name, at::Device device) {
  const std::vector<c10::Stream> streams{guard_of_device().getStream(device), fresh_stream(device),
                                         fresh_stream(device)};
  // The host looks at no result meanwhile: that would be a wait. It does wait for what a stream was given before when
  // it reads the ids of a call there; two calls in turn, so that the first is run while the stream before has not been.
  for (std::int64_t turn = 0; turn < 40; ++turn) {
    const c10::StreamGuard guard(streams[static_cast<std::size_t>(turn / 2) % streams.size()]);
    auto request = right_padded(model_info(name), {20 + turn}, static_cast<std::uint64_t>(turn % 4 == 3 ? turn : 7));
    const Inputs inputs = moved(request.inputs, device);
    auto got = cache.forward(inputs);
    reused += cache.last_report().sequences[0].reused_tokens;
    turns.push_back({std::move(request), inputs, std::move(got)});
  }
  guard_of_device().synchronizeDevice(device.index());
}

TEST_P(OnDevice, CallsOnSeveralStreamsComeBehindEachOther) {
  const std::string name = "tiny-gpt2-sdpa";
  Module plain = load(name);
  for (const bool delayed : {false, true}) {
    SCOPED_TRACE(delayed ? "work begins when somebody waits for it" : "work runs at once");
    // A small cache, so that what one stream reads another evicts, and writes again.
    auto cache = cache_of(name, {.capacity_bytes = 600 << 10});
    Turns turns;
    {
      std::optional<DelayedStreams> delay;
      if (delayed) delay.emplace();
      turns.run(cache, name, device());
    }
    EXPECT_EQ(turns.wrong(plain), 0);
    EXPECT_GT(turns.reused, 0);
    EXPECT_GT(cache.stats().evictions, 0U);
  }
}

// Were no stream to wait for another, each test would fail: the device tells of it.
TEST_P(OnDevice, AMissingWaitIsFound) {
  const std::string name = "tiny-gpt2-sdpa";
  auto cache = cache_of(name);
  Turns turns;
  {
    const DelayedStreams delay;
    const ForgottenWaits fault;
    turns.run(cache, name, device());
  }
  EXPECT_GT(turns.reused, 0);
  EXPECT_FALSE(take_stream_errors().empty());
}

TEST_P(OnDevice, ThreadsWithStreamsOfTheirOwn) {
  const std::string name = "tiny-llama-sdpa";
  auto cache = cache_of(name, {.capacity_bytes = 2 << 20});
  std::vector<std::thread> threads;
  std::vector<std::string> wrong(4);
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      try {
        const c10::StreamGuard guard(fresh_stream(device()));
        // The order of streams is watched by whole tensors, so that a block which two calls use at once, each its own
        // part, would look wrong: each thread has its own sequences. They evict those of others.
        for (std::int64_t tokens = 10; tokens < 30; ++tokens) {
          (void)cache.forward(beginning(name, tokens), {.tenant = std::to_string(t)});
        }
        guard_of_device().synchronizeDevice(device().index());  // before the model goes
      } catch (const std::exception& error) {
        wrong[t] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : wrong) EXPECT_EQ(error, "");
}

TEST_P(OnDevice, AResultThatAnotherStreamReadsWithoutWaitingIsFound) {
  const std::string name = "tiny-gpt2-sdpa";
  auto cache = cache_of(name);
  const Inputs inputs = beginning(name, 12);
  (void)cache.forward(inputs);
  at::Tensor sum;
  const auto side = fresh_stream(device());
  c10::impl::VirtualGuardImpl(c10::kPrivateUse1).synchronizeDevice(device().index());
  const auto result = cache.forward(inputs).toTensor();
  {
    const c10::StreamGuard guard(side);
    sum = result.sum();
  }
  EXPECT_FALSE(take_stream_errors().empty()) << "the caller's own wait was missing";
  guard_of_device().synchronizeDevice(device().index());
  (void)take_stream_errors();
}

TEST_P(OnDevice, AHostReadOfWhatACacheReturnsIsACrash) {
  GTEST_FLAG_SET(death_test_style, "fast");
  const std::string name = "tiny-gpt2-sdpa";
  auto cache = cache_of(name);
  const auto result = cache.forward(beginning(name, 12)).toTensor();
  EXPECT_EXIT(
      {
        volatile float value = *result.const_data_ptr<float>();
        (void)value;
        std::exit(0);
      },
      ::testing::KilledBySignal(SIGSEGV), "");
}

TEST_P(OnDevice, FormatsOfBanksHoldWhatTheyHoldOnACpu) {
  const auto states = at::randn({2, 9, 70});
  const auto shift = at::randn({2, 1, 70});
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
    SCOPED_TRACE(to_string(format));
    const auto here = StoredStates::encode(states.to(device()), 1, format);
    const auto there = StoredStates::encode(states, 1, format);
    EXPECT_LE(there.bytes(), here.bytes());
    EXPECT_TRUE(at::allclose(here.decode().cpu(), there.decode(), 1e-6, 1e-6));
    const auto to = at::zeros({2, 3, 70}, states.options().device(device()));
    const auto to_there = at::zeros({2, 3, 70});
    here.copy_to(to, 4, shift.to(device()));
    there.copy_to(to_there, 4, shift);
    EXPECT_TRUE(at::allclose(to.cpu(), to_there, 1e-6, 1e-6));
  }
}

TEST_P(OnDevice, StoredStatesCountWhatTheyTake) {
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
    SCOPED_TRACE(to_string(format));
    const auto options = at::TensorOptions().device(device());
    const auto before = device_bytes(GetParam());
    const auto stored = StoredStates::empty({2, 9, 70}, 1, options, format);
    EXPECT_EQ(stored.bytes(), device_bytes(GetParam()) - before);
    EXPECT_EQ(stored.bytes(), StoredStates::bytes_for({2, 9, 70}, options, format));
  }
}

// Small outputs take a step of the allocator each, which is twice what they hold.
TEST_P(OnDevice, TheCapacityHoldsForWhatTheAllocatorTakes) {
  for (const std::string name : {"tiny-bert-pooled", "tiny-gpt2-sdpa", "tiny-bert-sdpa"}) {
    SCOPED_TRACE(name);
    auto cache = cache_of(name, {.capacity_bytes = 100 << 10});
    std::size_t most = 0;
    const auto empty = device_bytes(GetParam());
    for (std::uint64_t seed = 0; seed < 120; ++seed) {
      const auto request = right_padded(model_info(name), {5, 6}, seed);
      (void)cache.forward(moved(request.inputs, device()));
      most = std::max(most, device_bytes(GetParam()) - empty);
      ASSERT_LE(device_bytes(GetParam()) - empty, cache.stats().bytes);
    }
    EXPECT_GT(most, std::size_t{20} << 10);
    EXPECT_LE(most, cache.options().capacity_bytes);
    EXPECT_GT(cache.stats().evictions, 0U);
  }
}

TEST_P(OnDevice, OutputsCountWhatTheyTake) {
  const std::string name = "tiny-bert-pooled";
  constexpr std::size_t kHeld = 64 * sizeof(float);  // of a row
  auto here = cache_of(name);
  LayerCache<Module> there(
      load_on(std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / (name + ".pt"), at::kCPU),
      {.verify_rate = 0});
  const auto empty = device_bytes(GetParam());
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    const auto request = right_padded(model_info(name), {5, 6}, seed);
    (void)here.forward(moved(request.inputs, device()));
    (void)there.forward(request.inputs);
  }
  const std::size_t taken = device_bytes(GetParam()) - empty;
  EXPECT_EQ(taken, 20 * 2 * kHeld);
  EXPECT_EQ(here.stats().bytes - there.stats().bytes, taken - 20 * kHeld);
}

TEST_P(OnDevice, PackedWeightsAreForCpus) {
  EXPECT_THAT([&] { (void)cache_of("tiny-bert-sdpa", {.weights = Weights::kPackedBFloat16}); },
              ThrowsError(ErrorCode::kNotAvailable, "CPU"));
}

TEST_P(OnDevice, GeneratesAsOnACpu) {
  const std::string name = "tiny-gpt2-sdpa";
  LayerCache<Module> here(load(name));
  LayerCache<Module> there(
      load_on(std::filesystem::path(std::getenv("LLMCACHE_MODELS_DIR")) / (name + ".pt"), at::kCPU));
  const std::vector<std::int64_t> prompt{11, 12, 13, 14, 15, 16};
  const GenerateOptions options{.max_new_tokens = 8};
  EXPECT_EQ(generate(here, prompt, options).tokens, generate(there, prompt, options).tokens);
}

}  // namespace
}  // namespace llmcache::test
