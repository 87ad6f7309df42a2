#include "fingerprint/attention.h"

#include <ATen/ATen.h>

#include <cmath>

namespace llmcache {
namespace {

constexpr std::int64_t kQuantiles = 8;

}  // namespace

std::int64_t attention_statistics_size(std::int64_t heads) noexcept { return heads + kQuantiles; }

std::vector<float> attention_statistics(const at::Tensor& queries, const at::Tensor& keys, bool causal) {
  const auto q = queries.select(0, 0).to(at::kFloat);
  auto k = keys.select(0, 0).to(at::kFloat);
  const auto tokens = q.size(1);
  if (k.size(0) != q.size(0)) k = k.repeat_interleave(q.size(0) / k.size(0), 0);
  auto logits = q.matmul(k.transpose(1, 2)).mul_(1.0 / std::sqrt(static_cast<double>(q.size(2))));
  if (causal) {
    const auto later = at::ones({tokens, tokens}, q.options().dtype(at::kBool)).triu(1);
    logits.masked_fill_(later, -std::numeric_limits<float>::infinity());
  }
  const auto weights = logits.softmax(-1);
  const auto entropy = weights.mul(weights.clamp_min(1e-30).log()).sum(-1).neg().mean(-1);
  const double largest = tokens > 1 ? std::log(static_cast<double>(tokens)) : 1.0;
  const auto received = weights.mean(0).mean(0).mul(static_cast<double>(tokens));
  const auto quantiles = received.quantile(at::linspace(0, 1, kQuantiles, received.options()));
  const auto all = at::cat({entropy.div(largest), quantiles}).cpu().contiguous();
  return {all.const_data_ptr<float>(), all.const_data_ptr<float>() + all.numel()};
}

}  // namespace llmcache
