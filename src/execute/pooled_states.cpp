#include "execute/pooled_states.h"

#include <ATen/ATen.h>

#include <numeric>

#include "execute/engine.h"
#include "execute/engine_hook.h"

namespace llmcache {
namespace {

/// Copies the states at one layer and ends the pass there.
class PoolAndStop final : public EngineHook {
 public:
  PoolAndStop(const Plan& plan, std::int32_t layer) : layer_(layer), means_(plan.sequences.size()) {}
  bool watches(std::int32_t l) const override { return l == layer_; }
  std::vector<std::size_t> at_layer(std::int32_t /*l*/, const std::vector<at::Tensor>& states) override {
    std::vector<std::size_t> all(states.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    for (const std::size_t i : all) means_[i] = mean_state(states[i]);
    return all;
  }
  const std::vector<std::vector<float>>& means() const { return means_; }

 private:
  std::int32_t layer_;
  std::vector<std::vector<float>> means_;
};

}  // namespace

std::vector<float> mean_state(const at::Tensor& hidden) {
  const auto mean = hidden.to(at::kFloat).mean(1).flatten().cpu().contiguous();
  return {mean.const_data_ptr<float>(), mean.const_data_ptr<float>() + mean.numel()};
}

std::vector<std::vector<float>> pooled_states(const Model& model, const Batch& batch, std::int32_t layer) {
  std::vector<std::vector<float>> means(static_cast<std::size_t>(batch.rows));
  const Plan plan = batch.full_plan(static_cast<std::int32_t>(model.layers()));
  if (plan.sequences.empty()) return means;
  PoolAndStop observer(plan, layer);
  ForwardReport report;
  execute_packed(model, batch, plan, {}, nullptr, report, &observer);
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    means[static_cast<std::size_t>(plan.sequences[i].row)] = observer.means()[i];
  }
  return means;
}

}  // namespace llmcache
