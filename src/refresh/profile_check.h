// Whether the numbers of a calibration profile can be what they stand for.
#pragma once

#include "llmcache/refresh/calibration.h"

namespace llmcache {

/// Throws Error(kInvalidOptions) that names one that cannot be: not finite, negative, an error or a share above 1. The
/// tensors of an early exit must fit each other already.
void check_numbers(const CalibrationProfile& profile);

}  // namespace llmcache
