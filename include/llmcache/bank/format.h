// In which format a bank keeps states.
#pragma once

#include <cstdint>
#include <string>

namespace llmcache {

/// What a smaller format costs is rounding of the cached states only; what a layer computes keeps its type. Values that
/// are not finite come back as values that are not finite.
enum class BankFormat {
  /// The type that the model computes in: nothing is lost, the default wherever results are promised to be equal.
  kAsComputed,
  /// 2 bytes a value, 8 bits of precision: relative rounding of 2^-9, any magnitude.
  kBFloat16,
  /// 2 bytes a value, 11 bits of precision: relative rounding of 2^-12; beyond 65,504 values become infinite.
  kFloat16,
  /// 1 byte a value and a float32 scale for each token and group of 32 neighbours in the last dimension, symmetric
  /// about 0 (-127 to 127): rounding of at most 1/254 of the largest magnitude in the group. A group with a value that
  /// is not finite becomes NaN.
  kInt8,
};

/// "as-computed", "bfloat16", "float16", "int8".
const char* to_string(BankFormat format) noexcept;
/// The inverse of to_string. Throws Error(kInvalidOptions) for any other text.
BankFormat bank_format_from_string(const std::string& text);

/// Bytes a value, scales included, for last dimensions that are multiples of `group`; `computed` is the size of the
/// type that the model computes in.
double bytes_per_value(BankFormat format, std::int64_t computed, std::int64_t group = 32) noexcept;

}  // namespace llmcache
