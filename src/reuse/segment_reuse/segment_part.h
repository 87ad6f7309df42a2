// States of sequences and passages of a causal model in a snapshot.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bank/segment_bank.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

/// Entries are written in the format in which they are held.
class SegmentPart final : public SnapshotPart {
 public:
  /// `order`: which tensors of the model the bank's are, as text. `device`: of the model. `now`: the clock of the
  /// bank's owner.
  SegmentPart(SegmentBank& bank, std::string order, at::Device device, std::function<double()> now)
      : bank_(bank), order_(std::move(order)), device_(device), now_(std::move(now)) {}

  std::string name() const override { return "segments"; }
  FrameKind kind() const override { return FrameKind::kSegment; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return bank_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  void finish() override;

 private:
  [[nodiscard]] std::vector<StoredStates> states_in(const SegmentRecord& record, at::Device device) const;

  SegmentBank& bank_;
  const std::string order_;
  const at::Device device_;
  const std::function<double()> now_;
  std::vector<std::weak_ptr<const SegmentEntry>> taken_;  ///< in order
};

}  // namespace llmcache
