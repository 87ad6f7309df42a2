#include "llmcache/bank/format.h"

#include <fmt/core.h>

#include "llmcache/error.h"

namespace llmcache {

const char* to_string(BankFormat format) noexcept {
  switch (format) {
    case BankFormat::kAsComputed:
      return "as-computed";
    case BankFormat::kBFloat16:
      return "bfloat16";
    case BankFormat::kFloat16:
      return "float16";
    case BankFormat::kInt8:
      return "int8";
  }
  return "unknown";
}

BankFormat bank_format_from_string(const std::string& text) {
  for (const auto format : {BankFormat::kAsComputed, BankFormat::kBFloat16, BankFormat::kFloat16, BankFormat::kInt8}) {
    if (text == to_string(format)) return format;
  }
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("'{}' is no bank format; known are as-computed, bfloat16, float16, int8", text));
}

double bytes_per_value(BankFormat format, std::int64_t computed, std::int64_t group) noexcept {
  switch (format) {
    case BankFormat::kBFloat16:
    case BankFormat::kFloat16:
      return 2;
    case BankFormat::kInt8:
      return 1 + 4.0 / static_cast<double>(group);
    case BankFormat::kAsComputed:
      break;
  }
  return static_cast<double>(computed);
}

}  // namespace llmcache
