// The device as LibTorch sees it: its allocator, its guard, its hooks. The kernels are in protected_kernels.cpp.
#include "protected_device.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <cstring>

#include "protected_kernels.h"
#include "protected_memory.h"
#include "protected_queue.h"
#include "protected_streams.h"

namespace llmcache::test {
namespace {

constexpr int kDevices = 2;
constexpr std::size_t kReserve = std::size_t{1} << 32;

thread_local c10::DeviceIndex current_device = 0;

ProtectedMemory& memory_of(int device) {
  static auto* const memories =
      new std::array<ProtectedMemory*, kDevices>{new ProtectedMemory(kReserve), new ProtectedMemory(kReserve)};
  return *memories->at(static_cast<std::size_t>(device));
}

int device_holding(const void* address) {
  for (int device = 0; device < kDevices; ++device) {
    if (memory_of(device).contains(address)) return device;
  }
  TORCH_CHECK(false, "no address of the protected device");
}

void give_back(void* address) {
  StreamOrder::instance().freed(address);
  memory_of(device_holding(address)).free(address);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(c10::kPrivateUse1, current_device);
    if (bytes == 0) return {nullptr, device};
    ProtectedMemory& memory = memory_of(current_device);
    void* address = memory.allocate(bytes);
    if (DelayedWork::instance().delays()) std::memset(memory.shadow(address), 0xFF, bytes);  // NaN, -1
    StreamOrder::instance().allocated(address, StreamOrder::instance().current(current_device));
    return {address, address, &give_back, device};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* /*to*/, const void* /*from*/, std::size_t /*bytes*/) const override {
    TORCH_CHECK(false, "the protected device copies storages by kernels only");
  }
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  [[nodiscard]] c10::DeviceType type() const override { return c10::kPrivateUse1; }
  [[nodiscard]] c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  [[nodiscard]] c10::Device getDevice() const override { return {c10::kPrivateUse1, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "no such device: ", device.str());
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  [[nodiscard]] c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  [[nodiscard]] c10::Stream getStream(c10::Device device) const override {
    return StreamOrder::instance().current(device.index());
  }
  [[nodiscard]] c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  [[nodiscard]] c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*high*/) const override {
    return StreamOrder::instance().fresh(device.index());
  }
  [[nodiscard]] c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
    return StreamOrder::instance().fresh(device.index());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return StreamOrder::instance().exchange(stream); }
  [[nodiscard]] bool queryStream(const c10::Stream& stream) const override {
    return StreamOrder::instance().done(StreamOrder::instance().record(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    count_wait();
    StreamOrder::instance().wait(stream);
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    count_wait();
    StreamOrder::instance().wait(device);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device,
              const c10::EventFlag /*flag*/) const override {
    TORCH_CHECK(device == -1 || device == stream.device_index(), "an event belongs to one device");
    if (*event == nullptr) *event = new StreamOrder::Clock();
    *static_cast<StreamOrder::Clock*>(*event) = StreamOrder::instance().record(stream);
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) StreamOrder::instance().block(*static_cast<StreamOrder::Clock*>(event), stream);
  }
  [[nodiscard]] bool queryEvent(void* event) const override {
    return event == nullptr || StreamOrder::instance().done(*static_cast<StreamOrder::Clock*>(event));
  }
  void synchronizeEvent(void* event) const override {
    count_wait();
    if (event != nullptr) StreamOrder::instance().wait(*static_cast<StreamOrder::Clock*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<StreamOrder::Clock*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    StreamOrder::instance().recorded(data.get(), stream);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  [[nodiscard]] bool isBuilt() const override { return true; }
  [[nodiscard]] bool isAvailable() const override { return true; }
  [[nodiscard]] bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override { return true; }
  [[nodiscard]] c10::DeviceIndex deviceCount() const override { return kDevices; }
  [[nodiscard]] c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  [[nodiscard]] at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  [[nodiscard]] at::Device getDeviceFromPtr(void* data) const override {
    return {c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device_holding(data))};
  }
};

}  // namespace

void* shadow_of(const void* address) {
  return address == nullptr ? nullptr : memory_of(device_holding(address)).shadow(address);
}

void use_protected_device() {
  static const bool once = [] {
    c10::register_privateuse1_backend("protected");
    c10::SetAllocator(c10::kPrivateUse1, new Allocator());
    c10::impl::registerDeviceGuard(c10::kPrivateUse1, new Guard());
    at::RegisterPrivateUse1HooksInterface(new Hooks());
    register_protected_kernels();
    return true;
  }();
  (void)once;
}

c10::Device protected_device(int index) {
  use_protected_device();
  return {c10::kPrivateUse1, static_cast<c10::DeviceIndex>(index)};
}

std::size_t device_bytes(int index) { return memory_of(index).bytes_in_use(); }

void DeviceErrors::OnTestEnd(const ::testing::TestInfo& /*test*/) {
  for (const std::string& error : take_stream_errors()) ADD_FAILURE() << error;
  EXPECT_EQ(current_device, 0) << "the current device was changed";
}

DelayedStreams::DelayedStreams() { DelayedWork::instance().delay(true); }
DelayedStreams::~DelayedStreams() { DelayedWork::instance().delay(false); }

ForgottenWaits::ForgottenWaits() { StreamOrder::instance().forget_waits(true); }
ForgottenWaits::~ForgottenWaits() { StreamOrder::instance().forget_waits(false); }

std::vector<std::string> take_stream_errors() { return StreamOrder::instance().take_errors(); }

}  // namespace llmcache::test
