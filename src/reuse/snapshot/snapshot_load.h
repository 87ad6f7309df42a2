// Loading a snapshot: all of the file is checked before anything of it becomes known.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "llmcache/snapshot.h"
#include "reuse/snapshot/snapshots.h"
#include "store/snapshot_entries.h"
#include "store/snapshot_file.h"

namespace llmcache {

/// A snapshot of another model. The text says what is other.
class ForeignSnapshot : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// One load. Throws DamagedData, UnreadableFile, LaterVersion and ForeignSnapshot in check(); nothing is taken then.
class SnapshotLoad {
 public:
  /// `parts` must outlive it.
  SnapshotLoad(SnapshotReader& reader, const SnapshotParts& parts, const ModelIdentity& own);

  /// Reads all of the file.
  void check();
  /// Makes known what there is room for, in the order of the file. `publish`: takes a step, or says that none may be
  /// taken any more.
  void take(const std::function<bool(const std::function<void()>& step)>& publish);
  [[nodiscard]] std::vector<SnapshotPartReport> reports() const;

 private:
  /// What the file holds of one bank.
  struct Line {
    SnapshotPart* part = nullptr;  ///< null: this cache takes none of it
    SnapshotPartReport report;
    std::string no_part;  ///< why
  };
  struct Entry {
    Line* line = nullptr;
    SnapshotFrame frame;
    std::size_t needs = 0;  ///< bytes in the bank
  };
  void check_header(const std::string& bytes);
  [[nodiscard]] SnapshotPart* part_of(FrameKind kind) const;
  static void leave(Line& line, const std::string& why);

  SnapshotReader& reader_;
  const SnapshotParts& parts_;
  const ModelIdentity& own_;
  std::map<FrameKind, Line> lines_;
  std::vector<FrameKind> order_;  ///< of the lines in the file
  std::vector<Entry> entries_;
};

}  // namespace llmcache
