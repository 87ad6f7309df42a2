// llmcache-store-failures: what a store below the memory adds to requests while its server works, is stopped, is back,
// answers late, and is gone. Starts a redis-server of its own.
#include <fmt/format.h>
#include <llmcache/llmcache.h>
#include <llmcache/store/redis_store.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "command_line.h"
#include "failure.h"
#include "machine.h"
#include "redis_support.h"
#include "statistics.h"

namespace llmcache::bench {
namespace {

struct Settings {
  std::string model;
  int requests = 200;
  std::size_t tokens = 64;
  int late_ms = 40;
  double deadline_ms = StoreOptions{}.deadline_ms;
};

class Failures {
 public:
  explicit Failures(const Settings& settings)
      : settings_(settings), proxy_(server_.port()), without_(load(settings.model, {.verify_rate = 0})) {}

  void run() {
    fmt::print("{:<12} {:>9} {:>9} {:>9}   {:<27} {:<25}\n", "server", "look-ups", "answered", "timed out",
               "ms waited: p50, p99, max", "p99 of a call: with, without");
    const auto cache = above(server_.port());
    measure("works", *cache);
    server_.send(SIGSTOP);
    measure("stopped", *cache);
    server_.send(SIGCONT);
    wait_until_back(*cache);
    measure("back", *cache);
    const auto behind_proxy = above(proxy_.port());
    ask(*behind_proxy, text());
    proxy_.delay_ms = settings_.late_ms;
    proxy_.manner = test::Proxy::Manner::kSlow;
    measure(fmt::format("{} ms late", settings_.late_ms), *behind_proxy);
    server_.stop();
    measure("killed", *cache);
  }

 private:
  using Ids = std::vector<std::int64_t>;

  /// Asks the store for all that the memory lacks, whether that is expected to be faster than computing or not.
  [[nodiscard]] std::unique_ptr<TorchScriptCache> above(int port) const {
    Options options = without_.options();
    options.store = {.store = std::make_shared<RedisStore>(RedisStoreOptions{.port = port}),
                     .deadline_ms = settings_.deadline_ms,
                     .only_if_faster = false};
    return std::make_unique<TorchScriptCache>(without_.with_options(options));
  }

  Ids text() {
    Ids ids(settings_.tokens);
    for (std::int64_t& id : ids) id = static_cast<std::int64_t>(random_() % 256);
    return ids;
  }

  static double ask(TorchScriptCache& cache, const Ids& ids) {
    const auto inputs = pad({ids}).inputs(cache.profile());
    const auto begin = Clock::now();
    cache.forward(inputs, {.output = Output::kLastToken});
    return ms_since(begin);
  }

  void wait_until_back(TorchScriptCache& cache) const {
    const auto begin = Clock::now();
    while (cache.stats().store.tiers.at(0).open) {
      if (seconds_since(begin) > 60) throw Failure("the store is left alone a minute after its server went on");
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  /// Texts that nobody knows; the cache without a store takes turns, so that both meet what the machine does.
  void measure(const std::string& name, TorchScriptCache& cache) {
    std::vector<double> waited, with, without;
    const StoreStats before = cache.stats().store;
    double so_far = before.wait_ms;
    for (int i = 0; i < settings_.requests; ++i) {
      const Ids ids = text();
      if (i % 2 == 0) without.push_back(ask(without_, ids));
      with.push_back(ask(cache, ids));
      if (i % 2 != 0) without.push_back(ask(without_, ids));
      const double now = cache.stats().store.wait_ms;
      waited.push_back(now - so_far);
      so_far = now;
    }
    const StoreStats after = cache.stats().store;
    const auto answered = after.hits + after.misses - before.hits - before.misses;
    const Summary waits = summarize(waited);
    fmt::print("{:<12} {:>9} {:>9} {:>9}   {:>7.3f} {:>8.3f} {:>8.2f}     {:>8.1f} {:>8.1f}\n", name,
               after.lookups - before.lookups, answered, after.timeouts - before.timeouts, waits.p50, waits.p99,
               waits.max, summarize(with).p99, summarize(without).p99);
  }

  const Settings settings_;
  test::RedisServer server_;
  test::Proxy proxy_;
  TorchScriptCache without_;
  std::mt19937_64 random_{1};
};

int run(int argc, char** argv) {
  Settings chosen;
  CLI::App app("Measures what a store adds to requests while its server fails. Starts a redis-server of its own.",
               "llmcache-store-failures");
  app.add_option("--model", chosen.model, "TorchScript file of a causal model")->required();
  app.add_option("--requests", chosen.requests, "for each state of the server")->capture_default_str();
  app.add_option("--tokens", chosen.tokens, "of a request, blocks of 64 for the store")->capture_default_str();
  app.add_option("--late", chosen.late_ms, "by how much the late server's answers are late, ms")->capture_default_str();
  app.add_option("--deadline", chosen.deadline_ms, "StoreOptions::deadline_ms")->capture_default_str();
  parse(app, argc, argv);
  Failures(chosen).run();
  return 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  return llmcache::bench::run_program("llmcache-store-failures", [&] { return llmcache::bench::run(argc, argv); });
}
