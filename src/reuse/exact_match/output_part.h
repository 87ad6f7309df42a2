// Whole outputs in a snapshot.
#pragma once

#include <string>
#include <vector>

#include "bank/output_bank.h"
#include "model/wrapped_model.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

class OutputPart final : public SnapshotPart {
 public:
  OutputPart(const WrappedModel& wrapped, OutputBank& bank) : wrapped_(wrapped), bank_(bank) {}

  std::string name() const override { return "whole outputs"; }
  FrameKind kind() const override { return FrameKind::kOutput; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return bank_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  void finish() override;

  /// Appends the entry of a key to a text, as save() writes it. False if there is none, or none that files hold.
  bool append_entry_of(std::string& to, std::string_view key, bool exact) const;

 private:
  [[nodiscard]] bool forms_fit(std::string_view key, const std::vector<TensorRecord>& tensors) const;

  const WrappedModel& wrapped_;
  OutputBank& bank_;
  std::vector<std::string> taken_;  ///< keys, in order
};

}  // namespace llmcache
