// What a restart costs with a snapshot and without: texts of random tokens are computed, saved, and loaded into a cache
// of a program that has just begun.
//
//   llmcache-restart --model build/models/gpt2.pt --texts 20 --tokens 256
#include <ATen/ATen.h>
#include <llmcache/llmcache.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include "model.h"

namespace {

using namespace llmcache::examples;

/// Milliseconds that answering all texts takes; counts the tokens that were known.
double answer(Cache& cache, const std::vector<llmcache::Inputs>& texts, std::int64_t& known) {
  const auto start = std::chrono::steady_clock::now();
  known = 0;
  for (const llmcache::Inputs& text : texts) {
    cache.forward(text, {.output = llmcache::Output::kLastToken});
    known += cache.last_report().sequences[0].reused_tokens;
  }
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

std::vector<llmcache::Inputs> make_texts(const llmcache::ModelProfile& profile, int texts, std::int64_t tokens) {
  at::manual_seed(1);
  std::vector<llmcache::Inputs> all;
  for (int i = 0; i < texts; ++i) {
    const at::Tensor ids = at::randint(1, profile.vocabulary, {1, tokens}, at::kLong);
    llmcache::Inputs inputs(profile.inputs.size(), at::zeros_like(ids));
    inputs[static_cast<std::size_t>(profile.ids_argument)] = ids;
    if (profile.mask_argument >= 0) inputs[static_cast<std::size_t>(profile.mask_argument)] = at::ones_like(ids);
    all.push_back(std::move(inputs));
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Times computing texts, saving what was kept, and loading it again", "llmcache-restart");
  std::string model, file = (std::filesystem::temp_directory_path() / "llmcache-restart.snapshot").string();
  int texts = 20;
  std::int64_t tokens = 128, megabytes = 4096;
  app.add_option("--model", model, "TorchScript file, such as build/models/gpt2.pt")->required();
  app.add_option("--texts", texts, "how many")->check(CLI::PositiveNumber);
  app.add_option("--tokens", tokens, "of each text")->check(CLI::PositiveNumber);
  app.add_option("--megabytes", megabytes, "capacity of the cache")->check(CLI::PositiveNumber);
  app.add_option("--file", file, "where the snapshot goes; it is removed at the end");
  CLI11_PARSE(app, argc, argv);
  try {
    const llmcache::Options options{.capacity_bytes = static_cast<std::size_t>(megabytes) << 20};
    Cache cache = llmcache::load(model, options);
    const auto asked = make_texts(cache.profile(), texts, tokens);
    std::int64_t known = 0;
    const double computed_ms = answer(cache, asked, known);
    std::printf("computed  %8.0f ms\n", computed_ms);
    std::printf("saved     %s\n", cache.save(file).summary().c_str());
    Cache restarted = cache.with_options(options);
    const llmcache::SnapshotReport loaded = restarted.load(file);
    std::printf("loaded    %s\n", loaded.summary().c_str());
    const double answered_ms = answer(restarted, asked, known);
    std::printf("answered  %8.0f ms, %lld of %lld tokens known\n", answered_ms, static_cast<long long>(known),
                static_cast<long long>(texts) * static_cast<long long>(tokens));
    std::printf("loading is %.1f times as fast as computing\n", computed_ms / loaded.ms);
    std::filesystem::remove(file);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-restart: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
