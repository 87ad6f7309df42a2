// Numbers with their units, for people.
#pragma once

#include <fmt/core.h>

#include <cstddef>
#include <string>

namespace llmcache {

/// "12.3 MiB", "512 KiB", "40 bytes".
inline std::string size_text(std::size_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes >= std::size_t{1} << 30) return fmt::format("{:.2f} GiB", value / (1 << 30));
  if (bytes >= std::size_t{1} << 20) return fmt::format("{:.1f} MiB", value / (1 << 20));
  if (bytes >= std::size_t{1} << 10) return fmt::format("{:.0f} KiB", value / (1 << 10));
  return fmt::format("{} bytes", bytes);
}

/// "12.5 % (25 of 200)"; "none" of nothing.
template <class Count>
std::string share_text(Count part, Count whole) {
  if (whole == 0) return "none";
  return fmt::format("{:.1f} % ({} of {})", 100 * static_cast<double>(part) / static_cast<double>(whole), part, whole);
}

}  // namespace llmcache
