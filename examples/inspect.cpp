// Wraps a TorchScript model, or a program of torch.export (.pt2), and prints what the library found out about it:
// whether it can be wrapped, what can be reused, and why something cannot.
//
//   llmcache-inspect MODEL.pt [LAYERS_PATH]
#include <llmcache/llmcache.h>

#include <exception>
#include <iostream>
#include <string>

#include "model.h"

int main(int argc, char** argv) {
  const std::string usage = "usage: llmcache-inspect MODEL.pt [LAYERS_PATH]\n";
  const std::string first = argc > 1 ? argv[1] : "";
  if (first == "--help" || first == "-h") {
    std::cout << usage;
    return 0;
  }
  if (argc < 2 || argc > 3) {
    std::cerr << usage;
    return 2;
  }
  try {
    llmcache::Options options;
    options.progress = llmcache::examples::progress_on_terminal();
    if (argc == 3) options.layers = argv[2];
    std::cout << llmcache::load(first, options).profile().to_string();
  } catch (const std::exception& error) {
    std::cerr << "llmcache-inspect: " << llmcache::examples::one_line(error) << "\n";
    return 1;
  }
  return 0;
}
