// llmcache-index-bench: what a look-up in a FingerprintIndex and an insertion into it cost, by kind and size.
//
// Names: index/KIND/SHAPE/ENTRIES/WHAT. KIND: simhash128, simhash256, raw (384 values). SHAPE says where the
// fingerprints come from:
//   even    every bit by itself: the case that hash tables like best
//   states  of states with 48 directions of falling variance, as centred mean states of text have them
//   groups  raw vectors in groups of 20 with a cosine of about 0.9 inside a group
// WHAT: build inserts ENTRIES fingerprints one by one; hit/TAU asks for fingerprints of which one at
// least as similar as TAU (in hundredths) is there, miss/TAU for new ones.
// Counters of a look-up: p50_us, p95_us, found (share of the queries that found one), recall (raw: share of the best
// matches that were found, against a scan, 50 queries). Counters of build: insert_us (mean), worst_ms (slowest
// single insertion: when tables are made), bytes (held per entry).
// Options of Google Benchmark work: --benchmark_filter=simhash128/even/100000 for one. raw/groups/1000000 takes
// 2 GB and some minutes, so it is left out unless LLMCACHE_INDEX_BENCH_ALL is set.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <memory_resource>
#include <new>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "guarded_main.h"
#include "llmcache/match/fingerprint_index.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kQueries = 1000;
constexpr int kRecallQueries = 50;
constexpr std::size_t kRawDims = 384;
constexpr std::size_t kDirections = 48;
constexpr std::size_t kGroup = 20;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

double quantile(std::vector<double> values, double share) {
  const auto at = static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<std::size_t>(at)];
}

class CountedMemory final : public std::pmr::memory_resource {
 public:
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    void* pointer = ::operator new (bytes, std::align_val_t{alignment});
    used_ += bytes;
    return pointer;
  }
  void do_deallocate(void* pointer, std::size_t bytes, std::size_t alignment) override {
    used_ -= bytes;
    ::operator delete (pointer, bytes, std::align_val_t{alignment});
  }
  [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  std::size_t used_ = 0;
};

struct Case {
  FingerprintKind kind;
  std::string shape;
  std::uint32_t entries;

  bool operator==(const Case&) const = default;
  [[nodiscard]] std::string name() const {
    return std::string("index/") + to_string(kind) + "/" + shape + "/" + std::to_string(entries) + "/";
  }
};

/// A filled index and how its fingerprints were made. Entry number i follows from i alone, so that no list is kept.
class Filled {
 public:
  explicit Filled(Case what) : what_(std::move(what)) {
    if (what_.shape == "states") simhash_.emplace(simhash_bits(what_.kind), kDirections, 0);
    double sum = 0;
    for (std::uint32_t id = 0; id < what_.entries; ++id) {
      const Fingerprint fingerprint = entry(id);
      const auto start = Clock::now();
      index_.insert(id, fingerprint);
      const double us = us_since(start);
      sum += us;
      worst_us_ = std::max(worst_us_, us);
    }
    mean_us_ = sum / what_.entries;
  }

  /// What entry `id` is made of, and an entry's fingerprint.
  [[nodiscard]] Fingerprint entry(std::uint64_t id) const {
    std::mt19937_64 engine(id + 1);
    if (what_.shape == "even") {
      Fingerprint result;
      result.bits.resize(static_cast<std::size_t>(simhash_bits(what_.kind)) / 64);
      for (auto& word : result.bits) word = engine();
      return result;
    }
    return what_.shape == "states" ? of_state(state(engine)) : of_group(id, engine);
  }
  /// A fingerprint near to that of an entry (the similarity is tau or more), or of a new thing.
  [[nodiscard]] Fingerprint query(std::mt19937_64& engine, bool hit, double tau) const {
    const std::uint64_t id = engine() % what_.entries;
    if (what_.kind == FingerprintKind::kRaw)
      return of_group(hit ? id : id + 100 * std::uint64_t{what_.entries}, engine);
    if (!hit) return entry(engine() | (std::uint64_t{1} << 40));
    Fingerprint result = entry(id);
    const auto bits = static_cast<std::uint64_t>(simhash_bits(what_.kind));
    const auto radius = static_cast<std::uint64_t>(simhash_radius(tau, static_cast<int>(bits)));
    for (std::uint64_t flips = engine() % (radius + 1); flips > 0; --flips) {
      const std::uint64_t bit = engine() % bits;
      result.bits[bit / 64] ^= std::uint64_t{1} << (bit % 64);
    }
    return result;
  }
  /// The highest similarity of all, by a plain scan.
  [[nodiscard]] double nearest(const Fingerprint& query) const {
    double most = -1;
    for (std::uint32_t id = 0; id < what_.entries; ++id) {
      most = std::max(most, similarity(what_.kind, query, entry(id)));
    }
    return most;
  }

  [[nodiscard]] const Case& what() const { return what_; }
  [[nodiscard]] const FingerprintIndex& index() const { return index_; }
  [[nodiscard]] double mean_us() const { return mean_us_; }
  [[nodiscard]] double worst_us() const { return worst_us_; }
  [[nodiscard]] double bytes() const { return static_cast<double>(memory_.used()) / what_.entries; }

