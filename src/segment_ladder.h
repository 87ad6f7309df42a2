// Segment reuse in causal decoders, as a calibration chooses its settings.
#pragma once

#include "reuse_ladder.h"
#include "segment_reuse.h"

namespace llmcache {

/// Distance of a match: the part of its token-layers that is computed. Thread-safe.
class SegmentLadder final : public ReuseLadder {
 public:
  /// Throws as SegmentReuse.
  SegmentLadder(const Model& model, const InputSpec& inputs, const OutputSpec& output, const ModelProfile& profile,
                BankFormat format, std::size_t capacity_bytes, MemoryAccount* total = nullptr);

  std::string name() const override { return "segment reuse"; }
  std::size_t settings() const override { return settings_.size(); }
  std::string describe(std::size_t setting) const override;
  const std::vector<double>& limits() const override;
  double kept_from() const override { return 0.5; }
  std::unique_ptr<Matches> find(const Batch& batch, const std::string& tenant, std::size_t setting) override;
  c10::IValue run_for(const Batch& batch, const Matches& matches, const std::vector<char>& reused, std::size_t setting,
                      const std::string& tenant, Output output, KeptLater* kept, ForwardReport& report) override;
  void clear() override { reuse_.clear(); }
  Counters counters() const override;

 private:
  struct Found;
  const bool exact_prefixes_;  ///< an exact prefix is reused without loss
  std::vector<SegmentSettings> settings_;
  SegmentReuse reuse_;
};

}  // namespace llmcache
