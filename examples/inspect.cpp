// Wraps a TorchScript model and prints what the library found out about it.
//
//   llmcache-inspect MODEL.pt [LAYERS_PATH]
#include <llmcache/llmcache.h>
#include <torch/script.h>

#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::cerr << "usage: llmcache-inspect MODEL.pt [LAYERS_PATH]\n";
    return 2;
  }
  try {
    llmcache::Options options;
    if (argc == 3) options.layers = argv[2];
    const llmcache::LayerCache cache(torch::jit::load(argv[1]), options);
    std::cout << cache.profile().to_string();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
