// llmcache-format-bench: what keeping states in a BankFormat costs, on random keys and values of a model of 12 layers
// of 768 values, 12 heads. One thread; no model is needed.
//
// Names: WHAT/FORMAT/TOKENS. WHAT: encode makes the stored states of all layers; copy puts them, one token less at
// either end, where a running pass wants them (into a longer tensor of keys and one of values, whose memory each layer
// uses again, all layers once through); shift is copy with a correction added. copy/merge is what copy is measured
// against: the rows of float32 tensors by memcpy. Counters: bytes (held), error (relative, 2-norm). Options of Google
// Benchmark work.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "bank/stored_states.h"
#include "guarded_main.h"

namespace llmcache::bench {
namespace {

constexpr std::int64_t kTensors = 24;  // keys and values of 12 layers
constexpr std::int64_t kHeads = 12;
constexpr std::int64_t kWidth = 64;
constexpr std::int64_t kMargin = 8;  // tokens before and behind in the tensors of the running pass

std::vector<at::Tensor> random_states(std::int64_t tokens) {
  at::manual_seed(0);
  std::vector<at::Tensor> states;
  for (std::int64_t i = 0; i < kTensors; ++i) states.push_back(at::randn({1, kHeads, tokens, kWidth}));
  return states;
}

/// For keys and for values.
std::vector<at::Tensor> targets(std::int64_t tokens) {
  std::vector<at::Tensor> views;
  for (std::int64_t i = 0; i < 2; ++i) {
    views.push_back(at::zeros({1, kHeads, tokens + 2 * kMargin, kWidth}).narrow(2, kMargin, tokens - 2));
  }
  return views;
}

std::vector<StoredStates> stored_states(const std::vector<at::Tensor>& states, BankFormat format) {
  std::vector<StoredStates> stored;
  for (const at::Tensor& tensor : states) stored.push_back(StoredStates::encode(tensor, 2, format));
  return stored;
}

void encode(benchmark::State& state, BankFormat format, std::int64_t tokens) {
  const std::vector<at::Tensor> states = random_states(tokens);
  std::vector<StoredStates> stored = stored_states(states, format);
  for ([[maybe_unused]] auto _ : state) {
    for (std::size_t i = 0; i < states.size(); ++i) stored[i].write(0, states[i]);
  }
  std::size_t bytes = 0;
  for (const StoredStates& one : stored) bytes += one.bytes();
  state.counters["bytes"] = static_cast<double>(bytes);
  state.counters["error"] = stored[0].relative_error(states[0]);
}

void copy(benchmark::State& state, BankFormat format, std::int64_t tokens, bool shifted) {
  const std::vector<StoredStates> stored = stored_states(random_states(tokens), format);
  const std::vector<at::Tensor> to = targets(tokens);
  const at::Tensor shift = shifted ? at::randn({1, kHeads, 1, kWidth}) : at::Tensor();
  for ([[maybe_unused]] auto _ : state) {
    for (std::size_t i = 0; i < stored.size(); ++i) stored[i].copy_to(to[i % 2], 1, shift);
  }
}

void merge(benchmark::State& state, std::int64_t tokens) {
  const std::vector<at::Tensor> states = random_states(tokens);
  const std::vector<at::Tensor> to = targets(tokens);
  for ([[maybe_unused]] auto _ : state) {
    for (std::size_t i = 0; i < states.size(); ++i) {
      for (std::int64_t head = 0; head < kHeads; ++head) {
        std::memcpy(to[i % 2].mutable_data_ptr<float>() + head * (tokens + 2 * kMargin) * kWidth,
                    states[i].const_data_ptr<float>() + (head * tokens + 1) * kWidth,
                    static_cast<std::size_t>((tokens - 2) * kWidth) * sizeof(float));
      }
    }
    benchmark::ClobberMemory();
  }
}

int run(int argc, char** argv) {
  at::set_num_threads(1);
  const auto add = [](const std::string& name, auto&& work) {
    benchmark::RegisterBenchmark(name.c_str(), work)->Unit(benchmark::kMicrosecond);
  };
  for (const std::int64_t tokens : {64, 512}) {
    const std::string suffix = '/' + std::to_string(tokens);
    add("copy/merge" + suffix, [=](benchmark::State& state) { merge(state, tokens); });
    for (const auto format :
         {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
      const std::string name = to_string(format) + suffix;
      add("copy/" + name, [=](benchmark::State& state) { copy(state, format, tokens, false); });
      add("shift/" + name, [=](benchmark::State& state) { copy(state, format, tokens, true); });
      add("encode/" + name, [=](benchmark::State& state) { encode(state, format, tokens); });
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  return llmcache::bench::guarded_main("llmcache-format-bench", argc, argv, llmcache::bench::run);
}
