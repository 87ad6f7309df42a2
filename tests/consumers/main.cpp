// A program of somebody else's: wraps a model, runs it once and prints what the library found.
#include <llmcache/llmcache.h>
#include <torch/script.h>

#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: consumer MODEL.pt\n";
    return 2;
  }
  try {
    llmcache::LayerCache cache(torch::jit::load(argv[1]), {.capacity_bytes = 1u << 20});
    std::cout << "LLMCache " << LLMCACHE_VERSION << "\n" << cache.profile().to_string();
    const auto ids = torch::ones({1, 8}, torch::kLong);
    const auto output = cache.forward({ids, torch::ones_like(ids)});
    std::cout << cache.last_report().to_string();
    return output.isNone() || cache.stats().requests != 1 ? 1 : 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
