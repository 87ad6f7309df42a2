#include "protected_streams.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <utility>

#include "protected_queue.h"

namespace llmcache::test {
namespace {

thread_local std::array<c10::StreamId, 2> current_ids{0, 0};

StreamOrder::Place place_of(c10::Stream stream) { return {stream.device_index(), stream.id()}; }

void join(StreamOrder::Clock& into, const StreamOrder::Clock& from) {
  for (const auto& [stream, time] : from) into[stream] = std::max(into[stream], time);
}

std::string name_of(const StreamOrder::Place& place) {
  return "stream " + std::to_string(place.second) + " of device " + std::to_string(place.first);
}

std::int64_t time_in(const StreamOrder::Clock& clock, const StreamOrder::Place& place) {
  const auto found = clock.find(place);
  return found == clock.end() ? 0 : found->second;
}

}  // namespace

StreamOrder& StreamOrder::instance() {
  static auto* const order = new StreamOrder();  // outlives every tensor
  return *order;
}

c10::Stream StreamOrder::current(c10::DeviceIndex device) const {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kPrivateUse1, device),
                     current_ids.at(static_cast<std::size_t>(device)));
}

c10::Stream StreamOrder::exchange(c10::Stream stream) {
  const auto before = current(stream.device_index());
  current_ids.at(static_cast<std::size_t>(stream.device_index())) = stream.id();
  return before;
}

c10::Stream StreamOrder::fresh(c10::DeviceIndex device) {
  const std::lock_guard lock(mutex_);
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kPrivateUse1, device), next_++);
}

std::int64_t StreamOrder::launch(c10::Stream stream) {
  const std::lock_guard lock(mutex_);
  Clock& known = known_[place_of(stream)];
  join(known, host_);  // the host launches it, behind what it waited for
  return ++known[place_of(stream)];
}

bool StreamOrder::knows(const Place& who, const Place& other, std::int64_t time) {
  return who == other || time_in(known_[who], other) >= time;
}

void StreamOrder::access(const void* block, c10::Stream stream, bool writes, const std::string& work) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return;
  Block& own = found->second;
  const Place place = place_of(stream);
  const auto complain = [&](const Place& other, const char* what) {
    errors_.push_back(work + " on " + name_of(place) + (writes ? " writes what " : " reads what ") + name_of(other) +
                      what + ", and nothing makes it wait");
  };
  if (own.written > 0 && !knows(place, own.writer, own.written)) complain(own.writer, " wrote");
  const std::int64_t now = time_in(known_[place], place);
  if (!writes) {
    own.readers[place] = now;
    return;
  }
  for (const auto& [reader, time] : own.readers) {
    if (!knows(place, reader, time)) complain(reader, " reads");
  }
  own.readers.clear();
  own.writer = place;
  own.written = now;
}

void StreamOrder::allocated(const void* block, c10::Stream stream) {
  const std::lock_guard lock(mutex_);
  blocks_[block] = {.home = place_of(stream), .writer = {}, .written = 0, .readers = {}, .recorded = {}};
}

void StreamOrder::freed(const void* block) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return;
  // From now on its own stream may use the memory for something else.
  const Block& own = found->second;
  const auto check = [&](const Place& other, std::int64_t time) {
    const bool waits = own.recorded.contains(other) || knows(own.home, other, time) || time_in(host_, other) >= time;
    if (!waits) errors_.push_back("memory of " + name_of(own.home) + " is freed while " + name_of(other) + " uses it");
  };
  if (own.written > 0) check(own.writer, own.written);
  for (const auto& [reader, time] : own.readers) check(reader, time);
  blocks_.erase(found);
}

void StreamOrder::recorded(const void* block, c10::Stream stream) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(block);
  if (found != blocks_.end()) found->second.recorded.insert(place_of(stream));
}

StreamOrder::Clock StreamOrder::record(c10::Stream stream) {
  const std::lock_guard lock(mutex_);
  return known_[place_of(stream)];
}

void StreamOrder::block(const Clock& event, c10::Stream stream) {
  if (forgets_waits_) return;
  DelayedWork::instance().run(event);
  const std::lock_guard lock(mutex_);
  join(known_[place_of(stream)], event);
}

void StreamOrder::learn(const Clock& event) {
  join(host_, event);
  std::erase_if(later_, [&](const Later& one) {
    if (time_in(host_, one.stream) < one.time) return false;
    one.target.copy_(one.value);
    return true;
  });
}

void StreamOrder::wait(const Clock& event) {
  DelayedWork::instance().run(event);  // it frees what it used, which takes the lock
  const std::lock_guard lock(mutex_);
  learn(event);
}

void StreamOrder::wait(c10::Stream stream) { wait(record(stream)); }

void StreamOrder::wait(c10::DeviceIndex device) {
  Clock all;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [place, clock] : known_) {
      if (place.first == device) join(all, clock);
    }
  }
  wait(all);
}

bool StreamOrder::done(const Clock& event) const {
  const std::lock_guard lock(mutex_);
  return std::all_of(event.begin(), event.end(),
                     [&](const auto& one) { return time_in(host_, one.first) >= one.second; });
}

void StreamOrder::copy_later(const at::Tensor& target, const at::Tensor& value, c10::Stream stream) {
  target.fill_(-77);
  const std::lock_guard lock(mutex_);
  const Place place = place_of(stream);
  later_.push_back({target, value, place, time_in(known_[place], place)});
}

std::vector<std::string> StreamOrder::take_errors() {
  const std::lock_guard lock(mutex_);
  return std::exchange(errors_, {});
}

}  // namespace llmcache::test
