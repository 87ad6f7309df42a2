#include "model/int8_recipe.h"

#include <ATen/ATen.h>

namespace llmcache {
namespace {

std::int64_t outliers_of(std::int64_t inputs) {
  if (inputs < 32) return 0;
  return inputs < 128 ? 8 : 16;
}

}  // namespace

Int8Recipe int8_recipe(const at::Tensor& weight, const at::Tensor& peaks) {
  constexpr double kSmallestPeak = 1e-5;
  constexpr double kSteps = 40;  // powers of two, beyond which nothing is scaled
  const auto columns = weight.to(at::kFloat).abs().amax(0).clamp_min_(kSmallestPeak);
  const auto inputs = peaks.clamp_min(kSmallestPeak);
  const auto steps = at::log2(inputs / columns).mul_(0.5).round_().clamp_(-kSteps, kSteps);
  const auto weighty = std::get<1>(at::topk(inputs * columns, outliers_of(weight.size(1))));
  return {at::exp2(steps), std::get<0>(at::sort(weighty))};
}

}  // namespace llmcache
