#include "store/snapshot_file.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>

#include "store/byte_io.h"
#include "store/damaged_data.h"
#include "store/open_file.h"

namespace llmcache {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSnapshotMark = "LLMCSNAP";
constexpr std::size_t kFileHeadBytes = 16;   // mark, version, 0
constexpr std::size_t kFrameHeadBytes = 24;  // kind, number, bytes, check of these
constexpr std::size_t kCheckBytes = 8;       // behind the bytes of a frame
constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

std::string last_failure() { return std::generic_category().message(errno); }

[[noreturn]] void unwritable(const std::string& what) { throw UnwritableFile(what + ": " + last_failure()); }

std::uint64_t check_of(const void* data, std::size_t bytes, std::uint64_t seed) {
  return XXH3_64bits_withSeed(data, bytes, seed);
}

/// True if the open file is the one that has this name.
bool is_named(const OpenFile& file, const fs::path& path) {
  struct stat held {};
  struct stat named {};
  return ::fstat(file.number(), &held) == 0 && ::stat(path.c_str(), &named) == 0 && held.st_dev == named.st_dev &&
         held.st_ino == named.st_ino;
}

class FileSource final : public ByteSource {
 public:
  explicit FileSource(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::not_found) throw UnreadableFile("there is no such file");
    if (error) throw UnreadableFile(error.message());
    if (status.type() != fs::file_type::regular) throw UnreadableFile("it is no regular file");
    file_.open(path, O_RDONLY);
    struct stat found {};
    if (!file_ || ::fstat(file_.number(), &found) != 0) throw UnreadableFile(last_failure());
    size_ = static_cast<std::uint64_t>(found.st_size);
  }
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, char* to, std::size_t bytes) const override {
    while (bytes > 0) {
      const auto got = ::pread(file_.number(), to, bytes, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw UnreadableFile(last_failure());
      if (got == 0) throw UnreadableFile("it was cut off while it was read");
      offset += static_cast<std::uint64_t>(got);
      to += got;
      bytes -= static_cast<std::size_t>(got);
    }
  }

 private:
  OpenFile file_;
  std::uint64_t size_ = 0;
};

class TextSource final : public ByteSource {
 public:
  explicit TextSource(std::string_view text) : text_(text) {}
  std::uint64_t size() const override { return text_.size(); }
  void read(std::uint64_t offset, char* to, std::size_t bytes) const override {
    if (bytes > 0) std::memcpy(to, text_.data() + offset, bytes);
  }

 private:
  std::string_view text_;
};

}  // namespace

std::unique_ptr<ByteSource> open_file(const fs::path& path) { return std::make_unique<FileSource>(path); }
std::unique_ptr<ByteSource> open_text(std::string_view text) { return std::make_unique<TextSource>(text); }

// --- writing --------------------------------------------------------------------------------------------

struct SnapshotWriter::File {
  fs::path path;
  fs::path beside;  ///< where it is written
  OpenFile file;
  XXH3_state_t* check = XXH3_createState();  ///< of the frame that was begun

  explicit File(const fs::path& to) : path(to), beside(to.string() + ".part") {
    if (check == nullptr) throw std::bad_alloc();
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { XXH3_freeState(check); }

  /// The file beside belongs to whoever holds its lock while it has that name. What a process left there that was
  /// killed is written over.
  void claim() {
    file.open(beside, O_RDWR | O_CREAT);
    if (!file) unwritable(fmt::format("'{}' cannot be opened", beside.string()));
    if (::flock(file.number(), LOCK_EX | LOCK_NB) != 0 || !is_named(file, beside)) {
      file.close();
      throw UnwritableFile("another snapshot is being written to the same file");
    }
    if (::ftruncate(file.number(), 0) != 0) unwritable(fmt::format("'{}' cannot be written", beside.string()));
  }
  void write(std::string_view bytes) const {
    while (!bytes.empty()) {
      const auto done = ::write(file.number(), bytes.data(), bytes.size());
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) unwritable("it cannot be written");
      bytes.remove_prefix(static_cast<std::size_t>(done));
    }
  }
  /// Waits until the name of the file is on the disk too.
  void sync_folder() const {
    const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
    OpenFile opened;
    opened.open(folder, O_RDONLY | O_DIRECTORY);
    if (opened) ::fsync(opened.number());
  }
};

SnapshotWriter::SnapshotWriter(const fs::path& path) : file_(std::make_unique<File>(path)) {
  file_->claim();
  buffer_.reserve(kBufferBytes);
  ByteWriter head;
  head.number(kSnapshotVersion);
  head.number<std::uint32_t>(0);
  const std::string bytes = std::string(kSnapshotMark) + head.bytes();
  chain_ = check_of(bytes.data(), bytes.size(), 0);
  put(bytes.data(), bytes.size());
}

SnapshotWriter::~SnapshotWriter() {
  if (!file_ || !file_->file) return;
  std::error_code ignored;
  fs::remove(file_->beside, ignored);
}

