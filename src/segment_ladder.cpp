#include "segment_ladder.h"

#include <fmt/core.h>

#include <algorithm>

namespace llmcache {

struct SegmentLadder::Found final : Matches {
  std::vector<std::optional<SegmentMatch>> rows;
};

SegmentLadder::SegmentLadder(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                             const ModelProfile& profile, BankFormat format, std::size_t capacity_bytes,
                             MemoryAccount* total)
    : exact_prefixes_(format == BankFormat::kAsComputed),
      reuse_(model, inputs, output, profile, {.format = format}, capacity_bytes, total) {
  const bool selective = model.token_level()->self_contained();
  for (const double share : {0.0, 0.1, 0.2, 0.3, 0.5}) {
    if (share > 0 && !selective) continue;
    SegmentSettings one;
    one.recompute_share = share;
    settings_.push_back(one);
  }
}

std::string SegmentLadder::describe(std::size_t setting) const {
  const SegmentSettings& s = settings_[setting];
  return fmt::format("recompute {:g}, {} head tokens, means of {}", s.recompute_share, s.head_tokens,
                     SegmentOptions{}.most_averaged);
}

const std::vector<double>& SegmentLadder::limits() const {
  static const std::vector<double> limits = {0.25, 0.5, 1.0};
  return limits;
}

std::unique_ptr<ReuseLadder::Matches> SegmentLadder::find(const Batch& batch, const std::string& tenant,
                                                          std::size_t setting) {
  auto found = std::make_unique<Found>();
  found->rows = reuse_.find(batch, tenant, settings_[setting]);
  for (const auto& match : found->rows) {
    auto& distance = found->distance.emplace_back();
    // An exact prefix alone is no approximation, as long as it is held as it was computed.
    const bool approximate =
        match && std::any_of(match->segments.begin(), match->segments.end(),
                             [&](const SegmentHit& hit) { return !hit.exact || !exact_prefixes_; });
    if (approximate) distance = match->computed_fraction;
  }
  return found;
}

c10::IValue SegmentLadder::run_for(const Batch& batch, const Matches& matches, const std::vector<char>& reused,
                                   std::size_t setting, const std::string& tenant, Output output, KeptLater* kept,
                                   ForwardReport& report) {
  auto rows = static_cast<const Found&>(matches).rows;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (reused[i] || !rows[i]) continue;
    std::erase_if(rows[i]->segments, [&](const SegmentHit& hit) { return !hit.exact || !exact_prefixes_; });
    if (rows[i]->segments.empty()) rows[i].reset();
  }
  SegmentSettings chosen = settings_[setting];
  chosen.keep = kept != nullptr;
  KeptLater none;
  return reuse_.run(batch, tenant, std::move(rows), chosen, output, report, kept != nullptr ? *kept : none);
}

ReuseLadder::Counters SegmentLadder::counters() const {
  const auto c = reuse_.counters();
  return {c.entries, c.insertions, c.evictions, c.rejected, c.bytes, c.peak_bytes};
}

}  // namespace llmcache
