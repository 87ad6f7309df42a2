// Files of snapshots: whatever was changed, cut off or forged in one is found; whatever happens while one is written,
// the one before or the new one is there.
#include "store/snapshot_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fuzz/check.h"
#include "reader_support.h"
#include "store/byte_io.h"
#include "store/snapshot_entries.h"

namespace llmcache {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

struct Frame {
  FrameKind kind = FrameKind::kEnd;
  std::string bytes;
};

SnapshotHeader sample_header() {
  SnapshotHeader header{"0.1.0", {}, {{"prefixes", static_cast<std::uint32_t>(FrameKind::kPrefix), "one layer"}}};
  header.identity = {"contents", "as-loaded", "sdpa", "cpu", "2.13.0", kStateLayout};
  return header;
}

std::vector<Frame> sample_frames() {
  const std::string numbers(24, '\x3f');
  const std::vector<TensorRecord> tensors = {{NumberType::kFloat32, {1, 2, 3}, {}}};
  const std::vector<TensorRecord> layer_tensors = {tensors[0], {NumberType::kInt64, {2}, {}}};
  const std::string ids(16, '\x01');
  const OutputRecord output{"key of a row", true, 1, 2, tensors};
  const PrefixRecord prefix{"tenant", 2, 1, {1, 1, 2, 1, 3, 1}, 1, 2, 0.5F, tensors};
  const TokenRecord states{"tenant", 1, {5, 6, 7}, {1, 1, 4}, 2.5, {0}, tensors};
  return {{FrameKind::kHeader, write_header(sample_header())},
          {FrameKind::kOutput, write_output(output) + numbers},
          {FrameKind::kPrefix, write_prefix(prefix) + numbers},
          {FrameKind::kTokenStates, write_token_states(states) + numbers},
          {FrameKind::kCalibration, write_calibration({"{}", "tensors"})},
          {FrameKind::kSource, write_output({"key of a source", false, 1, 3, tensors}) + numbers},
          {FrameKind::kSegment, write_segment({"tenant", 1, {5, 6, 7}, 40, 3, 0.5, tensors}) + numbers},
          {FrameKind::kCentres, write_centres({{{20, {1.5, -2}, {0.5F, 1}}, {3, {2, 1}, {}}}})},
          {FrameKind::kLayerState,
           write_layer_state({2, "tenant", {0.5F, 2}, {1, 0}, 1, 0.25, 3.5, layer_tensors}) + numbers + ids}};
}

void write_snapshot(const fs::path& path, const std::vector<Frame>& frames) {
  SnapshotWriter writer(path);
  for (const Frame& frame : frames) writer.frame(frame.kind, frame.bytes);
  writer.commit();
}

/// All frames but the last one, each parsed too.
std::vector<Frame> read_all(std::unique_ptr<ByteSource> source) {
  SnapshotReader reader(std::move(source));
  std::vector<Frame> frames;
  SnapshotFrame frame;
  std::string bytes;
  while (reader.next(frame, bytes)) frames.push_back({frame.kind, bytes});
  return frames;
}

/// Why a snapshot of these bytes is refused; empty: it is not.
std::string refusal_of_bytes(const std::string& bytes) {
  try {
    read_all(open_text(bytes));
  } catch (const LaterVersion& error) {
    return error.what();
  } catch (const DamagedData& error) {
    return error.what();
  }
  return "";
}

class SnapshotFile : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("llmcache-snapshot-" + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  [[nodiscard]] fs::path path() const { return folder_ / "cache.snapshot"; }
  [[nodiscard]] std::string sample() const {
    write_snapshot(path(), sample_frames());
    return bytes_of(path());
  }

 private:
  fs::path folder_;
};

TEST_F(SnapshotFile, HoldsWhatWasWritten) {
  write_snapshot(path(), sample_frames());
  const auto frames = read_all(open_file(path()));
  const auto wanted = sample_frames();
  ASSERT_EQ(frames.size(), wanted.size());
  for (std::size_t i = 0; i < frames.size(); ++i) {
    EXPECT_EQ(frames[i].kind, wanted[i].kind);
    EXPECT_EQ(frames[i].bytes, wanted[i].bytes);
  }
  EXPECT_EQ(read_header(frames[0].bytes).identity, sample_header().identity);
  const PrefixRecord prefix = read_prefix(frames[2].bytes);
  EXPECT_EQ(prefix.partition, "tenant");
  EXPECT_THAT(prefix.tokens, ElementsAre(1, 1, 2, 1, 3, 1));
  EXPECT_EQ(prefix.end(), 3);
  EXPECT_THAT(prefix.tensors[0].sizes, ElementsAre(1, 2, 3));
  const TokenRecord states = read_token_states(frames[3].bytes);
  EXPECT_THAT(states.counts, ElementsAre(1, 1, 4));
  EXPECT_EQ(read_output(frames[1].bytes).key, "key of a row");
  const SegmentRecord segment = read_segment(frames[6].bytes);
  EXPECT_EQ(segment.position, 40);
  EXPECT_EQ(segment.averaged, 3);
  EXPECT_THAT(segment.tokens, ElementsAre(5, 6, 7));
  const CentresRecord centres = read_centres(frames[7].bytes);
  ASSERT_EQ(centres.centres.size(), 2U);
  EXPECT_EQ(centres.centres[0].observations, 20U);
  EXPECT_THAT(centres.centres[0].sums, ElementsAre(1.5, -2));
  EXPECT_THAT(centres.centres[0].centre, ElementsAre(0.5F, 1));
  EXPECT_TRUE(centres.centres[1].centre.empty());
  const LayerRecord layer = read_layer_state(frames[8].bytes);
  EXPECT_EQ(layer.layer, 2U);
  EXPECT_EQ(layer.audits, 1U);
  EXPECT_THAT(layer.states, ElementsAre(0.5F, 2));
  EXPECT_EQ(layer.tensors.size(), 2U);
}

TEST_F(SnapshotFile, EntriesThatCannotBeAreRefused) {
  const std::vector<TensorRecord> none;
  const auto segment = [&](std::int64_t position, std::uint16_t averaged) {
    return refusal([&] { return read_segment(write_segment({"", 1, {5}, position, averaged, 0, none})); });
  };
  EXPECT_EQ(segment(0, 1), "");
  EXPECT_THAT(segment(0, 0), HasSubstr("the mean over nothing"));
  EXPECT_THAT(segment(-1, 2), HasSubstr("impossible place"));
  EXPECT_THAT(segment(std::int64_t{1} << 40, 2), HasSubstr("impossible place"));
  EXPECT_THAT(segment(4, 1), HasSubstr("does not begin at 0"));
  const auto layer = [&](std::vector<std::uint8_t> given, double error) {
    const LayerRecord record{0, "", {}, std::move(given), 1, error, 0, {{NumberType::kFloat32, {0}, {}}}};
    return refusal([&] { return read_layer_state(write_layer_state(record)); });
  };
  EXPECT_EQ(layer({}, 0), "");
  EXPECT_EQ(layer({0}, 0), "");
  EXPECT_THAT(layer({1}, 0), HasSubstr("another number of inputs"));
  EXPECT_THAT(layer({2}, 0), HasSubstr("neither yes nor no"));
  EXPECT_THAT(layer({}, -1), HasSubstr("impossible error"));
  EXPECT_THAT(layer({}, std::nan("")), HasSubstr("impossible error"));
  const auto centres = [](double sum, float centre) {
    return refusal([&] { return read_centres(write_centres({{{20, {sum}, {centre}}}})); });
  };
  EXPECT_EQ(centres(1, 1), "");
  EXPECT_THAT(centres(std::nan(""), 1), HasSubstr("a mean that is no number"));
  EXPECT_THAT(centres(1, INFINITY), HasSubstr("a mean that is no number"));
}

TEST_F(SnapshotFile, LargeFramesAreWholeAndMayBeGivenInParts) {
  const std::string part(700'000, 'x');
  {
    SnapshotWriter writer(path());
    writer.begin(FrameKind::kOutput, 3 * part.size());
    for (int i = 0; i < 3; ++i) writer.add(part);
    writer.end();
    writer.commit();
    EXPECT_EQ(writer.bytes(), fs::file_size(path()));
  }
  EXPECT_EQ(read_all(open_file(path())).at(0).bytes, part + part + part);
}

TEST_F(SnapshotFile, EveryBitCounts) {
  const std::string sound = sample();
  ASSERT_EQ(refusal_of_bytes(sound), "");
  for (std::size_t at = 0; at < sound.size(); ++at) {
    for (std::size_t bit = 0; bit < 8; ++bit) {
      ASSERT_NE(refusal_of_bytes(flipped(sound, at, bit)), "") << "byte " << at << ", bit " << bit;
    }
  }
}

TEST_F(SnapshotFile, WhatIsCutOffOrGoesOnIsRefused) {
  const std::string sound = sample();
  for (std::size_t size = 0; size < sound.size(); ++size) {
    ASSERT_NE(refusal_of_bytes(sound.substr(0, size)), "") << size << " bytes";
  }
  EXPECT_THAT(refusal_of_bytes(sound + '\0'), HasSubstr("goes on behind its end"));
  EXPECT_THAT(refusal_of_bytes(sound + sound), HasSubstr("goes on behind its end"));
}

TEST_F(SnapshotFile, FramesCannotBeLeftOutMovedOrTakenFromAnother) {
  const std::string sound = sample();
  std::vector<std::pair<std::size_t, std::size_t>> places;  // of whole frames, offset and bytes
  std::size_t at = 16;
  for (const Frame& frame : sample_frames()) {
    places.emplace_back(at, frame.bytes.size() + 32);
    at += places.back().second;
  }
  const auto frame = [&](std::size_t i) { return sound.substr(places[i].first, places[i].second); };
  const auto with = [&](const std::vector<std::size_t>& order) {
    std::string bytes = sound.substr(0, 16);
    for (const std::size_t i : order) bytes += frame(i);
    return bytes + sound.substr(at);
  };
  std::vector<std::size_t> all(places.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  ASSERT_EQ(with(all), sound);
  for (std::size_t i = 0; i < all.size(); ++i) {
    auto changed = all;
    changed.erase(changed.begin() + static_cast<std::ptrdiff_t>(i));
    EXPECT_NE(refusal_of_bytes(with(changed)), "") << i << " left out";
    changed.insert(changed.begin() + static_cast<std::ptrdiff_t>(i), {i, i});
    EXPECT_NE(refusal_of_bytes(with(changed)), "") << i << " twice";
    changed = all;
    if (i > 0) std::swap(changed[i], changed[i - 1]);
    EXPECT_EQ(refusal_of_bytes(with(changed)).empty(), i == 0) << i << " moved";
  }
  EXPECT_NE(refusal_of_bytes(with({})), "");
}

/// The head of a frame as a writer makes it, with the right check, for more bytes than come.
TEST_F(SnapshotFile, ForgedLengthsOfFramesAreRefused) {
  for (const std::uint64_t length : {std::uint64_t{1} << 22, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    SnapshotWriter writer(path());
    writer.frame(FrameKind::kHeader, write_header(sample_header()));
    writer.begin(FrameKind::kOutput, length);
    for (int i = 0; i < 2; ++i) writer.add(std::string(1'100'000, 'x'));
    EXPECT_EQ(refusal_of_bytes(bytes_of(path().string() + ".part")), "it was cut off");
  }
}

/// Numbers at their limits in place of each number of an entry.
TEST_F(SnapshotFile, ForgedLengthsInEntriesAreRefused) {
  for (const Frame& frame : sample_frames()) {
    for (std::size_t at = 0; at + 8 <= frame.bytes.size(); ++at) {
      for (const std::uint64_t value : {std::uint64_t{0}, std::uint64_t{1} << 24, std::uint64_t{1} << 40,
                                        std::uint64_t{1} << 61, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
        std::string forged = frame.bytes;
        std::memcpy(forged.data() + at, &value, sizeof(value));
        ASSERT_NO_THROW(fuzz::check_snapshot(forged)) << "byte " << at;
      }
    }
    for (std::size_t size = 0; size < frame.bytes.size(); ++size) {
      ASSERT_NO_THROW(fuzz::check_snapshot(frame.bytes.substr(0, size)));
    }
  }
}

TEST_F(SnapshotFile, SizesWhoseProductIsTooLargeAreRefused) {
  for (const std::vector<std::int64_t>& sizes :
       {std::vector<std::int64_t>{1LL << 62, 1LL << 62}, {1LL << 32, 1LL << 32}, {-1, -24}, {0, 1LL << 62, 8}}) {
    const std::string entry = write_output({"key", true, 1, 1, {{NumberType::kFloat32, sizes, {}}}});
    const bool empty = sizes[0] == 0;
    EXPECT_EQ(refusal([&] { return read_output(entry); }).empty(), empty);
  }
}

TEST_F(SnapshotFile, LaterVersionsSaySo) {
  std::string later = sample();
  later[8] = 2;
  EXPECT_EQ(refusal_of_bytes(later), "it has version 2 of the format, and this library reads up to version 1");
  EXPECT_THAT(refusal_of_bytes("LLMCSNAX" + later.substr(8)), HasSubstr("does not begin as a snapshot does"));
}

TEST_F(SnapshotFile, WhatIsNoFileIsRefused) {
  const auto why = [](const fs::path& path) { return refusal<UnreadableFile>([&] { return open_file(path); }); };
  EXPECT_THAT(why(path()), HasSubstr("no such file"));
  EXPECT_THAT(why(path().parent_path()), HasSubstr("no regular file"));
  EXPECT_THAT(why("/dev/null"), HasSubstr("no regular file"));
}

TEST_F(SnapshotFile, WithoutCommitNothingHasHappened) {
  const std::string before = sample();
  {
    SnapshotWriter writer(path());
    writer.frame(FrameKind::kOutput, "half of it");
  }
  EXPECT_EQ(bytes_of(path()), before);
  EXPECT_FALSE(fs::exists(path().string() + ".part"));
}

TEST_F(SnapshotFile, WhatCannotBeWrittenSaysWhy) {
  const auto why = [](const fs::path& to) {
    return refusal<UnwritableFile>([&] { return std::make_unique<SnapshotWriter>(to); });
  };
  EXPECT_THAT(why(path() / "nowhere"), HasSubstr("No such file or directory"));
  fs::create_directories(path().string() + ".part");
  EXPECT_THAT(why(path()), HasSubstr("Is a directory"));
}

TEST_F(SnapshotFile, OneWriterAtATime) {
  SnapshotWriter first(path());
  EXPECT_THAT(refusal<UnwritableFile>([&] { return std::make_unique<SnapshotWriter>(path()); }),
              HasSubstr("another snapshot is being written"));
  first.frame(FrameKind::kOutput, "one");
  first.commit();
  write_snapshot(path(), {{FrameKind::kOutput, "two"}});
  EXPECT_EQ(read_all(open_file(path())).at(0).bytes, "two");
}

/// Several threads save to one path: whatever is there is one whole snapshot.
TEST_F(SnapshotFile, WritersDoNotMix) {
  std::vector<std::thread> threads;
  for (const char letter : {'a', 'b', 'c', 'd'}) {
    threads.emplace_back([&, letter] {
      for (int i = 0; i < 50; ++i) {
        try {
          write_snapshot(path(), {{FrameKind::kOutput, std::string(5000, letter)}});
        } catch (const UnwritableFile&) {  // another one was at work
          continue;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const auto frames = read_all(open_file(path()));
  EXPECT_EQ(frames.at(0).bytes, std::string(5000, frames.at(0).bytes[0]));
}

/// Saves again and again, each time another content, until it is killed.
[[noreturn]] void save_until_killed(const fs::path& path, std::uint64_t first) {
  for (std::uint64_t number = first;; ++number) {
    std::vector<Frame> frames;
    for (int i = 0; i < 20; ++i)
      frames.push_back({FrameKind::kOutput, std::to_string(number) + std::string(3000, 'x')});
    write_snapshot(path, frames);
  }
}

TEST_F(SnapshotFile, KilledAtAnyMomentItIsTheOldOneOrTheNewOne) {
  std::uint64_t newest = 0;
  write_snapshot(path(), {{FrameKind::kOutput, "0x"}});
  for (int round = 0; round < 1000; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) save_until_killed(path(), newest + 1);
    ::usleep(static_cast<useconds_t>(200 + round * 37 % 2000));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    std::vector<Frame> frames;
    ASSERT_NO_THROW(frames = read_all(open_file(path()))) << "round " << round;
    const std::uint64_t number = std::stoull(frames.at(0).bytes);
    EXPECT_GE(number, newest);
    newest = number;
    for (const Frame& frame : frames) EXPECT_EQ(std::stoull(frame.bytes), number);
  }
  EXPECT_GT(newest, 0);
}

TEST(ModelIdentity, EachPartCountsAndIsNamed) {
  const ModelIdentity own = sample_header().identity;
  const auto changed = [&](auto change) {
    ModelIdentity other = own;
    change(other);
    EXPECT_NE(other.digest(), own.digest());
    return identity_difference(other, own);
  };
  EXPECT_EQ(identity_difference(own, own), "");
  EXPECT_THAT(changed([](auto& it) { it.contents = "others"; }), HasSubstr("weights, graph or settings"));
  EXPECT_THAT(changed([](auto& it) { it.weights = "packed-fp16"; }), HasSubstr("held packed-fp16"));
  EXPECT_THAT(changed([](auto& it) { it.attention = "eager"; }), HasSubstr("attention is of another kind"));
  EXPECT_THAT(changed([](auto& it) { it.numerics = "cuda"; }), HasSubstr("computed on cuda"));
  EXPECT_THAT(changed([](auto& it) { it.torch = "2.12.0"; }), HasSubstr("LibTorch 2.12.0, and this is 2.13.0"));
  EXPECT_THAT(changed([](auto& it) { ++it.state_layout; }),
              HasSubstr("laid out as version " + std::to_string(kStateLayout + 1)));
  // What moves from one part to the next is another identity too.
  const auto digest = [](const char* contents, const char* weights) {
    ModelIdentity identity;
    identity.contents = contents;
    identity.weights = weights;
    return identity.digest();
  };
  EXPECT_NE(digest("ab", "c"), digest("a", "bc"));
}

}  // namespace
}  // namespace llmcache
