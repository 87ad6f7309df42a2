// Loops of the bank formats over rows of float32 on the CPU, in one thread, compiled for several instruction sets. A
// row is `size` neighbouring values; groups of `group` of them have a scale each, the last group may be shorter.
#pragma once

#include <cstdint>

namespace llmcache::detail {

/// values = round(row / scale), scales = largest magnitude / 127. A group with a value that is not finite gets the
/// scale NaN.
void quantise_row(const float* row, std::int8_t* values, float* scales, std::int64_t size, std::int64_t group) noexcept;

/// row = values * scale, + shift if that is not null.
void dequantise_row(const std::int8_t* values, const float* scales, const float* shift, float* row, std::int64_t size,
                    std::int64_t group) noexcept;

/// row = the bfloat16 numbers whose bits `values` are, + shift if that is not null.
void widen_row(const std::uint16_t* values, const float* shift, float* row, std::int64_t size) noexcept;

/// row = values + shift.
void add_row(const float* values, const float* shift, float* row, std::int64_t size) noexcept;

}  // namespace llmcache::detail
