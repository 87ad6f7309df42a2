// llmcache-microbench: what single things cost, each against the plain module in the same loop.
//
// Every benchmark runs pairs: the plain module and the cache, in an order that alternates from pair
// to pair. The reported time is the cache's; the counters are medians over the pairs.
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "arguments.h"
#include "failure.h"
#include "loaded_model.h"
#include "model_files.h"
#include "statistics.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kTokens = 128;
constexpr int kWarmUp = 3;
constexpr const char* kUsage =
    R"(llmcache-microbench: what single things cost, against the plain module in the same loop

  --models DIR   folder of the models [$LLMCACHE_MODELS_DIR, or ../models beside the program's folder]
  --model NAME   which model [$LLMCACHE_MODEL, or bert-base]
  --weights KIND how the cache holds weights: as-loaded, packed-fp32, packed-fp16 [as-loaded]; plain is as loaded
  --pairs N      pairs of plain and cached runs of each benchmark [15]; miss runs four times as many

miss          128 fresh tokens, bank on: ratio = time of cache / time of plain (the overhead of a miss)
packed        64/17/5/33 fresh tokens: ratio = plain, padded / packed; ideal = padded tokens / real tokens
last/A        the last A of 128 tokens recomputed from a captured donor: ratio = plain, all 128 / cache
decode/N      causal models: one token behind N known ones, last logits only: ratio = plain, all N + 1 / cache
threads       eight requests of 32 fresh tokens, one after the other / each in a thread of its own (operators use one
              thread each): ratio = time in turn / time at once
identical     128 tokens that are known: ratio = plain / cache
threshold_miss 128 fresh tokens, fidelity threshold, nothing similar: ratio = time of cache / time of plain (the
              overhead of fingerprint, look-up and insertion)
threshold_hit 128 tokens, fidelity threshold, another request is similar: ratio = plain / cache

Options of Google Benchmark, which follow, work too; times are milliseconds, one thread. Its warning that the library
was built as DEBUG is about Debian's package of Google Benchmark, which only runs the loop: the clock is our own.

)";

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

bool failed = false;  // a benchmark threw: the exit status says so

void fail(benchmark::State& state, const std::exception& error) {
  failed = true;
  state.SkipWithError(one_line(error).c_str());
}

/// The model under test, and ids for it that were never used before.
class Bed {
 public:
  Bed(const ModelFile& file, Weights weights) : model_(file), weights_(weights), vocabulary_(file.vocabulary) {
    if (vocabulary_ <= kFirstId) throw Failure(fmt::format("model {}: its sidecar gives no vocabulary", file.name));
    Options options;
    options.weights = weights_;
    options.capacity_bytes = kCapacity;
    model_.wrap(options);
  }

  LoadedModel& model() { return model_; }

  /// Around the same module; made when first asked for. Default fingerprint, of the embedding output.
  Cache& threshold_cache() {
    if (!threshold_cache_) {
      Options options;
      options.fidelity = Fidelity::kThreshold;
      options.weights = weights_;
      options.threshold.tau = kTau;
      threshold_cache_ = model_.make_cache(options);
    }
    return *threshold_cache_;
  }

  /// Enough requests for the running mean state to be there: it is taken over at 16 and 32 states.
  void settle(Cache& cache, const std::vector<std::int64_t>& lengths) {
    for (int i = 0; i < kSettle; ++i) cache.forward(fresh(lengths));
  }

  Inputs fresh(const std::vector<std::int64_t>& lengths) {
    std::vector<std::vector<std::int32_t>> ids;
    for (const std::int64_t length : lengths) {
      auto& row = ids.emplace_back(static_cast<std::size_t>(length));
      for (std::int32_t& id : row) {
        id = static_cast<std::int32_t>(
            kFirstId + static_cast<std::int64_t>(generator_() % static_cast<std::uint64_t>(vocabulary_ - kFirstId)));
      }
    }
    return model_.inputs(Rows(ids.begin(), ids.end()));
  }

 private:
  static constexpr std::int64_t kFirstId = 10;  // leaves special tokens out
  static constexpr double kTau = 0.9;
  static constexpr int kSettle = 40;
  static constexpr std::size_t kCapacity = std::size_t{1} << 30;
  LoadedModel model_;
  const Weights weights_;
  std::shared_ptr<Cache> threshold_cache_;
  std::int64_t vocabulary_;
  std::mt19937_64 generator_{0};
};

