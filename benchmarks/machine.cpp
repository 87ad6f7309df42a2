#include "machine.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace llmcache::bench {
namespace {

/// What follows "KEY :" in a file of /proc; empty if there is nothing.
std::string proc_value(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const auto value = line.find_first_not_of(" \t:", key.size());
    if (line.starts_with(key) && value != std::string::npos) return line.substr(value);
  }
  return "";
}

/// "1234 kB" in bytes; 0 for nothing.
std::int64_t kilobytes(const std::string& text) { return std::int64_t{std::strtoll(text.c_str(), nullptr, 10)} * 1024; }

}  // namespace

Machine this_machine() {
  const std::string cpu = proc_value("/proc/cpuinfo", "model name");
  return {.cpu = cpu.empty() ? "unknown" : cpu,
          .cores = static_cast<int>(std::thread::hardware_concurrency()),
          .memory_gib = static_cast<double>(kilobytes(proc_value("/proc/meminfo", "MemTotal"))) / (1 << 30)};
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

Progress::Progress(std::size_t experiments)
    : experiments_(std::max<std::size_t>(experiments, 1)), terminal_(::isatty(STDERR_FILENO) == 1) {}

void Progress::begin(const std::string& label) {
  label_ = label;
  if (!terminal_) fmt::print(stderr, "[{}/{}] {}\n", done_ + 1, experiments_, label);
  update(0);
}

void Progress::update(double fraction) {
  constexpr double kRedrawSeconds = 0.2;
  if (!terminal_ || (fraction > 0 && seconds_since(last_draw_) < kRedrawSeconds)) return;
  const double part = std::clamp(fraction, 0.0, 1.0);
  const double whole = std::min((static_cast<double>(done_) + part) / static_cast<double>(experiments_), 1.0);
  std::string left;
  if (whole > 0.01) {
    const auto remaining = static_cast<int>(seconds_since(start_) * (1 - whole) / whole);
    left = fmt::format(", {}:{:02} left", remaining / 60, remaining % 60);
  }
  const std::string bar(static_cast<std::size_t>(24 * whole), '#');
  fmt::print(stderr, "\r\033[K[{:.<24}] {:3.0f}%{}  {:.80}", bar, 100 * whole, left, label_);
  std::fflush(stderr);
  drawn_ = true;
  last_draw_ = Clock::now();
}

void Progress::end(const std::string& summary) {
  ++done_;
  note(fmt::format("[{}/{}] {}: {}", done_, experiments_, label_, summary));
}

void Progress::note(const std::string& line) {
  erase();
  fmt::print(stderr, "{}\n", line);
}

void Progress::erase() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace llmcache::bench
