// Order between calls that run on several streams of one device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace llmcache {

/// The stream that is current on `device`; none where there are no streams.
std::optional<c10::Stream> current_stream(at::Device device);

/// What one call keeps another may read, write behind, or evict. On a device their work is queued on the streams that
/// were current when they were called, and two streams know nothing of each other. So:
///
///  - publish(): what a call keeps becomes known, and its stream has given something;
///  - enter(): work that is queued from here on comes behind what other streams have given. It stands behind each
///    lookup;
///  - uses(): memory of another stream, to be read or written here, is not given out again before that is done.
///
/// The host never waits. Where all calls are on one stream, and on CPUs, nothing is recorded and nothing waits.
/// Thread-safe.
class StreamFence {
 public:
  void publish(at::Device device, const std::function<void()>& step);
  void enter(at::Device device);
  void uses(const at::Tensor& tensor) const;

 private:
  struct Given {
    std::uint64_t calls = 0;                      ///< that kept something
    std::map<c10::StreamId, std::uint64_t> seen;  ///< how many of them another stream comes behind
  };

  mutable std::recursive_mutex mutex_;  ///< what is published may look something up
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Given> streams_;
};

}  // namespace llmcache
