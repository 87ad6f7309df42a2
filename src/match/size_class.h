// Sizes that are told apart by their order of magnitude only.
#pragma once

#include <bit>
#include <cstdint>

namespace llmcache {

/// 0 for n <= 1, above that the logarithm to the base of 2, rounded up: 1 for 2, 2 for 3 and 4, 3 for 5 to 8.
[[nodiscard]] constexpr std::uint8_t size_class(std::int64_t n) noexcept {
  return n <= 1 ? std::uint8_t{0} : static_cast<std::uint8_t>(std::bit_width(static_cast<std::uint64_t>(n - 1)));
}

}  // namespace llmcache
