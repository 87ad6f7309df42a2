// A program of somebody else's: wraps a model above a server that is not there, and answers all the same.
#include <llmcache/llmcache.h>
#include <llmcache/store/redis_store.h>

#include <exception>
#include <iostream>
#include <memory>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: consumer MODEL.pt\n";
    return 2;
  }
  try {
    llmcache::Options options;
    options.store.store = std::make_shared<llmcache::RedisStore>(llmcache::RedisStoreOptions{.port = 1});
    llmcache::TorchScriptCache cache = llmcache::load(argv[1], options);
    const auto ids = torch::ones({1, 8}, torch::kLong);
    cache.forward({ids, torch::ones_like(ids)});
    std::cout << cache.stats().to_string();
    return cache.stats().store.failures == 1 && cache.stats().store.tiers.at(0).open ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
