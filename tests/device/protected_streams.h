// Who may touch which memory of the protected device: streams, events, and the order that they make.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace llmcache::test {

/// The kernels of the protected device run at once, or when somebody waits (DelayedWork); nobody may rely on it: work
/// of two streams on the same memory is an error unless an event, or a wait of the host, puts the one behind the other.
/// So a missing wait is found whatever the timing. What is copied to the host without waiting holds nonsense until the
/// host has waited. Thread-safe. What one thread of the host waited for counts for all.
class StreamOrder {
 public:
  using Place = std::pair<int, c10::StreamId>;  ///< a stream: its device and number
  using Clock = std::map<Place, std::int64_t>;  ///< how much of each stream is known to be done

  static StreamOrder& instance();

  [[nodiscard]] c10::Stream current(c10::DeviceIndex device) const;
  c10::Stream exchange(c10::Stream stream);
  c10::Stream fresh(c10::DeviceIndex device);

  /// Work begins on `stream`, which has as much more; the time that its accesses carry.
  std::int64_t launch(c10::Stream stream);
  /// What the work just launched on `stream` does to `block`, an address given out by the allocator.
  void access(const void* block, c10::Stream stream, bool writes, const std::string& work);
  void allocated(const void* block, c10::Stream stream);
  void freed(const void* block);
  /// As record_stream(): `block` will not be given out again before the work of `stream` until now is done.
  void recorded(const void* block, c10::Stream stream);

  [[nodiscard]] Clock record(c10::Stream stream);
  void block(const Clock& event, c10::Stream stream);
  void wait(const Clock& event);
  void wait(c10::Stream stream);
  void wait(c10::DeviceIndex device);
  [[nodiscard]] bool done(const Clock& event) const;
  /// Streams that are told to wait for an event no longer do: the fault that tests must find.
  void forget_waits(bool on) { forgets_waits_ = on; }

  /// `target`, on the host, gets `value` when the host has waited for what is on `stream` now.
  void copy_later(const at::Tensor& target, const at::Tensor& value, c10::Stream stream);

  std::vector<std::string> take_errors();

 private:
  struct Block {
    Place home;
    Place writer;
    std::int64_t written = 0;
    Clock readers;
    std::set<Place> recorded;
  };
  struct Later {
    at::Tensor target, value;
    Place stream;
    std::int64_t time = 0;
  };

  void learn(const Clock& event);
  [[nodiscard]] bool knows(const Place& who, const Place& other, std::int64_t time);

  mutable std::mutex mutex_;
  Clock host_;
  std::map<Place, Clock> known_;  ///< of each stream: what is done before its next work, itself included
  std::map<const void*, Block> blocks_;
  std::vector<Later> later_;
  std::vector<std::string> errors_;
  c10::StreamId next_ = 1;
  std::atomic<bool> forgets_waits_{false};
};

}  // namespace llmcache::test
