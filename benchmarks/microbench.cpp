// llmcache-microbench: what single things cost. README.md explains the benchmarks.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "bank/evicted_keys.h"
#include "call_totals.h"
#include "failure.h"
#include "files.h"
#include "loaded_model.h"
#include "machine.h"
#include "statistics.h"

namespace llmcache::bench {
namespace {

constexpr std::int64_t kTokens = 128;
constexpr std::int64_t kFirstId = 10;  // leaves special tokens out
constexpr int kWarmUp = 3;

/// The model under test, and ids for it that were never used before.
class Fixture {
 public:
  Fixture(const ModelFile& file, Weights weights)
      : model_(file),
        weights_(weights),
        program_(std::filesystem::path(file.path).replace_extension(".pt2")),
        vocabulary_(file.vocabulary) {
    if (vocabulary_ <= kFirstId) throw Failure(fmt::format("model {}: its sidecar gives no vocabulary", file.name));
    Options options;
    options.weights = weights_;
    options.capacity_bytes = std::size_t{1} << 30;
    model_.wrap(options);
  }

  LoadedModel& model() { return model_; }
  Cache& cache() { return model_.cache(); }

  /// Around the same module, after so many requests that its running mean state, taken over at 16 and 32, is there.
  Cache& threshold_cache() {
    if (!threshold_cache_) {
      Options options;
      options.fidelity = Fidelity::kThreshold;
      options.weights = weights_;
      options.threshold.tau = 0.9;
      threshold_cache_ = model_.make_cache(options);
    }
    threshold_cache_->clear();
    for (int i = 0; i < 40; ++i) threshold_cache_->forward(fresh({kTokens}));
    return *threshold_cache_;
  }

  /// The same model as a program of torch.export, if its file is beside the other; null: it is not.
  ExportedCache* program_cache() {
    if (!program_cache_ && std::filesystem::exists(program_)) {
      Options options;
      options.weights = weights_;
      options.capacity_bytes = std::size_t{1} << 30;
      program_cache_ = std::make_unique<ExportedCache>(load_exported(program_), options);
    }
    return program_cache_.get();
  }
  [[nodiscard]] const std::filesystem::path& program() const { return program_; }

  Inputs fresh(const std::vector<std::int64_t>& lengths) {
    std::uniform_int_distribution<std::int32_t> id(kFirstId, static_cast<std::int32_t>(vocabulary_) - 1);
    std::vector<std::vector<std::int32_t>> ids;
    for (const std::int64_t length : lengths) {
      auto& row = ids.emplace_back(static_cast<std::size_t>(length));
      for (std::int32_t& one : row) one = id(generator_);
    }
    return model_.inputs(Rows(ids.begin(), ids.end()));
  }

