// Shows how far the benchmark is: a bar with the remaining time on a terminal, lines elsewhere.
#pragma once

#include <cstddef>
#include <string>

#include "clock.h"

namespace llmcache::bench {

/// Writes to stderr. For one thread.
class Progress {
 public:
  /// `experiments`: how many times begin() will be called.
  explicit Progress(std::size_t experiments);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void begin(const std::string& label);
  void update(double fraction);  ///< of the experiment begun last, 0 to 1
  void end(const std::string& summary);
  void note(const std::string& line);
  void skip(std::size_t experiments);  ///< that will not be begun

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
