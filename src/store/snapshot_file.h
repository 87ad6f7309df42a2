// Files of snapshots: frames with a checksum each, chained, and replaced whole. What the frames hold is in
// snapshot_entries.h, every byte of both in docs/snapshot-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

namespace llmcache {

inline constexpr std::uint32_t kSnapshotVersion = 1;

/// What a frame holds.
enum class FrameKind : std::uint32_t {
  kHeader = 1,
  kOutput = 2,
  kPrefix = 3,
  kTokenStates = 4,
  kCalibration = 5,
  kSource = 6,
  kSegment = 7,
  kCentres = 8,
  kLayerState = 9,
  kEnd = 0xffffffff,  ///< the last one
};

/// Writes a snapshot beside the place where it belongs, and puts it there in one step. Whoever opens that file sees the
/// one before or the new one, whatever happens meanwhile to the process or the machine.
///
/// Throws UnwritableFile. One thread at a time; of several writers to one path, in whatever processes, one succeeds and
/// the others throw while it is at work.
class SnapshotWriter {
 public:
  explicit SnapshotWriter(const std::filesystem::path& path);
  /// Without commit() nothing has happened to the file.
  ~SnapshotWriter();
  SnapshotWriter(const SnapshotWriter&) = delete;
  SnapshotWriter& operator=(const SnapshotWriter&) = delete;

  /// A frame of `bytes` bytes, which are given by add(), in parts, and ended by end().
  void begin(FrameKind kind, std::uint64_t bytes);
  void add(const void* data, std::size_t bytes);
  void add(std::string_view data) { add(data.data(), data.size()); }
  void end();
  /// The three of them.
  void frame(FrameKind kind, std::string_view bytes);

  [[nodiscard]] std::uint64_t bytes() const noexcept { return written_; }
  /// Writes the last frame, waits until all of it is on the disk, and puts the file in place.
  void commit();

 private:
  struct File;
  void put(const void* data, std::size_t bytes);

  std::unique_ptr<File> file_;
  std::string buffer_;
  std::uint64_t written_ = 0;
  std::uint64_t chain_ = 0;  ///< check of what is written, up to the last frame
  std::uint64_t left_ = 0;   ///< of the frame that was begun
  std::uint32_t frames_ = 0;
};

/// Bytes to be read at any place.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  [[nodiscard]] virtual std::uint64_t size() const = 0;
  /// `offset + bytes` is at most size(). Throws UnreadableFile.
  virtual void read(std::uint64_t offset, char* to, std::size_t bytes) const = 0;
};

/// A regular file, held open: what is put in its place meanwhile is not seen. Throws UnreadableFile.
std::unique_ptr<ByteSource> open_file(const std::filesystem::path& path);
/// A text, which must live as long.
std::unique_ptr<ByteSource> open_text(std::string_view text);

/// A frame whose checks were right.
struct SnapshotFrame {
  FrameKind kind = FrameKind::kEnd;
  std::uint64_t offset = 0;  ///< of its bytes
  std::uint64_t bytes = 0;
  std::uint64_t seed = 0;  ///< of its check
  std::uint64_t check = 0;
};

/// A file that a later version of the library wrote. The text says so.
class LaterVersion : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Reads a snapshot frame by frame. Never allocates more for a frame than the source still holds. Throws DamagedData,
/// UnreadableFile; LaterVersion in the constructor. One thread at a time.
class SnapshotReader {
 public:
  explicit SnapshotReader(std::unique_ptr<ByteSource> source);

  /// The next frame, and its bytes. False behind the last one; then the file is whole.
  bool next(SnapshotFrame& frame, std::string& bytes);
  /// The bytes of a frame that next() gave; checked again.
  void read(const SnapshotFrame& frame, std::string& bytes) const;
  [[nodiscard]] std::uint64_t size() const { return source_->size(); }

 private:
  const std::unique_ptr<ByteSource> source_;
  std::uint64_t at_ = 0;
  std::uint64_t chain_ = 0;
  std::uint32_t frames_ = 0;
};

}  // namespace llmcache
