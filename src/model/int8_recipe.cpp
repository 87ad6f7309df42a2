#include "model/int8_recipe.h"

#include <ATen/ATen.h>

namespace llmcache {
namespace {

std::int64_t outliers_of(std::int64_t inputs) {
  if (inputs < 32) return 0;
  return inputs < 128 ? 8 : 32;
}

}  // namespace

Int8Recipe int8_recipe(const at::Tensor& weight, const at::Tensor& peaks) {
  constexpr double kSmallestPeak = 1e-5;
  constexpr double kFineness = 8;  // steps of a power of two: what other threads round otherwise seldom changes one
  constexpr double kMostSteps = 40 * kFineness;
  const auto columns = weight.to(at::kFloat).abs().amax(0).clamp_min_(kSmallestPeak);
  const auto inputs = peaks.clamp_min(kSmallestPeak);
  const auto steps = at::log2(inputs / columns).mul_(0.5 * kFineness).round_().clamp_(-kMostSteps, kMostSteps);
  const auto largest = std::get<1>(at::topk(inputs, outliers_of(weight.size(1))));
  return {at::exp2(steps / kFineness).cpu(), std::get<0>(at::sort(largest)).cpu()};
}

}  // namespace llmcache
