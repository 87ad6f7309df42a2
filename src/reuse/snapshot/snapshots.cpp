#include "reuse/snapshot/snapshots.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/core.h>

#include <chrono>

#include "execute/clock.h"
#include "llmcache/version.h"
#include "refusal.h"
#include "reuse/snapshot/snapshot_load.h"
#include "store/damaged_data.h"

namespace llmcache {
namespace {

/// Runs a reader. Returns why nothing of the file can be taken; empty: it can.
std::string refusal_of(const std::function<void()>& read) {
  try {
    read();
    return {};
  } catch (const UnreadableFile& error) {
    return fmt::format("it cannot be read ({})", error.what());
  } catch (const DamagedData& error) {
    return fmt::format("it is damaged: {}", error.what());
  } catch (const Error&) {
    throw;                                 // of the model
  } catch (const std::exception& error) {  // another model's, or a later version's; no memory
    return error.what();
  }
}

void warn_of(const std::exception& error) noexcept {
  try {
    TORCH_WARN("llmcache: ", error.what());
  } catch (const std::exception&) {  // a handler of the program's own has thrown
    return;
  }
}

}  // namespace

Snapshots::Snapshots(SnapshotOptions options, Cache cache) : options_(std::move(options)), cache_(std::move(cache)) {}

Snapshots::~Snapshots() {
  if (!started_) return;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable()) thread_.join();
  save_quietly();
}

void Snapshots::start() {
  if (options_.path.empty()) return;
  static_cast<void>(load(options_.path));
  started_ = true;
  if (options_.save_every_s > 0) thread_ = std::thread([this] { save_now_and_then(); });
}

void Snapshots::save_now_and_then() {
  const std::chrono::duration<double> pause(options_.save_every_s);
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, pause, [this] { return stopped_; })) {
    lock.unlock();
    save_quietly();
    lock.lock();
  }
}

/// What goes wrong is in the statistics, and in LibTorch's log for those who look at neither.
void Snapshots::save_quietly() noexcept {
  try {
    static_cast<void>(save(options_.path));
  } catch (const std::exception& error) {
    warn_of(error);
  }
}

SnapshotReport Snapshots::save(const std::filesystem::path& path) {
  const std::lock_guard one_at_a_time(one_at_a_time_);
  try {
    SnapshotReport report = write(path);
    const std::lock_guard lock(mutex_);
    ++stats_.saves;
    stats_.last_save_ms = report.ms;
    return report;
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    ++stats_.failed;
    stats_.failure = error.what();
    throw;
  }
}

SnapshotReport Snapshots::write(const std::filesystem::path& path) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  SnapshotReport report;
  report.path = path.string();
  const std::uint64_t epoch = cache_.epoch();
  const SnapshotParts parts = cache_.parts();
  SnapshotHeader header{LLMCACHE_VERSION, cache_.identity(), {}};
  for (const auto& part : parts) {
    header.parts.push_back({part->name(), static_cast<std::uint32_t>(part->kind()), part->layout()});
  }
  try {
    SnapshotWriter writer(path);
    writer.frame(FrameKind::kHeader, write_header(header));
    for (const auto& part : parts) {
      SnapshotPartReport& line = report.parts.emplace_back();
      line.name = part->name();
      part->save(writer, line);
    }
    // Nothing is dropped between looking and putting the file in its place.
    if (!cache_.publish(epoch, [&] { writer.commit(); })) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("snapshot '{}' was not written, because the cache was cleared, a tenant erased, or its "
                              "weights changed, meanwhile; save again",
                              report.path));
    }
    report.bytes = writer.bytes();
  } catch (const UnwritableFile& error) {
    refuse_file(fmt::format("snapshot '{}' cannot be written: {}; what was there before is there still", report.path,
                            error.what()));
  }
  report.ms = clock.lap();
  return report;
}

SnapshotReport Snapshots::load(const std::filesystem::path& path) {
  const std::lock_guard one_at_a_time(one_at_a_time_);
  SnapshotReport report = read(path);
  const std::lock_guard lock(mutex_);
  stats_.loaded = report;
  return report;
}

SnapshotReport Snapshots::read(const std::filesystem::path& path) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  SnapshotReport report;
  report.path = path.string();
  const std::uint64_t epoch = cache_.epoch();
  const SnapshotParts parts = cache_.parts();
  report.refused = refusal_of([&] {
    SnapshotReader reader(open_file(path));
    report.bytes = reader.size();
    const ModelIdentity own = cache_.identity();
    SnapshotLoad load(reader, parts, own);
    load.check();
    load.take([&](const std::function<void()>& step) { return cache_.publish(epoch, step); });
    report.parts = load.reports();
  });
  report.ms = clock.lap();
  return report;
}

SnapshotStats Snapshots::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace llmcache