/// Runs both functions as pairs for the iterations of `state`. Each is called with the inputs that
/// `prepare`, which is not timed, makes for the pair.
template <class Prepare, class Plain, class Cached>
void run_pairs(benchmark::State& state, const Prepare& prepare, const Plain& plain, const Cached& cached,
               bool overhead) {
  std::vector<double> plain_ms;
  std::vector<double> cached_ms;
  std::vector<double> ratios;
  const auto timed = [](const auto& function, const Inputs& inputs) {
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
  try {
    for (int i = 0; i < kWarmUp; ++i) pair(i % 2 == 0);
    for (auto _ : state) {
      const auto [p, c] = pair(ratios.size() % 2 == 0);
      plain_ms.push_back(p);
      cached_ms.push_back(c);
      ratios.push_back(overhead ? c / p : p / c);
      state.SetIterationTime(c / 1000);
    }
  } catch (const std::exception& error) {
    fail(state, error);
    return;
  }
  state.counters["plain_ms"] = median(plain_ms);
  state.counters["cache_ms"] = median(cached_ms);
  state.counters["ratio"] = median(ratios);
}

void miss(benchmark::State& state, Bed& bed) {
  LoadedModel& model = bed.model();
  model.cache().clear();
  run_pairs(
      state, [&] { return bed.fresh({kTokens}); }, [&](const Inputs& in) { return model.plain(in); },
      [&](const Inputs& in) { return model.cache().forward(in); }, /*overhead=*/true);
}

void packed(benchmark::State& state, Bed& bed) {
  LoadedModel& model = bed.model();
  model.cache().clear();
  const std::vector<std::int64_t> lengths = {64, 17, 5, 33};
  if (model.cache().profile().granularity == Granularity::kWholeLayers) {
    state.SkipWithError("the model cannot be packed");
    return;
  }
  run_pairs(
      state, [&] { return bed.fresh(lengths); }, [&](const Inputs& in) { return model.plain(in); },
      [&](const Inputs& in) { return model.cache().forward(in); }, /*overhead=*/false);
  state.counters["ideal"] = 4 * 64.0 / (64 + 17 + 5 + 33);
}

void last(benchmark::State& state, Bed& bed) {
  LoadedModel& model = bed.model();
  Cache& cache = model.cache();
  if (cache.profile().granularity != Granularity::kTokens) {
    state.SkipWithError("the model cannot run on some of a sequence's tokens");
    return;
  }
  try {
    const Inputs inputs = bed.fresh({kTokens});
    std::vector<std::shared_ptr<const SequenceState>> donors;
    const Plan full = cache.full_plan(inputs);
    cache.forward_plan(inputs, full, {}, &donors);
    std::vector<std::int64_t> active;
    for (std::int64_t token = kTokens - state.range(0); token < kTokens; ++token) active.push_back(token);
    Plan partial = full;
    partial.sequences = {compute_some(0, 0, kTokens, full.layers, active, 0)};
    run_pairs(
        state, [&] { return inputs; }, [&](const Inputs& in) { return model.plain(in); },
        [&](const Inputs& in) { return cache.forward_plan(in, partial, donors); }, /*overhead=*/false);
  } catch (const std::exception& error) {
    fail(state, error);
  }
}

void decode(benchmark::State& state, Bed& bed) {
  LoadedModel& model = bed.model();
  Cache& cache = model.cache();
  if (!cache.profile().prefix_reuse) {
    state.SkipWithError("the model has no prefix reuse");
    return;
  }
  try {
    cache.clear();
    Inputs inputs = bed.fresh({state.range(0)});
    cache.forward(inputs, {.output = Output::kLastToken});
    const auto grow = [&] {
      const Inputs one = bed.fresh({1});
      for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i] = at::cat({inputs[i].toTensor(), one[i].toTensor()}, 1);
      return inputs;
    };
    run_pairs(
        state, grow, [&](const Inputs& in) { return model.plain(in); },
        [&](const Inputs& in) { return cache.forward(in, {.output = Output::kLastToken}); }, /*overhead=*/false);
    const ForwardReport report = cache.last_report();
    if (report.sequences[0].reused_tokens + 1 != report.sequences[0].tokens) throw Failure("the context was not known");
    state.counters["embed_ms"] = report.embed_ms;
    state.counters["head_ms"] = report.head_ms;
    state.counters["lookup_ms"] = report.lookup_ms;
    state.counters["store_ms"] = report.store_ms;
  } catch (const std::exception& error) {
    fail(state, error);
  }
}

/// "plain" is the same cache, called in turn.
void threads(benchmark::State& state, Bed& bed) {
  Cache& cache = bed.model().cache();
  constexpr std::size_t kRequests = 8;
  std::vector<Inputs> requests(kRequests);
  const auto prepare = [&] {
    cache.clear();
    return bed.fresh({1});
  };
  const auto fill = [&] {
    for (Inputs& request : requests) request = bed.fresh({32});
  };
  run_pairs(
      state, prepare,
      [&](const Inputs&) {
        fill();
        for (const Inputs& request : requests) cache.forward(request);
        return c10::IValue();
      },
      [&](const Inputs&) {
        fill();
        std::vector<std::future<void>> running;
        for (const Inputs& request : requests) {
          running.push_back(std::async(std::launch::async, [&] { cache.forward(request); }));
        }
        for (std::future<void>& one : running) one.get();
        return c10::IValue();
      },
      /*overhead=*/false);
}

void identical(benchmark::State& state, Bed& bed) {
  LoadedModel& model = bed.model();
  model.cache().clear();
  const Inputs inputs = bed.fresh({kTokens});  // the warm-up makes it known
  run_pairs(
      state, [&] { return inputs; }, [&](const Inputs& in) { return model.plain(in); },
      [&](const Inputs& in) { return model.cache().forward(in); }, /*overhead=*/false);
}

