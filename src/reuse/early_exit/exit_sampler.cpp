#include "reuse/early_exit/exit_sampler.h"

#include <ATen/ATen.h>
#include <fmt/core.h>
#include <xxhash.h>

#include "execute/engine.h"
#include "execute/engine_hook.h"
#include "execute/run_model.h"
#include "llmcache/error.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

constexpr std::int64_t kAlone = 24;  // sequences that are timed alone

/// Of all that decides a sequence's output.
std::pair<std::uint64_t, std::uint64_t> hash_of(const Batch& batch, std::int64_t row) {
  const std::string key = batch.whole_key(row, "", false);
  const XXH128_hash_t hash = XXH3_128bits(key.data(), key.size());
  return {hash.high64, hash.low64};
}

/// Collects the mean states of sequences that run in full.
class Recorder final : public EngineHook {
 public:
  explicit Recorder(std::size_t layers) : means_(layers) {}

  bool watches(std::int32_t l) const override { return static_cast<std::size_t>(l) < means_.size(); }
  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override {
    means_[static_cast<std::size_t>(l)] = means_of(states);
    return {};
  }
  const at::Tensor& means(std::size_t layer) const { return means_[layer]; }

 private:
  std::vector<at::Tensor> means_;
};

}  // namespace

at::Tensor means_of(const std::vector<at::Tensor>& states) {
  std::vector<at::Tensor> means;
  for (const at::Tensor& state : states) means.push_back(state.mean(1, false, at::kFloat));
  return at::cat(means);
}

ExitSampler::ExitSampler(const Model& model)
    : model_(model),
      states_(static_cast<std::size_t>(model.layers())),
      together_ms_(states_.size()),
      alone_ms_(states_.size()) {}

/// Identical requests are answered without any error: they are no evidence.
std::vector<std::int64_t> ExitSampler::fresh_rows(const Batch& batch) {
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    if (batch.spans[static_cast<std::size_t>(row)].tokens > 0 && seen_.insert(hash_of(batch, row)).second) {
      rows.push_back(row);
    }
  }
  return rows;
}

void ExitSampler::add(const Batch& batch) {
  const auto rows = fresh_rows(batch);
  if (rows.empty()) return;
  const auto layers = static_cast<std::int32_t>(model_.layers());
  const auto pass = [&](const Batch& part, Recorder* recorder, std::vector<double>& layer_ms) {
    ForwardReport report;
    auto result =
        run_model([&] { return execute_packed(model_, part, part.full_plan(layers), {}, nullptr, report, recorder); });
    for (std::size_t l = 0; l < layer_ms.size(); ++l) layer_ms[l] += report.layer_ms[l];
    return result;
  };
  const Batch part = batch.select(rows);
  Recorder recorder(states_.size());
  const auto result = pass(part, &recorder, together_ms_);
  ran_ += part.rows;
  if (alone_ < kAlone) {
    pass(batch.select({rows[static_cast<std::size_t>(alone_) % rows.size()]}), nullptr, alone_ms_);
    ++alone_;
  }
  const auto pooled = tensors_of(result).at(0).to(at::kFloat);
  if (pooled.dim() != 2) {
    throw Error(ErrorCode::kNotAvailable,
                fmt::format("the model's output has {} dimensions; [batch, values] is expected", pooled.dim()));
  }
  auto finite = pooled.isfinite().all(1);
  for (std::size_t l = 0; l < states_.size(); ++l) finite = finite.logical_and(recorder.means(l).isfinite().all(1));
  const auto usable = finite.nonzero().squeeze(1);
  const auto numbers = usable.cpu();
  for (std::int64_t i = 0; i < numbers.numel(); ++i) {
    tokens_.push_back(part.spans[static_cast<std::size_t>(numbers.const_data_ptr<std::int64_t>()[i])].tokens);
  }
  const auto keep = [&](std::vector<at::Tensor>& list, const at::Tensor& all) {
    list.push_back(all.index_select(0, usable));
    bytes_ += list.back().nbytes();
  };
  keep(outputs_, pooled);
  for (std::size_t l = 0; l < states_.size(); ++l) keep(states_[l], recorder.means(l));
}

std::shared_ptr<const ExitSample> ExitSampler::finish() {
  auto all = std::make_shared<ExitSample>();
  all->outputs = at::cat(outputs_);
  all->tokens = tokens_;
  const auto passes = static_cast<double>(outputs_.size());
  all->batch_rows = static_cast<double>(ran_) / passes;
  for (std::size_t l = 0; l < states_.size(); ++l) {
    all->layer_times.push_back(
        PartTime::from(alone_ms_[l] / static_cast<double>(alone_), together_ms_[l] / passes, all->batch_rows));
    all->states.push_back(at::cat(states_[l]));
    states_[l].clear();
  }
  return all;
}

}  // namespace llmcache
