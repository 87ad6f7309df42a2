// A device that forgives nothing, for tests: two devices "protected:0" and "protected:1" of LibTorch's PrivateUse1.
//
// Its memory cannot be touched by the host (protected_memory.h). Its kernels are LibTorch's for CPUs, run on a second
// mapping of the same memory, so that numbers are those of a CPU. Everything that a real device would make slow or
// wrong is counted or refused: copies, waits, operators on tensors of two devices, work that two streams do on the
// same memory without an order.
#pragma once

#include <c10/core/Device.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace llmcache::test {

/// Registers the device with LibTorch, once for the process; later calls do nothing.
void use_protected_device();
/// Device 0 or 1.
[[nodiscard]] c10::Device protected_device(int index);

/// What all threads together asked the devices for, since the process began.
struct DeviceCounts {
  std::int64_t to_device = 0;  ///< copies of tensors from the host
  std::int64_t to_host = 0;    ///< copies of tensors to the host
  std::int64_t across = 0;     ///< copies from one device to the other
  std::int64_t waits = 0;      ///< times the host had to wait: single numbers read, shapes that depend on numbers
  std::int64_t kernels = 0;

  [[nodiscard]] std::string to_string() const;
};
DeviceCounts operator-(const DeviceCounts& now, const DeviceCounts& then);
[[nodiscard]] DeviceCounts device_counts();

/// Bytes of a device's memory that are taken now, as its allocator counts them.
[[nodiscard]] std::size_t device_bytes(int index);

/// Delays all work of streams until somebody waits for it (DelayedWork), as long as it lives.
class DelayedStreams {
 public:
  DelayedStreams();
  DelayedStreams(const DelayedStreams&) = delete;
  DelayedStreams& operator=(const DelayedStreams&) = delete;
  ~DelayedStreams();
};

/// Makes streams forget that they are to wait for events, as long as it lives: a fault that tests must find.
class ForgottenWaits {
 public:
  ForgottenWaits();
  ForgottenWaits(const ForgottenWaits&) = delete;
  ForgottenWaits& operator=(const ForgottenWaits&) = delete;
  ~ForgottenWaits();
};

/// What work on several streams did without an order between it, since the last call: one sentence each.
[[nodiscard]] std::vector<std::string> take_stream_errors();

/// Fails each test that leaves stream errors, or the host's current device changed.
class DeviceErrors final : public ::testing::EmptyTestEventListener {
  void OnTestEnd(const ::testing::TestInfo& test) override;
};

}  // namespace llmcache::test
