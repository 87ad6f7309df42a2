#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace llmcache::bench {

Progress::Progress(std::size_t experiments)
    : experiments_(std::max<std::size_t>(experiments, 1)), terminal_(::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { erase(); }

void Progress::begin(const std::string& label) {
  label_ = label;
  if (!terminal_) std::fputs(fmt::format("[{}/{}] {}\n", done_ + 1, experiments_, label).c_str(), stderr);
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
  const auto filled = static_cast<std::size_t>(24 * whole);
  std::fputs(
      fmt::format("\r\033[K[{:.<24}] {:3.0f}%{}  {:.80}", std::string(filled, '#'), 100 * whole, left, label_).c_str(),
      stderr);
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
  std::fputs((line + "\n").c_str(), stderr);
}

void Progress::skip(std::size_t experiments) { done_ += experiments; }

void Progress::erase() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace llmcache::bench
