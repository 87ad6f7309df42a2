// What a snapshot holds of one bank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "llmcache/snapshot.h"
#include "store/snapshot_file.h"

namespace llmcache {

/// Made for one save or one load, and used by its thread; the bank goes on serving meanwhile. No lock of a bank is held
/// while a file is written or read. Must not outlive the bank.
class SnapshotPart {
 public:
  enum class Outcome {
    kTaken,
    kKnown,   ///< the bank has it
    kNoRoom,  ///< without evicting
    kOther,   ///< it is of no use here; reason() says why
  };

  virtual ~SnapshotPart() = default;

  /// As reports and the file name it. Of the frames with its entries.
  [[nodiscard]] virtual std::string name() const = 0;
  [[nodiscard]] virtual FrameKind kind() const = 0;
  /// What entries hold: they are taken only where it is the same.
  [[nodiscard]] virtual std::string layout() const = 0;

  /// Writes a frame for each entry, most valuable first. What goes meanwhile is left out.
  virtual void save(SnapshotWriter& writer, SnapshotPartReport& report) const = 0;

  /// Throws DamagedData unless this is an entry as save() writes it for this bank. Returns the bytes that it would take
  /// there.
  [[nodiscard]] virtual std::size_t check(std::string_view entry) const = 0;
  /// Bytes that the bank can take without evicting.
  [[nodiscard]] virtual std::size_t room() const = 0;
  /// Makes an entry known that check() has passed. Adds its tokens to the report.
  virtual Outcome take(std::string_view entry, SnapshotPartReport& report) = 0;
  [[nodiscard]] virtual std::string reason() const { return {}; }
  /// Everything was taken that will be: marks it as used, least valuable first.
  virtual void finish() {}
};

}  // namespace llmcache
