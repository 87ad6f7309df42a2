// States from whole sequences that were computed before.
#pragma once

#include <memory>
#include <vector>

#include "execute/engine_hook.h"
#include "llmcache/execute/sequence_state.h"
#include "llmcache/match/plan.h"

namespace llmcache {

using Donors = std::vector<std::shared_ptr<const SequenceState>>;

/// Each sequence of a plan takes what it does not compute from its donor.
class DonorStates final : public EngineHook {
 public:
  explicit DonorStates(const Donors& donors) : donors_(donors) {}

  std::vector<KeySegment> keys(std::size_t sequence, std::int32_t layer, std::int64_t attention_op,
                               std::vector<at::Tensor> fresh) override;
  at::Tensor entering(std::size_t sequence, std::int32_t layer, std::int64_t begin, std::int64_t end) override;
  at::Tensor final_states(std::size_t sequence, std::int64_t begin, std::int64_t end) override;

 private:
  [[nodiscard]] const SequenceState* donor_of(std::size_t sequence) const;

  const Donors& donors_;
};

}  // namespace llmcache
