#include "progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kBarWidth = 24;
constexpr auto kRedrawAfter = std::chrono::milliseconds(200);

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

std::size_t terminal_width() {
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

Progress::Progress(std::size_t cells)
    : cells_(std::max<std::size_t>(cells, 1)), terminal_(::isatty(STDERR_FILENO) == 1), start_(Clock::now()) {}

Progress::~Progress() { erase(); }

void Progress::begin(const std::string& label) {
  label_ = label;
  fraction_ = 0;
  if (terminal_) {
    draw();
  } else {
    std::fputs(fmt::format("[{}/{}] {}\n", done_ + 1, cells_, label).c_str(), stderr);
  }
}

void Progress::update(double fraction) {
  fraction_ = std::clamp(fraction, 0.0, 1.0);
  if (terminal_ && Clock::now() - last_draw_ > kRedrawAfter) draw();
}

void Progress::end(const std::string& summary) {
  ++done_;
  fraction_ = 0;
  note(fmt::format("[{}/{}] {}: {}", done_, cells_, label_, summary));
}

void Progress::note(const std::string& line) {
  erase();
  std::fputs((line + "\n").c_str(), stderr);
}

void Progress::skip(std::size_t cells) { done_ += cells; }

void Progress::draw() {
  const double whole = std::min((static_cast<double>(done_) + fraction_) / static_cast<double>(cells_), 1.0);
  const auto filled = static_cast<std::size_t>(whole * kBarWidth);
  std::string left;
  if (whole > 0.01) {
    const auto remaining = static_cast<int>(seconds(Clock::now() - start_) * (1 - whole) / whole);
    left = fmt::format(", {}:{:02} left", remaining / 60, remaining % 60);
  }
  std::string line = fmt::format("[{}{}] {:3.0f}%{}  {}", std::string(filled, '#'),
                                 std::string(kBarWidth - filled, '.'), 100 * whole, left, label_);
  line.resize(std::min(line.size(), terminal_width() - 1));
  std::fputs(("\r\033[K" + line).c_str(), stderr);
  std::fflush(stderr);
  drawn_ = true;
  last_draw_ = Clock::now();
}

void Progress::erase() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace llmcache::bench