 private:
  LoadedModel model_;
  const Weights weights_;
  const std::filesystem::path program_;
  std::shared_ptr<Cache> threshold_cache_;
  std::unique_ptr<ExportedCache> program_cache_;
  std::int64_t vocabulary_;
  std::mt19937_64 generator_{0};
};

using Prepare = std::function<Inputs()>;
using Forward = std::function<c10::IValue(const Inputs&)>;
enum class Ratio { kSpeedup, kOverhead };

/// Runs both functions as pairs for the iterations of `state`, each with the inputs that `prepare`, which is not timed,
/// makes for the pair.
void run_pairs(benchmark::State& state, Ratio kind, const Prepare& prepare, const Forward& plain,
               const Forward& cached) {
  std::vector<double> plain_ms, cached_ms, ratios;
  const auto timed = [](const Forward& function, const Inputs& inputs) {
    const auto start = Clock::now();
    const c10::IValue output = function(inputs);
    return ms_since(start);
  };
  const auto pair = [&](bool plain_first) {
    const Inputs inputs = prepare();
    double p = plain_first ? timed(plain, inputs) : 0;
    const double c = timed(cached, inputs);
    if (!plain_first) p = timed(plain, inputs);
    return std::pair(p, c);
  };
  for (int i = 0; i < kWarmUp; ++i) pair(i % 2 == 0);
  for ([[maybe_unused]] auto _ : state) {
    const auto [p, c] = pair(ratios.size() % 2 == 0);
    plain_ms.push_back(p);
    cached_ms.push_back(c);
    ratios.push_back(kind == Ratio::kOverhead ? c / p : p / c);
    state.SetIterationTime(c / 1000);
  }
  state.counters["plain_ms"] = median(plain_ms);
  state.counters["cache_ms"] = median(cached_ms);
  state.counters["ratio"] = median(ratios);
}

/// The same for `cache` and the plain module.
void run_cache(benchmark::State& state, Fixture& fixture, Cache& cache, Ratio kind, const Prepare& prepare,
               const RequestOptions& options = {}) {
  run_pairs(
      state, kind, prepare, [&](const Inputs& in) { return fixture.model().plain(in); },
      [&](const Inputs& in) { return cache.forward(in, options); });
}

void miss(benchmark::State& state, Fixture& fixture) {
  fixture.cache().clear();
  run_cache(state, fixture, fixture.cache(), Ratio::kOverhead, [&] { return fixture.fresh({kTokens}); });
}

/// A whole pass of the program of torch.export, beside one of the TorchScript module.
void exported(benchmark::State& state, Fixture& fixture) {
  const ExportedProgram program = load_exported(fixture.program());
  run_pairs(
      state, Ratio::kOverhead, [&] { return fixture.fresh({kTokens}); },
      [&](const Inputs& in) { return fixture.model().plain(in); },
      [&](const Inputs& in) { return program.forward(in); });
}

/// The same wrapped; nothing is known.
void exported_miss(benchmark::State& state, Fixture& fixture) {
  fixture.cache().clear();
  run_pairs(
      state, Ratio::kOverhead, [&] { return fixture.fresh({kTokens}); },
      [&](const Inputs& in) { return fixture.cache().forward(in); },
      [&](const Inputs& in) { return fixture.program_cache()->forward(in); });
}

void pass(benchmark::State& state, Fixture& fixture) {
  fixture.cache().clear();
  run_cache(state, fixture, fixture.cache(), Ratio::kSpeedup, [&] { return fixture.fresh({state.range(0)}); });
}

void packed(benchmark::State& state, Fixture& fixture) {
  fixture.cache().clear();
  if (fixture.cache().profile().granularity == Granularity::kWholeLayers) {
    return state.SkipWithError("the model cannot be packed");
  }
  run_cache(state, fixture, fixture.cache(), Ratio::kSpeedup, [&] { return fixture.fresh({64, 17, 5, 33}); });
  state.counters["ideal"] = 4 * 64.0 / (64 + 17 + 5 + 33);
}

void last(benchmark::State& state, Fixture& fixture) {
  Cache& cache = fixture.cache();
  if (cache.profile().granularity != Granularity::kTokens) {
    return state.SkipWithError("the model cannot run on some of a sequence's tokens");
  }
  const Inputs inputs = fixture.fresh({kTokens});
  std::vector<std::shared_ptr<const SequenceState>> donors;
  Plan plan = cache.full_plan(inputs);
  cache.forward_plan(inputs, plan, {}, &donors);
  std::vector<std::int64_t> active;
  for (std::int64_t token = kTokens - state.range(0); token < kTokens; ++token) active.push_back(token);
  plan.sequences = {compute_some(0, 0, kTokens, plan.layers, active, 0)};
  run_pairs(
      state, Ratio::kSpeedup, [&] { return inputs; }, [&](const Inputs& in) { return fixture.model().plain(in); },
      [&](const Inputs& in) { return cache.forward_plan(in, plan, donors); });
}

void decode(benchmark::State& state, Fixture& fixture) {
  Cache& cache = fixture.cache();
  const RequestOptions last_token = {.output = Output::kLastToken};
  cache.clear();
  Inputs inputs = fixture.fresh({state.range(0)});
  cache.forward(inputs, last_token);
  const auto grow = [&] {
    const Inputs one = fixture.fresh({1});
    for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = at::cat({inputs[i].toTensor(), one[i].toTensor()}, 1);
    return inputs;
  };
  run_cache(state, fixture, cache, Ratio::kSpeedup, grow, last_token);
  const ForwardReport report = cache.last_report();
  if (report.sequences[0].reused_tokens + 1 != report.sequences[0].tokens) throw Failure("the context was not known");
  state.counters["embed_ms"] = report.embed_ms;
  state.counters["head_ms"] = report.head_ms;
  state.counters["lookup_ms"] = report.lookup_ms;
  state.counters["store_ms"] = report.store_ms;
}

/// "plain" is the same cache, called in turn.
void threads(benchmark::State& state, Fixture& fixture) {
  Cache& cache = fixture.cache();
  const auto prepare = [&] {
    cache.clear();
    return Inputs();
  };
  const auto run = [&](std::launch how) {
    return [&, how](const Inputs&) {
      std::vector<Inputs> requests(8);
      for (Inputs& request : requests) request = fixture.fresh({32});
      std::vector<std::future<void>> running;
      for (const Inputs& request : requests) {
        running.push_back(std::async(how, [&] { cache.forward(request); }));
      }
      for (std::future<void>& one : running) one.get();
      return c10::IValue();
    };
  };
  run_pairs(state, Ratio::kSpeedup, prepare, run(std::launch::deferred), run(std::launch::async));
}

void identical(benchmark::State& state, Fixture& fixture) {
  fixture.cache().clear();
  const Inputs inputs = fixture.fresh({kTokens});  // the warm-up makes it known
  run_cache(state, fixture, fixture.cache(), Ratio::kSpeedup, [&] { return inputs; });
}

/// Random ids are not similar to one another once their mean is taken off.
void threshold_miss(benchmark::State& state, Fixture& fixture) {
  Cache& cache = fixture.threshold_cache();
  const Stats before = cache.stats();
  run_cache(state, fixture, cache, Ratio::kOverhead, [&] { return fixture.fresh({kTokens}); });
  if (cache.stats().similar_hits != before.similar_hits) throw Failure("fresh ids were hits: this is no miss");
}

/// A request in which one token of a known one is changed, another one each time.
void threshold_hit(benchmark::State& state, Fixture& fixture) {
  Cache& cache = fixture.threshold_cache();
  const Inputs known = fixture.fresh({kTokens});
  cache.forward(known);
  const Stats before = cache.stats();
  std::int64_t changes = 0;
  run_cache(state, fixture, cache, Ratio::kSpeedup, [&] {
    Inputs inputs = known;
    const at::Tensor ids = known[0].toTensor().clone();
    ids[0][kTokens / 2] = kFirstId + ++changes;
    inputs[0] = ids;
    return inputs;
  });
  const Stats after = cache.stats();
  if (after.similar_hits - before.similar_hits != after.sequences - before.sequences) {
    throw Failure("some requests were no hits");
  }
}

// What counting costs a call: counting/totals/ROWS adds a report of so many rows of 12 layers to the totals,
// counting/evicted/TOKENS looks for what was evicted of a sequence all of whose tokens were, counting/nothing_evicted
// for one of which none was.

constexpr std::size_t kCountedLayers = 12;

void totals(benchmark::State& state) {
  SequenceReport sequence;
  sequence.tokens = 128;
  sequence.layers.assign(kCountedLayers, {128, 0});
  ForwardReport report;
  report.sequences.assign(static_cast<std::size_t>(state.range(0)), sequence);
  report.layer_ms.assign(kCountedLayers, 0.5);
  report.total_ms = 6;
  CallTotals totals;
  for (auto _ : state) totals.add(report);
}

/// Beside others, as many as are remembered.
void evicted(benchmark::State& state, bool known) {
  std::mt19937_64 random(1);
  constexpr std::size_t kRemembered = std::size_t{1} << 15;
  EvictedKeys keys(kRemembered);
  for (std::size_t i = 0; i < kRemembered; ++i) keys.add(random(), EvictedKeys::Cause::kRoom);
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(state.range(0)));
  for (auto& token : tokens) token = static_cast<std::int64_t>(random() % 50000);
  if (known) add_evicted_prefixes(keys, "tenant", tokens, 1, 0, EvictedKeys::Cause::kRoom);
  for (auto _ : state) benchmark::DoNotOptimize(count_evicted(keys, "tenant", tokens, 1, 0));
}

void add_counting_benchmarks() {
  benchmark::RegisterBenchmark("counting/totals", totals)->Arg(1)->Arg(8)->Arg(64);
  benchmark::RegisterBenchmark("counting/evicted", evicted, true)->Arg(32)->Arg(512)->Arg(4096);
  benchmark::RegisterBenchmark("counting/nothing_evicted", evicted, false)->Arg(512);
}

bool failed = false;  // a benchmark threw: the exit status says so

void add_all(const std::string& model, int pairs, std::int64_t max_tokens, Fixture& fixture) {
  const auto add = [&](const char* name, int iterations, void (*function)(benchmark::State&, Fixture&)) {
    const auto guarded = [&fixture, function](benchmark::State& state) {
      try {
        function(state, fixture);
      } catch (const std::exception& error) {
        failed = true;
        state.SkipWithError(one_line(error).c_str());
      }
    };
    return benchmark::RegisterBenchmark((model + "/" + name).c_str(), guarded)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond)
        ->Iterations(iterations);
  };
  add("miss", 4 * pairs, miss);
  if (fixture.program_cache() != nullptr) {
    add("exported", 4 * pairs, exported);
    add("exported_miss", 4 * pairs, exported_miss);
  }
  add("pass", pairs, pass)->Arg(16)->Arg(64)->Arg(128);
  add("packed", pairs, packed);
  add("last", pairs, last)->Arg(1)->Arg(8)->Arg(16)->Arg(32)->Arg(64);
  if (fixture.cache().profile().prefix_reuse) {
    auto* benchmark = add("decode", pairs, decode);
    for (const std::int64_t context : {128, 512, 1000}) {
      if (max_tokens == 0 || context + pairs + kWarmUp < max_tokens) benchmark->Arg(context);
    }
  }
  add("threads", pairs, threads);
  add("identical", pairs, identical);
  add("threshold_miss", 4 * pairs, threshold_miss);
  add("threshold_hit", pairs, threshold_hit);
}

