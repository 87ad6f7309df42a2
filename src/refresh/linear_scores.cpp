#include <ATen/ATen.h>
#include <fmt/core.h>

#include "llmcache/refresh/budget.h"
#include "refusal.h"

namespace llmcache {

ScoreFunction linear_scores(const at::Tensor& weight, const at::Tensor& bias) {
  if (!weight.defined() || weight.dim() != 2 || weight.size(0) < 2 || !weight.is_floating_point()) {
    refuse_options("linear_scores: weight is float [classes, values], of at least two classes, as nn.Linear holds it");
  }
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != weight.size(0))) {
    refuse_options(fmt::format("linear_scores: bias has one value for each of the {} classes", weight.size(0)));
  }
  const auto transposed = weight.detach().to(at::kFloat).t().clone(at::MemoryFormat::Contiguous);
  const auto added = bias.defined() ? bias.detach().to(at::kFloat).clone() : at::zeros({weight.size(0)});
  return [transposed, added](const at::Tensor& outputs) {
    if (outputs.dim() != 2 || outputs.size(1) != transposed.size(0)) {
      refuse_options(fmt::format("linear_scores: outputs are {}, the weight is for [batch, {} values]",
                                 c10::str(outputs.sizes()), transposed.size(0)));
    }
    const auto device = outputs.device();
    return at::addmm(added.to(device), outputs.to(at::kFloat), transposed.to(device));
  };
}

ScoreFunction linear_scores(const at::Tensor& weight) { return linear_scores(weight, {}); }

}  // namespace llmcache
