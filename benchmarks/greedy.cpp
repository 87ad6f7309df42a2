#include "greedy.h"

#include <ATen/ATen.h>

namespace llmcache::bench {

std::vector<std::int64_t> best_tokens(const at::Tensor& logits) {
  const at::Tensor best = logits.argmax(-1).to(at::kCPU, at::kLong).contiguous();
  return {best.data_ptr<std::int64_t>(), best.data_ptr<std::int64_t>() + best.numel()};
}

void GreedyCount::compare(std::int64_t sequence, std::int64_t first, const at::Tensor& reference,
                          const at::Tensor& logits) {
  const auto chosen = best_tokens(logits);
  const auto wanted = best_tokens(reference);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    if (chosen[i] == wanted.at(i)) {
      ++result_.compared;
    } else {
      compare(sequence, first + row, reference[row], chosen[i]);
    }
  }
}

bool GreedyCount::compare(std::int64_t sequence, std::int64_t token, const at::Tensor& reference, std::int64_t chosen) {
  ++result_.compared;
  const std::int64_t best = best_tokens(reference.unsqueeze(0)).front();
  if (chosen == best) return true;
  const double gap = (reference[best].to(at::kDouble) - reference[chosen].to(at::kDouble)).item<double>();
  ++result_.different;
  result_.tied += gap <= kTiedLogits ? 1 : 0;
  if (result_.differences.size() < GreedyResult::kListed) result_.differences.push_back({sequence, token, gap});
  return false;
}

}  // namespace llmcache::bench
