#include "reuse/budget/calibration_part.h"

#include <fmt/core.h>

#include "refresh/profile_file.h"
#include "refresh/profile_text.h"
#include "store/damaged_data.h"
#include "store/snapshot_entries.h"

namespace llmcache {

std::string CalibrationPart::layout() const { return fmt::format("profile version {}", kProfileVersion); }

void CalibrationPart::save(SnapshotWriter& writer, SnapshotPartReport& report) const {
  const auto profile = controller_.profile();
  if (!profile) return;
  const ProfileBytes files = profile_bytes(*profile);
  writer.frame(kind(), write_calibration({files.json, files.tensors}));
  ++report.entries;
}

std::size_t CalibrationPart::check(std::string_view entry) const {
  const CalibrationRecord record = read_calibration(entry);
  try {
    return profile_of(record.json, record.tensors).bytes;
  } catch (const std::runtime_error& error) {
    throw DamagedData(fmt::format("its calibration is damaged: {}", error.what()));
  }
}

SnapshotPart::Outcome CalibrationPart::take(std::string_view entry, SnapshotPartReport& /*report*/) {
  const CalibrationRecord record = read_calibration(entry);
  if (const auto now = controller_.profile()) {
    in_force_ = profile_bytes(*now).json == record.json;
    why_ = "another calibration is in force";
    return in_force_ ? Outcome::kKnown : Outcome::kOther;
  }
  try {
    controller_.use(profile_of(record.json, record.tensors));
  } catch (const std::exception& error) {
    why_ = error.what();
    return Outcome::kOther;
  }
  in_force_ = true;
  return Outcome::kTaken;
}

}  // namespace llmcache
