// llmcache-tenant-probe: can a tenant tell by time which texts another one has asked for? Prints the area under the ROC
// curve (AUC) of telling known texts from unknown ones by the time of one request: for one's own texts, where it should
// be near 1, and for another tenant's, where 0.5 is what guessing gives.
#include <llmcache/llmcache.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <vector>

namespace {

/// Milliseconds of requests.
struct Times {
  std::vector<double> known;
  std::vector<double> unknown;
};

/// How often a known text is the faster one of a pair, ties counting half.
double area_under_curve(const Times& times) {
  double sum = 0;
  for (const double known : times.known) {
    for (const double unknown : times.unknown) sum += known < unknown ? 1 : known == unknown ? 0.5 : 0;
  }
  return sum / static_cast<double>(times.known.size() * times.unknown.size());
}

/// Its standard error (Hanley and McNeil, Radiology 143, 1982).
double standard_error(double area, std::size_t count) {
  const double n = static_cast<double>(count);
  const double q1 = area / (2 - area);
  const double q2 = 2 * area * area / (1 + area);
  return std::sqrt((area * (1 - area) + (n - 1) * (q1 - area * area + q2 - area * area)) / (n * n));
}

class Probe {
 public:
  Probe(llmcache::TorchScriptCache& cache, std::int64_t tokens, std::uint64_t seed)
      : cache_(cache), tokens_(tokens), random_(seed) {}

  void one(Times& own, Times& others) {
    const std::vector<std::int64_t> theirs = text();
    const std::vector<std::int64_t> mine = text();
    time("victim", theirs);
    time("stranger", mine);
    const auto known_to_victim = [&] { others.known.push_back(time("stranger", theirs)); };
    const auto to_nobody = [&] { others.unknown.push_back(time("stranger", text())); };
    const auto known = [&] { own.known.push_back(time("stranger", mine)); };
    const auto unknown = [&] { own.unknown.push_back(time("stranger", text())); };
    std::vector<std::function<void()>> order{known_to_victim, to_nobody, known, unknown};
    std::shuffle(order.begin(), order.end(), random_);
    for (const auto& ask : order) ask();
  }

 private:
  std::vector<std::int64_t> text() {
    std::vector<std::int64_t> ids;
    while (static_cast<std::int64_t>(ids.size()) < tokens_) ids.push_back(static_cast<std::int64_t>(random_() % 256));
    return ids;
  }
  double time(const std::string& tenant, const std::vector<std::int64_t>& ids) {
    const auto inputs = llmcache::pad({ids}).inputs(cache_.profile());
    const auto begin = std::chrono::steady_clock::now();
    cache_.forward(inputs, {.output = llmcache::Output::kLastToken, .tenant = tenant});
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }

  llmcache::TorchScriptCache& cache_;
  const std::int64_t tokens_;
  std::mt19937_64 random_;
};

void print(const char* what, const Times& times) {
  const double area = area_under_curve(times);
  std::cout << what << ": AUC " << area << " +- " << standard_error(area, times.known.size()) << " of "
            << times.known.size() << " known and as many unknown texts\n";
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Tells by time which texts a tenant has asked for: its own, and another tenant's."};
  std::string model;
  int probes = 500;
  std::int64_t tokens = 32;
  std::uint64_t seed = 1;
  app.add_option("--model", model, "TorchScript file of a causal model")->required();
  app.add_option("--probes", probes, "texts of each kind");
  app.add_option("--tokens", tokens, "of each text");
  app.add_option("--seed", seed, "of the texts and of their order");
  CLI11_PARSE(app, argc, argv);
  try {
    llmcache::TorchScriptCache cache = llmcache::load(model, {.verify_rate = 0});
    Probe probe(cache, tokens, seed);
    Times own;
    Times others;
    for (int i = 0; i < 20; ++i) probe.one(own, others);  // to warm up
    own = others = {};
    for (int i = 0; i < probes; ++i) probe.one(own, others);
    print("one's own texts", own);
    print("another tenant's", others);
  } catch (const std::exception& error) {
    std::cerr << "llmcache-tenant-probe: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
