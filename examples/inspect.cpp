// Wraps a TorchScript model, or a program of torch.export (.pt2), and prints what the library found out about it:
// whether it can be wrapped, what can be reused, and why something cannot.
//
//   llmcache-inspect MODEL.pt [LAYERS_PATH] [--weights FORMAT]
#include <llmcache/llmcache.h>

#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "model.h"

int main(int argc, char** argv) {
  const std::string usage = "usage: llmcache-inspect MODEL.pt [LAYERS_PATH] [--weights FORMAT]\n";
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string first = arguments.empty() ? "" : arguments[0];
  if (first == "--help" || first == "-h") {
    std::cout << usage;
    return 0;
  }
  std::string weights = "as-loaded";
  if (arguments.size() > 2 && arguments[arguments.size() - 2] == "--weights") {
    weights = arguments.back();
    arguments.resize(arguments.size() - 2);
  }
  if (arguments.empty() || arguments.size() > 2) {
    std::cerr << usage;
    return 2;
  }
  try {
    llmcache::Options options;
    options.progress = llmcache::examples::progress_on_terminal();
    options.weights = llmcache::weights_from_string(weights);
    if (arguments.size() == 2) options.layers = arguments[1];
    std::cout << llmcache::load(first, options).profile().to_string();
  } catch (const std::exception& error) {
    std::cerr << "llmcache-inspect: " << llmcache::examples::one_line(error) << "\n";
    return 1;
  }
  return 0;
}
