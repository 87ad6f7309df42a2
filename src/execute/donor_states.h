// States from whole sequences that were computed before.
#pragma once

#include <vector>

#include "execute/state_source.h"
#include "llmcache/execute/sequence_state.h"
#include "llmcache/match/plan.h"

namespace llmcache {

using Donors = std::vector<std::shared_ptr<const SequenceState>>;

/// Each sequence of a plan takes what it does not compute from its donor.
class DonorStates final : public StateSource {
 public:
  DonorStates(const TokenLevelModel& model, const Plan& plan, const Donors& donors)
      : model_(model), plan_(plan), donors_(donors), finished_(plan.sequences.size()) {}

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t site,
                               std::vector<at::Tensor> fresh) override;
  at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) override;
  void finished(std::size_t sequence, const at::Tensor& fresh) override { finished_[sequence] = fresh; }
  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override;

 private:
  [[nodiscard]] const SequenceState* donor_of(std::size_t sequence) const;

  const TokenLevelModel& model_;
  const Plan& plan_;
  const Donors& donors_;
  std::vector<at::Tensor> finished_;
};

}  // namespace llmcache
