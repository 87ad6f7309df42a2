// For which sizes of requests answers have been compared with the plain module's.
#pragma once

#include <cstdint>
#include <vector>

namespace llmcache {

/// Sizes for which answers made with reuse were compared with the plain module's and agreed. A request of another size
/// is compared at its first use. Sizes count by powers of two: 65 to 128 tokens are one size. Plain data.
struct VerifiedEnvelope {
  std::int64_t tokens = 0;   ///< of the longest sequence that was compared
  std::int64_t rows = 0;     ///< of the batch with the most rows
  std::int64_t padding = 0;  ///< most padding tokens of a row
  /// What was compared in detail, one code each: which mechanism, at which sizes. Ascending.
  std::vector<std::uint32_t> codes;
};

}  // namespace llmcache
