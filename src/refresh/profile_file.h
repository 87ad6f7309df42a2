// A calibration profile as bytes: what CalibrationProfile::save() writes into its two files.
#pragma once

#include <string>
#include <string_view>

#include "llmcache/refresh/calibration.h"

namespace llmcache {

struct ProfileBytes {
  std::string json;
  std::string tensors;  ///< empty: it has none
};
[[nodiscard]] ProfileBytes profile_bytes(const CalibrationProfile& profile);

/// The inverse. Throws DamagedData, ForeignProfile, and Error(kInvalidOptions) for numbers that cannot be.
[[nodiscard]] CalibrationProfile profile_of(std::string_view json, std::string_view tensors);

}  // namespace llmcache