/// Random ids are not similar to one another once their mean is taken off.
void threshold_miss(benchmark::State& state, Bed& bed) {
  try {
    Cache& cache = bed.threshold_cache();
    cache.clear();
    bed.settle(cache, {kTokens});
    const Stats before = cache.stats();
    run_pairs(
        state, [&] { return bed.fresh({kTokens}); }, [&](const Inputs& in) { return bed.model().plain(in); },
        [&](const Inputs& in) { return cache.forward(in); }, /*overhead=*/true);
    if (cache.stats().similar_hits != before.similar_hits) throw Failure("fresh ids were hits: this is no miss");
  } catch (const std::exception& error) {
    fail(state, error);
  }
}

/// A request in which one token of a known one is changed, another one each time.
void threshold_hit(benchmark::State& state, Bed& bed) {
  try {
    Cache& cache = bed.threshold_cache();
    cache.clear();
    bed.settle(cache, {kTokens});
    const Inputs known = bed.fresh({kTokens});
    cache.forward(known);
    const Stats before = cache.stats();
    std::int64_t changes = 0;
    const auto similar = [&] {
      Inputs inputs = known;
      const at::Tensor ids = known[0].toTensor().clone();
      ids[0][kTokens / 2] = 10 + ++changes;  // 10: behind the special tokens
      inputs[0] = ids;
      return inputs;
    };
    run_pairs(
        state, similar, [&](const Inputs& in) { return bed.model().plain(in); },
        [&](const Inputs& in) { return cache.forward(in); }, /*overhead=*/false);
    const Stats after = cache.stats();
    if (after.similar_hits - before.similar_hits != after.sequences - before.sequences) {
      throw Failure("some requests were no hits");
    }
  } catch (const std::exception& error) {
    fail(state, error);
  }
}

/// Our own options, taken out of argv.
struct Settings {
  std::filesystem::path models = (program_folder() / ".." / "models").lexically_normal();
  std::string model = "bert-base";
  Weights weights = Weights::kAsLoaded;
  int pairs = 15;
};

Settings take_settings(int& argc, char** argv) {
  Settings settings;
  if (const char* models = std::getenv("LLMCACHE_MODELS_DIR")) settings.models = models;
  if (const char* model = std::getenv("LLMCACHE_MODEL")) settings.model = model;
  const auto value = [&](int& i, const std::string& name) -> const char* {
    const std::string argument = argv[i];
    if (argument.starts_with(name + "=")) return argv[i] + name.size() + 1;
    if (argument != name) return nullptr;
    if (i + 1 >= argc) throw Failure(fmt::format("{} needs a value; see --help", name));
    return argv[++i];
  };
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (const char* models = value(i, "--models")) {
      settings.models = models;
    } else if (const char* model = value(i, "--model")) {
      settings.model = model;
    } else if (const char* weights = value(i, "--weights")) {
      settings.weights = weights_from_string(weights);
    } else if (const char* pairs = value(i, "--pairs")) {
      char* end = nullptr;
      const long number = std::strtol(pairs, &end, 10);
      if (end == pairs || *end != '\0' || number < 1 || number > 100000) {
        throw Failure(fmt::format("--pairs {}: expected a number from 1 to 100000", pairs));
      }
      settings.pairs = static_cast<int>(number);
    } else {
      if (std::strcmp(argv[i], "--help") == 0) std::fputs(kUsage, stdout);
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  return settings;
}

int run(int argc, char** argv) {
  const Settings settings = take_settings(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  at::set_num_interop_threads(1);
  at::set_num_threads(1);
  const ModelFile file = read_model_file(settings.models / (settings.model + ".pt"));
  Bed bed(file, settings.weights);
  const auto add = [&](const char* name, void (*function)(benchmark::State&, Bed&)) {
    return benchmark::RegisterBenchmark((settings.model + "/" + name).c_str(),
                                        [&bed, function](benchmark::State& state) { function(state, bed); })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond)
        ->Iterations(settings.pairs);
  };
  add("miss", miss)->Iterations(4 * settings.pairs);
  add("packed", packed);
  add("last", last)->Arg(1)->Arg(8)->Arg(16)->Arg(32)->Arg(64);
  if (bed.model().cache().profile().prefix_reuse) {
    auto* benchmark = add("decode", decode);
    for (const std::int64_t context : {128, 512, 1000}) {
      if (file.max_tokens == 0 || context + settings.pairs + kWarmUp < file.max_tokens) benchmark->Arg(context);
    }
  }
  add("threads", threads);
  add("identical", identical);
  add("threshold_miss", threshold_miss)->Iterations(4 * settings.pairs);
  add("threshold_hit", threshold_hit);
  benchmark::AddCustomContext("model", settings.model);
  benchmark::AddCustomContext("weights", file.random_weights() ? file.weights + ": random weights" : file.weights);
  benchmark::AddCustomContext("held_weights", to_string(settings.weights));
  benchmark::AddCustomContext("torch_threads", "1");
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
