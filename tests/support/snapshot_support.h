// Snapshots whose frames were changed and have right checks all the same.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "store/snapshot_file.h"

namespace llmcache::test {

/// The frames of a file changed and written again.
inline void rewrite(const std::filesystem::path& path, const std::function<void(FrameKind, std::string&)>& change) {
  std::vector<std::pair<FrameKind, std::string>> frames;
  SnapshotReader reader(open_file(path));
  SnapshotFrame frame;
  std::string bytes;
  while (reader.next(frame, bytes)) {
    change(frame.kind, bytes);
    frames.emplace_back(frame.kind, bytes);
  }
  SnapshotWriter writer(path);
  for (const auto& [kind, content] : frames) writer.frame(kind, content);
  writer.commit();
}

/// Frames of one kind with a number at its limits in place of the eight bytes from `at` on, as far as they have any.
inline void forge(const std::filesystem::path& path, FrameKind kind, std::size_t at, std::uint64_t value) {
  rewrite(path, [&](FrameKind found, std::string& bytes) {
    if (found == kind && at + sizeof(value) <= bytes.size()) std::memcpy(bytes.data() + at, &value, sizeof(value));
  });
}

}  // namespace llmcache::test
