// What a look-up in a FingerprintIndex and an insertion into it cost, by kind and size: index/KIND/SHAPE/ENTRIES/WHAT.
//
// SHAPE says where the fingerprints come from:
//   even    SimHash, every bit by itself: the case that hash tables like best
//   states  SimHash of states with 48 directions of falling variance, as centred mean states of text have them
//   groups  raw vectors of 384 values in groups of 20 with a cosine of about 0.9 inside a group
// WHAT: build inserts ENTRIES fingerprints one by one (counters: insert_us, the mean; worst_ms, the slowest, when
// tables are made); hit/TAU asks for fingerprints of which one at least as similar as TAU (in hundredths) is there,
// miss/TAU for new ones (counters: p50_us, p95_us, found, and for raw recall: the share of best matches found, against
// a scan).
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "clock.h"
#include "llmcache/match/fingerprint_index.h"
#include "microbench.h"
#include "statistics.h"

namespace llmcache::bench {
namespace {

constexpr int kQueries = 1000;

struct Case {
  FingerprintKind kind;
  std::string shape;
  std::uint32_t entries;

  bool operator==(const Case&) const = default;
};

/// Thing number `id`, with noise from `engine`: of the 20 of a group the centre is the same.
Fingerprint make(const Case& what, std::uint64_t id, std::mt19937_64& engine) {
  static const SimHash simhash128(128, 48, 0), simhash256(256, 48, 0);
  Fingerprint result;
  if (what.shape == "even") {
    result.bits.resize(static_cast<std::size_t>(simhash_bits(what.kind)) / 64);
    for (auto& word : result.bits) word = engine();
  } else if (what.shape == "states") {
    std::normal_distribution<float> normal;
    std::vector<float> state(48);
    for (std::size_t i = 0; i < state.size(); ++i) {
      state[i] = normal(engine) / std::sqrt(1 + 0.1F * static_cast<float>(i));
    }
    result.bits = (what.kind == FingerprintKind::kSimHash128 ? simhash128 : simhash256)(state);
  } else {
    // Uniform numbers: quick to make, and in 384 dimensions a sum of them is as good as normal.
    std::mt19937_64 centre(~(id / 20));
    const auto uniform = [](std::mt19937_64& numbers) { return static_cast<float>(numbers() >> 40) * 0x1p-23F - 1; };
    auto& values = result.vector;
    values.resize(384);
    for (float& value : values) value = uniform(centre) + uniform(engine) / 3;
    const float length = std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0F));
    for (float& value : values) value /= length;
  }
  return result;
}

/// An entry follows from its number alone, so that no list is kept.
Fingerprint entry(const Case& what, std::uint64_t id) {
  std::mt19937_64 engine(id + 1);
  return make(what, id, engine);
}

/// Near to an entry (the similarity is tau or more), or new.
Fingerprint query(const Case& what, std::mt19937_64& engine, bool hit, double tau) {
  const std::uint64_t id = engine() % what.entries;
  if (what.kind == FingerprintKind::kRaw) return make(what, hit ? id : id + 100 * std::uint64_t{what.entries}, engine);
  Fingerprint result = entry(what, hit ? id : engine() | (std::uint64_t{1} << 40));
  const auto bits = static_cast<std::uint64_t>(simhash_bits(what.kind));
  const auto radius = static_cast<std::uint64_t>(simhash_radius(tau, static_cast<int>(bits)));
  for (std::uint64_t flips = hit ? engine() % (radius + 1) : 0; flips > 0; --flips) {
    const std::uint64_t bit = engine() % bits;
    result.bits[bit / 64] ^= std::uint64_t{1} << (bit % 64);
  }
  return result;
}

struct Filled {
  Case what;
  FingerprintIndex index;
  std::vector<double> insert_ms;
};

/// The index of a case; the one before it is dropped, for it may be large.
const Filled& filled(const Case& what) {
  static std::unique_ptr<Filled> last;
  if (last && last->what == what) return *last;
  last.reset();
  last = std::make_unique<Filled>(Filled{what, FingerprintIndex(what.kind), {}});
  for (std::uint32_t id = 0; id < what.entries; ++id) {
    const Fingerprint fingerprint = entry(what, id);
    const auto start = Clock::now();
    last->index.insert(id, fingerprint);
    last->insert_ms.push_back(ms_since(start));
  }
  return *last;
}

void build(benchmark::State& state, const Case& what) {
  for ([[maybe_unused]] auto _ : state) {
    const Summary times = summarize(filled(what).insert_ms);
    state.SetIterationTime(times.mean * what.entries / 1000);
    state.counters["insert_us"] = 1000 * times.mean;
    state.counters["worst_ms"] = times.max;
  }
}

/// Share of the best matches that a scan of all entries finds, too.
double recall(const Filled& in, const std::vector<Fingerprint>& queries) {
  int same = 0;
  for (const Fingerprint& query : queries) {
    double most = -1;
    for (std::uint32_t id = 0; id < in.what.entries; ++id) {
      most = std::max(most, similarity(in.what.kind, query, entry(in.what, id)));
    }
    const auto match = in.index.best(query, -1);
    same += match && match->similarity == most ? 1 : 0;
  }
  return static_cast<double>(same) / static_cast<double>(queries.size());
}

void look_up(benchmark::State& state, const Case& what, bool hit, double tau) {
  constexpr std::size_t kRecallQueries = 50;
  const Filled& in = filled(what);
  std::mt19937_64 engine(12);
  std::vector<Fingerprint> queries;
  for (int i = 0; i < kQueries; ++i) queries.push_back(query(what, engine, hit, tau));
  std::vector<double> times;
  double found = 0;
  for ([[maybe_unused]] auto _ : state) {
    const Fingerprint& one = queries[times.size() % queries.size()];
    const auto start = Clock::now();
    const auto match = in.index.best(one, tau);
    times.push_back(ms_since(start));
    found += match ? 1 : 0;
    state.SetIterationTime(times.back() / 1000);
  }
  state.counters["p50_us"] = 1000 * percentile(times, 50);
  state.counters["p95_us"] = 1000 * percentile(times, 95);
  state.counters["found"] = found / static_cast<double>(times.size());
  if (what.kind != FingerprintKind::kRaw || !hit) return;
  queries.resize(kRecallQueries);
  state.counters["recall"] = recall(in, queries);
}

void add(const Case& what) {
  const std::string prefix = fmt::format("index/{}/{}/{}/", to_string(what.kind), what.shape, what.entries);
  const auto add_one = [&](const std::string& name, int iterations, const auto& run) {
    benchmark::RegisterBenchmark((prefix + name).c_str(), run)
        ->Iterations(iterations)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  };
  add_one("build", 1, [what](benchmark::State& state) { build(state, what); });
  for (const int tau : {85, 90, 95}) {
    if (what.kind == FingerprintKind::kRaw && tau != 85) continue;
    for (const bool hit : {true, false}) {
      add_one(fmt::format("{}/{}", hit ? "hit" : "miss", tau), kQueries,
              [=](benchmark::State& state) { look_up(state, what, hit, tau / 100.0); });
    }
  }
}

}  // namespace

void add_index_benchmarks() {
  for (const std::uint32_t entries : {10'000U, 100'000U, 1'000'000U}) {
    for (const char* shape : {"even", "states"}) {
      add({FingerprintKind::kSimHash128, shape, entries});
      add({FingerprintKind::kSimHash256, shape, entries});
    }
    if (entries < 1'000'000U) add({FingerprintKind::kRaw, "groups", entries});
  }
}

}  // namespace llmcache::bench
