// The clock, the machine and the process that measure (Linux: /proc), and how far it is.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace llmcache::bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
inline double ms_since(Clock::time_point start) { return 1000 * seconds_since(start); }

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

/// Shows how far the benchmark is: a bar with the remaining time on a terminal, lines elsewhere. Writes to stderr. For
/// one thread.
class Progress {
 public:
  /// `experiments`: how many times begin() will be called.
  explicit Progress(std::size_t experiments);
  ~Progress() { erase(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void begin(const std::string& label);
  void update(double fraction);  ///< of the experiment begun last, 0 to 1
  void end(const std::string& summary);
  void note(const std::string& line);
  void skip(std::size_t experiments) { done_ += experiments; }  ///< that will not be begun

 private:
  void erase();

  std::size_t experiments_;
  bool terminal_;
  std::size_t done_ = 0;
  std::string label_;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_draw_;
};

}  // namespace llmcache::bench
