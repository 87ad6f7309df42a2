// The calibration in force in a snapshot, and token states that were kept under it.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "reuse/budget/risk_controller.h"
#include "reuse/snapshot/snapshot_part.h"

namespace llmcache {

/// Written in front of the token states: these are of use under the calibration only that they were kept under.
class CalibrationPart final : public SnapshotPart {
 public:
  explicit CalibrationPart(RiskController& controller) : controller_(controller) {}

  std::string name() const override { return "calibration"; }
  FrameKind kind() const override { return FrameKind::kCalibration; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return controller_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  std::string reason() const override { return why_; }

  /// True once the calibration of the file is the one in force.
  [[nodiscard]] bool in_force() const noexcept { return in_force_; }

 private:
  RiskController& controller_;
  bool in_force_ = false;
  std::string why_;
};

/// States that a calibration part stands in front of.
class CalibratedPart final : public SnapshotPart {
 public:
  /// `calibration` must outlive it.
  CalibratedPart(std::unique_ptr<SnapshotPart> states, const CalibrationPart& calibration)
      : states_(std::move(states)), calibration_(calibration) {}

  std::string name() const override { return states_->name(); }
  FrameKind kind() const override { return states_->kind(); }
  std::string layout() const override { return states_->layout(); }
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override { states_->save(writer, report); }
  std::size_t check(std::string_view entry) const override { return states_->check(entry); }
  std::size_t room() const override { return states_->room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override {
    return calibration_.in_force() ? states_->take(entry, report) : Outcome::kOther;
  }
  std::string reason() const override { return "the calibration that they were kept under is not in force"; }
  void finish() override { states_->finish(); }

 private:
  const std::unique_ptr<SnapshotPart> states_;
  const CalibrationPart& calibration_;
};

}  // namespace llmcache