int run(int argc, char** argv) {
  std::filesystem::path models = (program_folder() / "../models").lexically_normal();
  std::string model = "bert-base", weights = "as-loaded";
  int pairs = 15;
  CLI::App app("llmcache-microbench: what single things cost, against the plain module in the same loop");
  app.footer(
      "\nOptions of Google Benchmark, such as --benchmark_filter=REGEX, work too. benchmarks/README.md explains the "
      "benchmarks.");
  app.allow_extras();
  app.add_option("--models", models, "folder of the models [../models beside the program's]")
      ->envname("LLMCACHE_MODELS_DIR");
  app.add_option("--model", model, "which one, or none [bert-base]")->envname("LLMCACHE_MODEL");
  app.add_option("--weights", weights, "how the cache holds them; plain is as loaded")
      ->check(CLI::IsMember({"as-loaded", "packed-fp32", "packed-fp16", "packed-bf16", "packed-int8", "fastest"}));
  app.add_option("--pairs", pairs, "of each benchmark [15]; four times as many of misses")
      ->check(CLI::Range(1, 100000));
  CLI11_PARSE(app, argc, argv);
  std::vector<std::string> extras = app.remaining();
  std::vector<char*> others = {argv[0]};
  for (std::string& extra : extras) others.push_back(extra.data());
  auto count = static_cast<int>(others.size());
  benchmark::Initialize(&count, others.data());
  if (benchmark::ReportUnrecognizedArguments(count, others.data())) return 2;
  at::set_num_interop_threads(1);
  at::set_num_threads(1);
  std::optional<Fixture> fixture;
  if (model != "none") {
    const ModelFile file = read_model_file(models / (model + ".pt"));
    fixture.emplace(file, weights_from_string(weights));
    add_all(model, pairs, file.max_tokens, *fixture);
    benchmark::AddCustomContext("weights", file.random_weights() ? file.weights + ": random weights" : file.weights);
  }
  add_counting_benchmarks();
  benchmark::AddCustomContext("model", model);
  benchmark::AddCustomContext("held_weights", weights);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return failed ? 2 : 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  try {
    return llmcache::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fputs(fmt::format("llmcache-microbench: error: {}\n", llmcache::bench::one_line(error)).c_str(), stderr);
    return 2;
  }
}
