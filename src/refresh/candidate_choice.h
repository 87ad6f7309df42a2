// Choosing one of several settings by the errors that it made on a sample.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "llmcache/refresh/budget.h"

namespace llmcache {

/// Part of an error budget that a choice may use: it looks better on the data that it was made on.
inline constexpr double kChoiceMargin = 0.8;

/// Measured on one sequence of the sample, one value a candidate.
struct CandidateDraw {
  std::vector<double> errors;    ///< against the full model, 0 to 1
  std::vector<double> computed;  ///< token-layers computed / all of them
  std::int64_t tokens = 1;       ///< of the sequence, by which `computed` weighs
};

/// Numbers of the candidates that are worth a test, the safest first; each computes less than the one before. They are
/// the ones that compute least at some parts of the budget.
std::vector<std::size_t> choose_candidates(const std::vector<CandidateDraw>& draws, double epsilon);

/// Upper bound of the mean of errors in [0, 1], with confidence 1 - delta: exact for errors of 0 and 1, else by
/// betting.
double upper_bound(const std::vector<double>& errors, double delta, bool binary);

}  // namespace llmcache
