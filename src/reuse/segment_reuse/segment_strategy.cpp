#include "reuse/segment_reuse/segment_strategy.h"

#include <fmt/core.h>

#include <algorithm>

namespace llmcache {

struct SegmentStrategy::Found final : Matches {
  std::vector<std::optional<SegmentMatch>> rows;
};

SegmentStrategy::SegmentStrategy(const WrappedModel& wrapped, BankFormat format, std::size_t capacity_bytes,
                                 MemoryAccount* total)
    : wrapped_(wrapped),
      format_(format),
      capacity_bytes_(capacity_bytes),
      reuse_(wrapped, {.format = format}, capacity_bytes, total) {
  const bool selective = wrapped.token_level().self_contained();
  for (const double share : {0.0, 0.1, 0.2, 0.3, 0.5}) {
    if (share > 0 && !selective) continue;
    SegmentSettings one;
    one.recompute_share = share;
    settings_.push_back(one);
  }
}

std::unique_ptr<TunableStrategy> SegmentStrategy::fresh() const {
  return std::make_unique<SegmentStrategy>(wrapped_, format_, capacity_bytes_);
}

std::string SegmentStrategy::describe(std::size_t setting) const {
  const SegmentSettings& s = settings_[setting];
  return fmt::format("recompute {:g}, {} head tokens, means of {}", s.recompute_share, s.head_tokens,
                     SegmentOptions{}.most_averaged);
}

const std::vector<double>& SegmentStrategy::match_thresholds() const {
  static const std::vector<double> thresholds = {0.25, 0.5, 1.0};
  return thresholds;
}

std::unique_ptr<TunableStrategy::Matches> SegmentStrategy::find(const Batch& batch, const std::string& tenant,
                                                                std::size_t setting) {
  auto found = std::make_unique<Found>();
  found->rows = reuse_.find(batch, tenant, settings_[setting]);
  for (const auto& match : found->rows) {
    auto& distance = found->distance.emplace_back();
    if (match && std::ranges::any_of(match->segments, [&](const SegmentHit& hit) { return approximates(hit); }))
      distance = match->computed_fraction;
  }
  return found;
}

c10::IValue SegmentStrategy::run(const Run& run, ForwardReport& report) {
  auto rows = static_cast<const Found&>(run.matches).rows;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (run.reused[i] || !rows[i]) continue;
    std::erase_if(rows[i]->segments, [&](const SegmentHit& hit) { return approximates(hit); });
    if (rows[i]->segments.empty()) rows[i].reset();
  }
  SegmentSettings chosen = settings_[run.setting];
  chosen.keep = run.writes != nullptr;
  DeferredWrites none;
  return reuse_.run(run.batch, run.tenant, std::move(rows), chosen, run.output, report,
                    run.writes != nullptr ? *run.writes : none);
}

}  // namespace llmcache