void SnapshotWriter::put(const void* data, std::size_t bytes) {
  written_ += bytes;
  if (buffer_.size() + bytes > kBufferBytes) {
    file_->write(buffer_);
    buffer_.clear();
  }
  const std::string_view given(static_cast<const char*>(data), bytes);
  if (bytes > kBufferBytes) {
    file_->write(given);
  } else {
    buffer_ += given;
  }
}

void SnapshotWriter::begin(FrameKind kind, std::uint64_t bytes) {
  ByteWriter head;
  head.number(static_cast<std::uint32_t>(kind));
  head.number(frames_++);
  head.number(bytes);
  chain_ = check_of(head.bytes().data(), head.bytes().size(), chain_);
  head.number(chain_);
  put(head.bytes().data(), head.bytes().size());
  XXH3_64bits_reset_withSeed(file_->check, chain_);
  left_ = bytes;
}

void SnapshotWriter::add(const void* data, std::size_t bytes) {
  if (bytes > left_) throw std::logic_error("more bytes than the frame was begun with");
  left_ -= bytes;
  XXH3_64bits_update(file_->check, data, bytes);
  put(data, bytes);
}

void SnapshotWriter::end() {
  if (left_ > 0) throw std::logic_error("fewer bytes than the frame was begun with");
  chain_ = XXH3_64bits_digest(file_->check);
  put(&chain_, sizeof(chain_));
}

void SnapshotWriter::frame(FrameKind kind, std::string_view bytes) {
  begin(kind, bytes.size());
  add(bytes);
  end();
}

void SnapshotWriter::commit() {
  frame(FrameKind::kEnd, {});
  file_->write(buffer_);
  if (::fsync(file_->file.number()) != 0) unwritable("it cannot be brought to the disk");
  std::error_code error;
  fs::rename(file_->beside, file_->path, error);
  if (error)
    throw UnwritableFile(fmt::format("'{}' cannot be put in its place: {}", file_->beside.string(), error.message()));
  file_->file.close();
  file_->sync_folder();
}

// --- reading --------------------------------------------------------------------------------------------

SnapshotReader::SnapshotReader(std::unique_ptr<ByteSource> source) : source_(std::move(source)) {
  std::array<char, kFileHeadBytes> head{};
  if (source_->size() < head.size()) throw DamagedData("it is shorter than the beginning of a snapshot");
  source_->read(0, head.data(), head.size());
  const std::string_view bytes(head.data(), head.size());
  if (!bytes.starts_with(kSnapshotMark)) throw DamagedData("it does not begin as a snapshot does");
  ByteReader reader(bytes.substr(kSnapshotMark.size()));
  const auto version = reader.number<std::uint32_t>();
  if (version > kSnapshotVersion) {
    throw LaterVersion(fmt::format("it has version {} of the format, and this library reads up to version {}", version,
                                   kSnapshotVersion));
  }
  if (version == 0 || reader.number<std::uint32_t>() != 0) throw DamagedData("its first bytes were changed");
  chain_ = check_of(head.data(), head.size(), 0);
  at_ = head.size();
}

bool SnapshotReader::next(SnapshotFrame& frame, std::string& bytes) {
  std::array<char, kFrameHeadBytes> head{};
  if (source_->size() - at_ < head.size() + kCheckBytes) throw DamagedData("it was cut off");
  source_->read(at_, head.data(), head.size());
  ByteReader reader({head.data(), head.size()});
  frame.kind = static_cast<FrameKind>(reader.number<std::uint32_t>());
  const auto number = reader.number<std::uint32_t>();
  frame.bytes = reader.number<std::uint64_t>();
  frame.seed = reader.number<std::uint64_t>();
  if (frame.seed != check_of(head.data(), head.size() - kCheckBytes, chain_) || number != frames_) {
    throw DamagedData("its content was changed");
  }
  frame.offset = at_ + head.size();
  if (frame.bytes > source_->size() - frame.offset - kCheckBytes) throw DamagedData("it was cut off");
  source_->read(frame.offset + frame.bytes, reinterpret_cast<char*>(&frame.check), kCheckBytes);
  read(frame, bytes);
  at_ = frame.offset + frame.bytes + kCheckBytes;
  chain_ = frame.check;
  ++frames_;
  if (frame.kind != FrameKind::kEnd) return true;
  if (frame.bytes != 0 || at_ != source_->size()) throw DamagedData("it goes on behind its end");
  return false;
}

void SnapshotReader::read(const SnapshotFrame& frame, std::string& bytes) const {
  try {
    bytes.resize(frame.bytes);
  } catch (const std::bad_alloc&) {
    throw UnreadableFile(fmt::format("there is no memory for {} of its bytes", frame.bytes));
  }
  source_->read(frame.offset, bytes.data(), bytes.size());
  if (check_of(bytes.data(), bytes.size(), frame.seed) != frame.check) throw DamagedData("its content was changed");
}

}  // namespace llmcache
