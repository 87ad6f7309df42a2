#include "budget.h"

#include <algorithm>
#include <limits>

namespace llmcache::bench {
namespace {

constexpr double kShareSeconds = 30;      // of a cell of weight 1
constexpr double kAllCellsSeconds = 360;  // loading and wrapping all models comes on top
constexpr double kFirstRunSeconds = 330;  // which wraps each model in more ways

}  // namespace

double cell_weight(const ModelFile& model, const TokenFile& tokens, bool probe) {
  constexpr double kSpeedOnly = 0.5;
  if (model.random_weights()) return kSpeedOnly;
  switch (tokens.task) {
    case Task::kNone:
      return kSpeedOnly;
    case Task::kClassification:
      return probe ? 12 : kSpeedOnly;
    case Task::kDuplicates:
      return 2;
    default:
      return tokens.scored.empty() ? 1 : 2;
  }
}

double share_seconds(const Arguments& arguments, double weights) {
  if (arguments.limit) return std::numeric_limits<double>::infinity();
  if (arguments.first_run) return kFirstRunSeconds / weights;
  return std::min(kShareSeconds, kAllCellsSeconds / weights);
}

}  // namespace llmcache::bench
