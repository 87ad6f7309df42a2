// Shows how far the benchmark is: a bar with the remaining time on a terminal, lines elsewhere.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>

namespace llmcache::bench {

/// Writes to stderr. For one thread.
class Progress {
 public:
  /// `cells`: how many times begin() will be called.
  explicit Progress(std::size_t cells);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void begin(const std::string& label);
  void update(double fraction);  ///< of the cell begun last, 0 to 1
  void end(const std::string& summary);
  void note(const std::string& line);
  void skip(std::size_t cells);  ///< that will not be begun

 private:
  void draw();
  void erase();

  std::size_t cells_;
  bool terminal_;
  std::size_t done_ = 0;
  double fraction_ = 0;
  std::string label_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point last_draw_;
};

}  // namespace llmcache::bench
