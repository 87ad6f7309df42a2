// Which tokens of an aligned sequence are computed, and which of them show how far the cached states are off.
// Model-free.
#pragma once

#include <cstdint>
#include <vector>

#include "llmcache/match/plan.h"
#include "match/token_alignment.h"

namespace llmcache {

struct ActiveSetSettings {
  std::int64_t samples = 16;    ///< aligned tokens that are computed beside the core; 0: none
  std::int64_t neighbours = 1;  ///< aligned tokens computed on each side of a place where something changed
};

/// Tokens of one sequence, counted from its first real one.
struct ActiveSet {
  std::vector<std::int64_t> active;   ///< computed; ascending
  std::vector<std::int64_t> samples;  ///< of these, aligned and away from changes; ascending
};

/// The core: tokens that are not aligned, `neighbours` on each side of every end of a block (but for the sequence's
/// ends), the first and the last token, and `wanted` (ascending). Samples: spread evenly over the other tokens.
ActiveSet choose_active(const TokenAlignment& alignment, const ActiveSetSettings& settings,
                        const std::vector<std::int64_t>& wanted = {});

/// `active` tokens run through all layers, all others from layer `widened` on (`layers`: through none). Without a donor
/// number: the states come from elsewhere.
SequencePlan plan_active(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers,
                         const std::vector<std::int64_t>& active, std::int32_t widened);

}  // namespace llmcache
