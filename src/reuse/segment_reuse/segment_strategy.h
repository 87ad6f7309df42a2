// Segment reuse in causal models, as a calibration chooses its settings.
#pragma once

#include "reuse/budget/tunable_strategy.h"
#include "reuse/segment_reuse/segment_reuse.h"

namespace llmcache {

/// Distance of a match: the part of its token-layers that is computed. Thread-safe.
class SegmentStrategy final : public TunableStrategy {
 public:
  /// Throws as SegmentReuse.
  SegmentStrategy(const WrappedModel& wrapped, BankFormat format, std::size_t capacity_bytes,
                  MemoryAccount* total = nullptr);

  std::string name() const override { return "segment reuse"; }
  std::size_t settings() const override { return settings_.size(); }
  std::string describe(std::size_t setting) const override;
  const std::vector<double>& match_thresholds() const override;
  double kept_from() const override { return 0.5; }
  std::int64_t least_tokens() const override { return SegmentSettings{}.least_segment; }
  std::unique_ptr<Matches> find(const Batch& batch, const std::string& tenant, std::size_t setting) override;
  c10::IValue run(const Run& run, ForwardReport& report) override;
  std::unique_ptr<TunableStrategy> fresh() const override;
  void clear() override { reuse_.clear(); }
  void each_bank(const BankVisitor& visit) override { reuse_.each_bank(visit); }
  std::unique_ptr<SnapshotPart> snapshot_part() override { return reuse_.snapshot_part(); }
  BankCounters counters() const override { return reuse_.counters(); }

 private:
  struct Found;
  /// An exact prefix alone is no approximation, as long as its states are held as they were computed.
  [[nodiscard]] bool approximates(const SegmentHit& hit) const noexcept {
    return !hit.exact || !reuse_.keeps_exactly();
  }

  const WrappedModel& wrapped_;
  const BankFormat format_;
  const std::size_t capacity_bytes_;
  std::vector<SegmentSettings> settings_;
  SegmentReuse reuse_;
};

}  // namespace llmcache
