#include "budget.h"

#include <algorithm>
#include <limits>

namespace llmcache::bench {
namespace {

constexpr double kShareSeconds = 30;      // of a cell of weight 1
constexpr double kAllCellsSeconds = 480;  // loading and wrapping all models comes on top
constexpr double kTaskWeight = 2;
constexpr double kFillWeight = 3;

}  // namespace

double cell_weight(const ModelFile& model, const TokenFile& tokens) {
  if (model.random_weights() || tokens.task == Task::kNone) return 1;
  return tokens.fill_requests > 0 ? kTaskWeight * kFillWeight : kTaskWeight;
}

double share_seconds(const Arguments& arguments, double weights) {
  if (arguments.limit) return std::numeric_limits<double>::infinity();
  return std::min(kShareSeconds, kAllCellsSeconds / weights);
}

}  // namespace llmcache::bench
