// A program of somebody else's: wraps a model, runs it once and prints what Prometheus would be given.
#include <llmcache/llmcache.h>
#include <llmcache/metrics/prometheus.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: consumer MODEL.pt\n";
    return 2;
  }
  try {
    llmcache::TorchScriptCache cache = llmcache::load(argv[1], {.capacity_bytes = 1u << 20});
    llmcache::CacheMetrics metrics;
    metrics.add(cache, "consumer");
    const auto ids = torch::ones({1, 8}, torch::kLong);
    cache.forward({ids, torch::ones_like(ids)});
    const std::string text = prometheus::TextSerializer().Serialize(metrics.Collect());
    std::cout << text;
    return text.find("llmcache_requests_total{cache=\"consumer\"} 1\n") == std::string::npos ? 1 : 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
