#include "execute/donor_states.h"

#include <ATen/ATen.h>

namespace llmcache {
namespace {

/// A sequence's tokens along `dim`: active ones from `fresh` (in order), the others from `cached`.
at::Tensor merge(const SequencePlan& sequence, std::int32_t layer, const at::Tensor& fresh, const at::Tensor& cached,
                 std::int64_t dim) {
  std::vector<at::Tensor> pieces;
  std::int64_t used = 0;
  for (const TokenRange& range : sequence.ranges) {
    const std::int64_t n = range.end - range.begin;
    if (layer >= range.first_layer && layer < range.last_layer) {
      pieces.push_back(fresh.narrow(dim, used, n));
      used += n;
    } else {
      pieces.push_back(cached.narrow(dim, range.donor_begin, n));
    }
  }
  return pieces.size() == 1 ? pieces[0] : at::cat(pieces, dim);
}

bool all_active(const SequencePlan& sequence, std::int32_t layer) {
  for (const TokenRange& range : sequence.ranges) {
    if (layer < range.first_layer || layer >= range.last_layer) return false;
  }
  return true;
}

}  // namespace

const SequenceState* DonorStates::donor_of(std::size_t sequence) const {
  const auto donor = plan_->sequences[sequence].donor;
  return donor < 0 ? nullptr : donors_[static_cast<std::size_t>(donor)].get();
}

std::vector<KeySegment> DonorStates::keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                                          std::vector<at::Tensor> fresh) {
  const SequencePlan& plan = plan_->sequences[sequence];
  if (!all_active(plan, layer)) {
    const auto& cached =
        donor_of(sequence)->keys[static_cast<std::size_t>(layer)][static_cast<std::size_t>(attention_op)];
    const auto& dims = model_->key_dims(layer, attention_op);
    for (std::size_t i = 0; i < fresh.size(); ++i) fresh[i] = merge(plan, layer, fresh[i], cached[i], dims[i]);
  }
  return {{plan.tokens, std::move(fresh)}};
}

at::Tensor DonorStates::entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) {
  const auto& state = donor_of(sequence)->hidden[static_cast<std::size_t>(layer)];
  for (const TokenRange& range : plan_->sequences[sequence].ranges) {
    if (begin >= range.begin && end <= range.end) {
      return state.narrow(1, range.donor_begin + begin - range.begin, end - begin);
    }
  }
  return {};
}

at::Tensor DonorStates::final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) {
  const SequencePlan& plan = plan_->sequences[sequence];
  const auto* donor = donor_of(sequence);
  const at::Tensor cached = donor != nullptr ? donor->hidden.back() : at::Tensor();
  const auto all = merge(plan, plan_->layers - 1, finished_[sequence], cached, 1);
  return begin == 0 && end == plan.tokens ? all : all.narrow(1, begin, end - begin);
}

}  // namespace llmcache
