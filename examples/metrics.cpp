// Serves metrics of a cache to Prometheus while threads ask it for texts of random tokens: some are new, some continue
// or repeat earlier ones, and the capacity may be too small for all of them.
//
//   llmcache-metrics --model build/models/gpt2.pt --listen 127.0.0.1:9464 --seconds 600
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <llmcache/llmcache.h>
#include <llmcache/metrics/prometheus.h>
#include <llmcache/store/directory_store.h>
#include <prometheus/exposer.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "model.h"

namespace {

using namespace llmcache::examples;

struct Settings {
  std::string model, listen = "127.0.0.1:9464", name = "example", store;
  int threads = 2;
  double seconds = 60;
  std::int64_t tokens = 128, megabytes = 256, texts = 200;
};

/// Texts of which few are asked for often and many seldom, each up to some token: a prefix of it, or all of it.
class RandomTexts {
 public:
  RandomTexts(const Settings& settings, const llmcache::ModelProfile& profile, unsigned seed)
      : settings_(settings), profile_(profile), random_(seed) {}

  llmcache::Inputs next() {
    // The rank of a text, with frequencies that fall with it.
    const double uniform = std::generate_canonical<double, 32>(random_);
    const auto text = static_cast<std::uint32_t>(static_cast<double>(settings_.texts) * uniform * uniform * uniform);
    const auto least = std::max<std::int64_t>(1, settings_.tokens / 4);
    const auto tokens = std::uniform_int_distribution<std::int64_t>(least, settings_.tokens)(random_);
    std::mt19937 own(text);
    std::uniform_int_distribution<std::int64_t> id(1, profile_.vocabulary - 1);
    std::vector<std::int64_t> ids;
    while (static_cast<std::int64_t>(ids.size()) < tokens) ids.push_back(id(own));
    return llmcache::pad({ids}).inputs(profile_);
  }

 private:
  const Settings& settings_;
  const llmcache::ModelProfile& profile_;
  std::mt19937 random_;
};

void run(const Settings& settings) {
  at::set_num_threads(1);  // the threads are the parallelism
  llmcache::Options options{.capacity_bytes = static_cast<std::size_t>(settings.megabytes) << 20};
  if (!settings.store.empty()) {
    options.store.store =
        std::make_shared<llmcache::DirectoryStore>(llmcache::DirectoryStoreOptions{.path = settings.store});
    options.store.block_tokens = 16;  // texts may be short
  }
  Cache cache = llmcache::load(settings.model, options);
  auto metrics = std::make_shared<llmcache::CacheMetrics>();
  metrics->add(cache, settings.name);
  prometheus::Exposer exposer(settings.listen);
  exposer.RegisterCollectable(metrics);
  std::printf("port %d, /metrics\n", exposer.GetListeningPorts().at(0));
  std::fflush(stdout);

  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(settings.seconds);
  const auto ask = [&](unsigned seed) {
    RandomTexts texts(settings, cache.profile(), seed);
    while (std::chrono::steady_clock::now() < end) {
      cache.forward(texts.next(), {.output = llmcache::Output::kLastToken});
    }
  };
  std::vector<std::future<void>> threads;
  for (int t = 0; t < settings.threads; ++t) {
    threads.push_back(std::async(std::launch::async, ask, static_cast<unsigned>(t)));
  }
  for (auto& thread : threads) thread.get();  // what a call throws comes out here
  std::printf("%s", cache.stats().to_string().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Serves metrics of a cache to Prometheus while threads ask it for texts of random tokens",
               "llmcache-metrics");
  Settings settings;
  app.add_option("--model", settings.model, "TorchScript file, such as build/models/gpt2.pt")->required();
  app.add_option("--listen", settings.listen, "address and port of /metrics; port 0: any that is free");
  app.add_option("--name", settings.name, "value of the label 'cache'");
  app.add_option("--threads", settings.threads, "that ask")->check(CLI::PositiveNumber);
  app.add_option("--seconds", settings.seconds, "how long")->check(CLI::PositiveNumber);
  app.add_option("--tokens", settings.tokens, "of the longest text")->check(CLI::PositiveNumber);
  app.add_option("--texts", settings.texts, "different ones")->check(CLI::PositiveNumber);
  app.add_option("--megabytes", settings.megabytes, "capacity of the cache")->check(CLI::NonNegativeNumber);
  app.add_option("--store", settings.store, "folder for a store below the memory; default: none");
  CLI11_PARSE(app, argc, argv);
  try {
    run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-metrics: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