 private:
  static std::vector<float> state(std::mt19937_64& engine) {
    std::normal_distribution<float> normal;
    std::vector<float> values(kDirections);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = normal(engine) / std::sqrt(1 + 0.1F * static_cast<float>(i));
    }
    return values;
  }
  [[nodiscard]] Fingerprint of_state(const std::vector<float>& values) const {
    Fingerprint result;
    result.bits = (*simhash_)(values);
    return result;
  }
  /// Member of the group of entry `id`: the group's centre and a third of noise.
  static Fingerprint of_group(std::uint64_t id, std::mt19937_64& engine) {
    Fingerprint result;
    result.vector.resize(kRawDims);
    // Uniform numbers: quick to make, and in 384 dimensions a sum of them is as good as normal.
    std::mt19937_64 centre(~(id / kGroup));
    const auto uniform = [](std::mt19937_64& numbers) { return static_cast<float>(numbers() >> 40) * 0x1p-23F - 1; };
    for (float& value : result.vector) value = uniform(centre) + uniform(engine) / 3;
    const auto& values = result.vector;
    const float length = std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0F));
    for (float& value : result.vector) value /= length;
    return result;
  }

  Case what_;
  CountedMemory memory_;
  std::optional<SimHash> simhash_;
  FingerprintIndex index_{what_.kind, &memory_};
  double mean_us_ = 0;
  double worst_us_ = 0;
};

/// The index of a case; the one before it is dropped, for it may be large.
const Filled& filled(const Case& what) {
  static std::unique_ptr<Filled> last;
  if (!last || !(last->what() == what)) {
    last.reset();
    last = std::make_unique<Filled>(what);
  }
  return *last;
}

void build(benchmark::State& state, const Case& what) {
  for ([[maybe_unused]] auto _ : state) {
    const Filled& index = filled(what);
    state.SetIterationTime(index.mean_us() * what.entries * 1e-6);
    state.counters["insert_us"] = index.mean_us();
    state.counters["worst_ms"] = index.worst_us() / 1000;
    state.counters["bytes"] = index.bytes();
  }
}

void look_up(benchmark::State& state, const Case& what, bool hit, double tau) {
  const Filled& index = filled(what);
  std::mt19937_64 engine(12);
  std::vector<Fingerprint> queries;
  for (int i = 0; i < kQueries; ++i) queries.push_back(index.query(engine, hit, tau));
  std::vector<double> times;
  std::size_t found = 0;
  for ([[maybe_unused]] auto _ : state) {
    const Fingerprint& query = queries[times.size() % queries.size()];
    const auto start = Clock::now();
    const auto match = index.index().best(query, tau);
    times.push_back(us_since(start));
    benchmark::DoNotOptimize(match);
    found += match ? 1 : 0;
    state.SetIterationTime(times.back() * 1e-6);
  }
  state.counters["p50_us"] = quantile(times, 0.5);
  state.counters["p95_us"] = quantile(times, 0.95);
  state.counters["found"] = static_cast<double>(found) / static_cast<double>(times.size());
  if (what.kind == FingerprintKind::kRaw && hit) {
    int same = 0;
    for (int i = 0; i < kRecallQueries; ++i) {
      const auto& query = queries[static_cast<std::size_t>(i)];
      const auto match = index.index().best(query, -1);
      same += match && match->similarity == index.nearest(query) ? 1 : 0;
    }
    state.counters["recall"] = static_cast<double>(same) / kRecallQueries;
  }
}

void add(const Case& what) {
  const auto added = [&](const std::string& name, const std::function<void(benchmark::State&)>& run, int iterations) {
    benchmark::RegisterBenchmark((what.name() + name).c_str(), run)
        ->Iterations(iterations)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  };
  added(
      "build", [what](benchmark::State& state) { build(state, what); }, 1);
  for (const int tau : {85, 90, 95}) {
    if (what.kind == FingerprintKind::kRaw && tau != 85) continue;
    for (const bool hit : {true, false}) {
      added((hit ? "hit/" : "miss/") + std::to_string(tau),
            [=](benchmark::State& state) { look_up(state, what, hit, tau / 100.0); }, kQueries);
    }
  }
}

int run(int argc, char** argv) {
  const bool all = std::getenv("LLMCACHE_INDEX_BENCH_ALL") != nullptr;
  for (const auto kind : {FingerprintKind::kSimHash128, FingerprintKind::kSimHash256}) {
    for (const char* shape : {"even", "states"}) {
      for (const std::uint32_t entries : {10'000U, 100'000U, 1'000'000U}) add({kind, shape, entries});
    }
  }
  for (const std::uint32_t entries : {10'000U, 100'000U, 1'000'000U}) {
    if (entries < 1'000'000U || all) add({FingerprintKind::kRaw, "groups", entries});
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
  return llmcache::bench::guarded_main("llmcache-index-bench", argc, argv, llmcache::bench::run);
}
