#include "model/stream_fence.h"

#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace llmcache {
namespace {

bool has_streams(at::Device device) {
  return !device.is_cpu() && !device.is_meta() && c10::impl::hasDeviceGuardImpl(device.type());
}

}  // namespace

std::optional<c10::Stream> current_stream(at::Device device) {
  if (!has_streams(device)) return std::nullopt;
  return c10::impl::getDeviceGuardImpl(device.type())->getStream(device);
}

void StreamFence::publish(at::Device device, const std::function<void()>& step) {
  if (!has_streams(device)) return step();
  // Who finds what becomes known here comes to enter() behind it, and waits until the stream is noted.
  const std::lock_guard lock(mutex_);
  step();
  const auto stream = *current_stream(device);
  ++streams_[{stream.device_index(), stream.id()}].calls;
}

void StreamFence::enter(at::Device device) {
  if (!has_streams(device)) return;
  const auto own = *current_stream(device);
  const std::lock_guard lock(mutex_);
  for (auto& [place, given] : streams_) {
    const auto& [index, id] = place;
    if (index != own.device_index() || id == own.id() || given.seen[own.id()] == given.calls) continue;
    c10::Event event(device.type());
    event.record(c10::Stream(c10::Stream::UNSAFE, own.device(), id));
    event.block(own);
    given.seen[own.id()] = given.calls;
  }
}

void StreamFence::uses(const at::Tensor& tensor) const {
  if (!tensor.defined() || !has_streams(tensor.device()) || !tensor.has_storage()) return;
  const auto* guard = c10::impl::getDeviceGuardImpl(tensor.device().type());
  const auto own = guard->getStream(tensor.device());
  const std::lock_guard lock(mutex_);
  const bool alone = streams_.empty() || (streams_.size() == 1 && streams_.begin()->first.second == own.id());
  if (!alone) guard->recordDataPtrOnStream(tensor.storage().data_ptr(), own);
}

}  // namespace llmcache
