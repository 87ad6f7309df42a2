// main() of the small benchmarks: what run() throws becomes one line and exit status 1.
#pragma once

#include <cstdio>
#include <exception>

namespace llmcache::bench {

inline int guarded_main(const char* program, int argc, char** argv, int (*run)(int argc, char** argv)) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 1;
  }
}

}  // namespace llmcache::bench
