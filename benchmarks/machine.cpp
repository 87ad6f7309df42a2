#include "machine.h"

#include <cstdlib>
#include <fstream>
#include <thread>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace llmcache::bench {
namespace {

/// What follows "KEY :" in a file of /proc; empty if there is no such line.
std::string proc_value(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const auto colon = line.find(':');
    if (colon == std::string::npos) continue;
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

/// "1234 kB" in bytes.
std::int64_t kilobytes(const std::string& text) {
  return text.empty() ? 0 : static_cast<std::int64_t>(std::strtoll(text.c_str(), nullptr, 10)) * 1024;
}

}  // namespace

Machine this_machine() {
  Machine machine;
  machine.cpu = proc_value("/proc/cpuinfo", "model name");
  if (machine.cpu.empty()) machine.cpu = "unknown";
  machine.cores = static_cast<int>(std::thread::hardware_concurrency());
  machine.memory_gib = static_cast<double>(kilobytes(proc_value("/proc/meminfo", "MemTotal"))) / (1 << 30);
  return machine;
}

std::int64_t resident_bytes() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  return kilobytes(proc_value("/proc/self/status", "VmRSS"));
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace llmcache::bench
