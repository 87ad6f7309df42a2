// Choosing one of several settings by the errors that it made on a sample.
#pragma once

#include <cstddef>
#include <vector>

#include "llmcache/refresh/budget.h"

namespace llmcache {

/// Measured on one sequence of the sample, one value a setting.
struct LadderDraw {
  std::vector<double> errors;    ///< against the full model, 0 to 1
  std::vector<double> computed;  ///< token-layers computed / all of them
};

/// The setting that may be used, and why.
struct LadderChoice {
  int setting = -1;  ///< -1: none
  double error = 0;  ///< mean, of the draws that certified it
  double bound = 0;  ///< its upper bound with confidence 1 - delta
  double computed = 1;
  std::size_t ordered = 0;    ///< draws that the settings were put in order by
  std::size_t certified = 0;  ///< the others
};

/// Puts the settings in order of their error on every other draw, drops those that a safer one undercuts, and tests the
/// rest on the other draws from the safest on, by fixed-sequence testing (Learn then Test, arXiv 2110.01052, section 2,
/// with an order learnt on independent data). Of those that pass, the one that computes least.
LadderChoice choose_setting(const std::vector<LadderDraw>& draws, const Budget& budget, bool binary);

/// Upper bound of the mean of errors in [0, 1], with confidence 1 - delta: exact for errors of 0 and 1, else by
/// betting.
double upper_bound(const std::vector<double>& errors, double delta, bool binary);

}  // namespace llmcache
