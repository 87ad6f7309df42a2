#include "match/active_set.h"

#include <algorithm>

namespace llmcache {

ActiveSet choose_active(const TokenAlignment& alignment, const ActiveSetSettings& settings,
                        const std::vector<std::int64_t>& wanted) {
  const std::int64_t n = alignment.tokens;
  if (n == 0) return {};
  std::vector<char> core(static_cast<std::size_t>(n), 1);
  for (const AlignedBlock& block : alignment.blocks) {
    std::int64_t begin = block.begin;
    std::int64_t end = block.begin + block.tokens;
    if (begin > 0) begin += settings.neighbours;
    if (end < n) end -= settings.neighbours;
    for (std::int64_t t = begin; t < end; ++t) core[static_cast<std::size_t>(t)] = 0;
  }
  core.front() = core.back() = 1;
  for (const std::int64_t t : wanted) core.at(static_cast<std::size_t>(t)) = 1;

  std::vector<std::int64_t> others;
  for (std::int64_t t = 0; t < n; ++t) {
    if (!core[static_cast<std::size_t>(t)]) others.push_back(t);
  }
  ActiveSet set;
  const auto count = std::min<std::int64_t>(settings.samples, static_cast<std::int64_t>(others.size()));
  for (std::int64_t i = 0; i < count; ++i) {
    const auto t =
        others[static_cast<std::size_t>((2 * i + 1) * static_cast<std::int64_t>(others.size()) / (2 * count))];
    set.samples.push_back(t);
    core[static_cast<std::size_t>(t)] = 1;
  }
  for (std::int64_t t = 0; t < n; ++t) {
    if (core[static_cast<std::size_t>(t)]) set.active.push_back(t);
  }
  return set;
}

SequencePlan plan_active(std::int64_t row, std::int64_t first, std::int64_t tokens, std::int32_t layers,
                         const std::vector<std::int64_t>& active, std::int32_t widened) {
  SequencePlan plan{row, first, tokens, -1, {}};
  std::size_t next = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const bool runs = next < active.size() && active[next] == t;
    if (runs) ++next;
    const TokenRange range{t, t + 1, runs || widened >= layers ? 0 : widened, runs || widened < layers ? layers : 0, 0};
    auto* last = plan.ranges.empty() ? nullptr : &plan.ranges.back();
    if (last != nullptr && last->first_layer == range.first_layer && last->last_layer == range.last_layer) {
      last->end = range.end;
    } else {
      plan.ranges.push_back(range);
    }
  }
  return plan;
}

}  // namespace llmcache
