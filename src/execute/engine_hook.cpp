#include "execute/engine_hook.h"

#include <ATen/ATen.h>

namespace llmcache {

void EngineHook::begin(const TokenLevelModel& model, const Plan& plan) {
  model_ = &model;
  plan_ = &plan;
  finished_.resize(plan.sequences.size());
}

std::vector<KeySegment> EngineHook::keys(std::size_t sequence, std::int32_t /*layer*/, std::int64_t /*attention_op*/,
                                         std::vector<at::Tensor> fresh) {
  return {{plan_->sequences[sequence].tokens, std::move(fresh)}};
}

void EngineHook::finished(std::size_t sequence, const at::Tensor& fresh) { finished_[sequence] = fresh; }

at::Tensor EngineHook::final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) {
  return finished_[sequence].narrow(1, begin, end - begin);
}

}  // namespace llmcache
