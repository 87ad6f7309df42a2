#include "refresh/output_difference.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace llmcache {

OutputDifference difference_of_outputs(const std::vector<at::Tensor>& served, const std::vector<at::Tensor>& full,
                                       const DecisionFunction& decision) {
  double product = 0;
  double served_square = 0;
  double full_square = 0;
  double difference_square = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    const auto a = served.at(i).to(at::kDouble).flatten();
    const auto b = full[i].to(at::kDouble).flatten();
    product += a.dot(b).item<double>();
    served_square += a.dot(a).item<double>();
    full_square += b.dot(b).item<double>();
    difference_square += (a - b).square().sum().item<double>();
  }
  OutputDifference difference;
  if (difference_square != 0) {
    difference.cosine = 1 - product / std::sqrt(served_square * full_square);
    difference.relative = std::sqrt(difference_square / full_square);
    // A zero output has no direction, and what is not finite is no answer.
    if (!std::isfinite(difference.cosine)) difference.cosine = 2;
    if (!std::isfinite(difference.relative)) difference.relative = std::numeric_limits<double>::infinity();
  }
  if (decision && !full.empty()) difference.decision_changed = decision(served.at(0)) != decision(full[0]);
  return difference;
}

}  // namespace llmcache
