#include "reuse/snapshot/snapshot_load.h"

#include <fmt/core.h>

#include "store/damaged_data.h"

namespace llmcache {

SnapshotLoad::SnapshotLoad(SnapshotReader& reader, const SnapshotParts& parts, const ModelIdentity& own)
    : reader_(reader), parts_(parts), own_(own) {}

SnapshotPart* SnapshotLoad::part_of(FrameKind kind) const {
  for (const auto& part : parts_) {
    if (part->kind() == kind) return part.get();
  }
  return nullptr;
}

void SnapshotLoad::leave(Line& line, const std::string& why) {
  if (line.report.left++ == 0) line.report.why = why;
}

/// Which model the file is of, and which of its parts this cache has too.
void SnapshotLoad::check_header(const std::string& bytes) {
  const SnapshotHeader header = read_header(bytes);
  if (const auto other = identity_difference(header.identity, own_); !other.empty()) {
    throw ForeignSnapshot("it holds states of another model: " + other);
  }
  for (const SnapshotHeader::Part& part : header.parts) {
    const auto [place, added] = lines_.try_emplace(static_cast<FrameKind>(part.kind));
    if (!added) throw DamagedData("its header names two parts of one kind");
    order_.push_back(place->first);
    Line& line = place->second;
    line.report.name = part.name;
    line.part = part_of(place->first);
    if (line.part == nullptr) {
      line.no_part = "this cache keeps nothing of the kind";
    } else if (line.part->layout() != part.layout) {
      line.part = nullptr;
      line.no_part = "this cache keeps them in another form";
    }
  }
}

void SnapshotLoad::check() {
  SnapshotFrame frame;
  std::string bytes;
  if (!reader_.next(frame, bytes) || frame.kind != FrameKind::kHeader) throw DamagedData("it has no header");
  check_header(bytes);
  while (reader_.next(frame, bytes)) {
    const auto line = lines_.find(frame.kind);
    if (line == lines_.end()) throw DamagedData("it has an entry of a kind that its header does not name");
    if (line->second.part == nullptr) {
      leave(line->second, line->second.no_part);
      continue;
    }
    entries_.push_back({&line->second, frame, line->second.part->check(bytes)});
  }
}

void SnapshotLoad::take(const std::function<bool(const std::function<void()>& step)>& publish) {
  std::string bytes;
  std::string stopped;
  for (const Entry& entry : entries_) {
    Line& line = *entry.line;
    if (!stopped.empty() || entry.needs > line.part->room()) {
      leave(line, stopped.empty() ? "there is no room for more" : stopped);
      continue;
    }
    auto outcome = SnapshotPart::Outcome::kOther;
    try {
      reader_.read(entry.frame, bytes);
      const bool current = publish([&] { outcome = line.part->take(bytes, line.report); });
      if (!current) stopped = "the cache was cleared, a tenant erased, or its weights changed, meanwhile";
    } catch (const std::exception& error) {
      stopped = fmt::format("reading was broken off: {}", error.what());
    }
    if (!stopped.empty()) {
      leave(line, stopped);
    } else if (outcome == SnapshotPart::Outcome::kTaken) {
      ++line.report.entries;
    } else {
      leave(line, outcome == SnapshotPart::Outcome::kKnown    ? "the cache has them already"
                  : outcome == SnapshotPart::Outcome::kNoRoom ? "there is no room for more"
                                                              : line.part->reason());
    }
  }
  for (const auto& part : parts_) part->finish();
}

std::vector<SnapshotPartReport> SnapshotLoad::reports() const {
  std::vector<SnapshotPartReport> all;
  for (const FrameKind kind : order_) all.push_back(lines_.at(kind).report);
  return all;
}

}  // namespace llmcache
