// How large a calibration sample would have to be.
#pragma once

#include <string>
#include <vector>

#include "llmcache/refresh/budget.h"
#include "refresh/risk_bound.h"

namespace llmcache {

/// In words: why errors seen on sequences that certify do not prove the budget, and how many sequences the sample would
/// need if the error stayed as it was; `share`: part of a sample that certifies.
std::string why_not_certified(const std::vector<double>& errors, const Budget& budget, LossKind kind, double share);

}  // namespace llmcache
