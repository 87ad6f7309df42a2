// The machine and the process that measure (Linux: /proc).
#pragma once

#include <cstdint>
#include <string>

namespace llmcache::bench {

struct Machine {
  std::string cpu;  ///< "unknown" where /proc does not say
  int cores = 0;
  double memory_gib = 0;
};

Machine this_machine();

/// Resident memory of this process in bytes (VmRSS), after freed memory was given back to the
/// system; 0 if unknown.
std::int64_t resident_bytes();

/// Compiler of this program, name and version.
std::string compiler();

}  // namespace llmcache::bench
