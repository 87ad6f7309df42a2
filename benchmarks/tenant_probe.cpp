// llmcache-tenant-probe: can a tenant tell by time which texts another one has asked for? Prints the area under the ROC
// curve (AUC) of telling known texts from unknown ones by the time of one request: for one's own texts, where it should
// be near 1, and for another tenant's, where 0.5 is what guessing gives.
#include <fmt/format.h>
#include <llmcache/llmcache.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "command_line.h"
#include "machine.h"

namespace {

/// Milliseconds of requests.
struct Times {
  std::vector<double> known, unknown;
};

class Probe {
 public:
  Probe(llmcache::TorchScriptCache& cache, std::size_t tokens, std::uint64_t seed)
      : cache_(cache), tokens_(tokens), random_(seed) {}

  void one(Times& own, Times& others) {
    const auto theirs = text();
    const auto mine = text();
    time("victim", theirs);
    time("stranger", mine);
    std::vector<std::function<void()>> order = {[&] { others.known.push_back(time("stranger", theirs)); },
                                                [&] { others.unknown.push_back(time("stranger", text())); },
                                                [&] { own.known.push_back(time("stranger", mine)); },
                                                [&] { own.unknown.push_back(time("stranger", text())); }};
    std::ranges::shuffle(order, random_);
    for (const auto& ask : order) ask();
  }

 private:
  std::vector<std::int64_t> text() {
    std::vector<std::int64_t> ids(tokens_);
    for (std::int64_t& id : ids) id = static_cast<std::int64_t>(random_() % 256);
    return ids;
  }

  double time(const std::string& tenant, const std::vector<std::int64_t>& ids) {
    const auto inputs = llmcache::pad({ids}).inputs(cache_.profile());
    const auto begin = llmcache::bench::Clock::now();
    cache_.forward(inputs, {.output = llmcache::Output::kLastToken, .tenant = tenant});
    return llmcache::bench::ms_since(begin);
  }

  llmcache::TorchScriptCache& cache_;
  const std::size_t tokens_;
  std::mt19937_64 random_;
};

/// The area: how often a known text is the faster one of a pair, ties counting half. Its standard error is that of
/// Hanley and McNeil (Radiology 143, 1982).
void print(const char* what, const Times& times) {
  const auto n = static_cast<double>(times.known.size());
  double area = 0;
  for (const double known : times.known) {
    for (const double unknown : times.unknown) area += known < unknown ? 1 : known == unknown ? 0.5 : 0;
  }
  area /= n * n;
  const double both = area * area;
  const double variance = area - both + (n - 1) * (area / (2 - area) + 2 * both / (1 + area) - 2 * both);
  fmt::print("{}: AUC {:.6g} +- {:.6g} of {} known and as many unknown texts\n", what, area, std::sqrt(variance) / n,
             times.known.size());
}

int run(int argc, char** argv) {
  CLI::App app("Tells by time which texts a tenant has asked for: its own, and another tenant's.",
               "llmcache-tenant-probe");
  std::string model;
  int probes = 500;
  std::size_t tokens = 32;
  std::uint64_t seed = 1;
  app.add_option("--model", model, "TorchScript file of a causal model")->required();
  app.add_option("--probes", probes, "texts of each kind");
  app.add_option("--tokens", tokens, "of each text");
  app.add_option("--seed", seed, "of the texts and of their order");
  llmcache::bench::parse(app, argc, argv);
  llmcache::TorchScriptCache cache = llmcache::load(model, {.verify_rate = 0});
  Probe probe(cache, tokens, seed);
  Times own, others;
  for (int i = 0; i < 20; ++i) probe.one(own, others);  // to warm up
  own = others = {};
  for (int i = 0; i < probes; ++i) probe.one(own, others);
  print("one's own texts", own);
  print("another tenant's", others);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return llmcache::bench::run_program("llmcache-tenant-probe", [&] { return run(argc, argv); });
}
