// The protected device by itself: what it refuses, counts and finds.
#include "protected_device.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>

#include "support.h"

namespace llmcache::test {
namespace {

at::TensorOptions on(int index) { return at::TensorOptions().device(protected_device(index)); }

at::Tensor moved(const at::Tensor& tensor, int index) { return tensor.to(protected_device(index)); }

c10::Stream fresh_stream(int index) {
  return c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getStreamFromGlobalPool(protected_device(index));
}

TEST(ProtectedDeviceDeathTest, AHostReadOfItsMemoryIsACrash) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto tensor = at::ones({4}, on(0));
  EXPECT_EXIT(
      {
        volatile float value = *tensor.const_data_ptr<float>();
        (void)value;
        std::exit(0);
      },
      ::testing::KilledBySignal(SIGSEGV), "");
  EXPECT_EXIT(
      {
        *tensor.mutable_data_ptr<float>() = 2;
        std::exit(0);
      },
      ::testing::KilledBySignal(SIGSEGV), "");
}

TEST(ProtectedDevice, ComputesWhatACpuComputes) {
  const auto a = at::randn({5, 7});
  const auto b = at::randn({7, 3});
  for (const int index : {0, 1}) {
    const auto x = moved(a, index);
    const auto y = moved(b, index);
    EXPECT_EQ(x.device(), protected_device(index));
    EXPECT_TRUE(at::equal(at::mm(x, y).cpu(), at::mm(a, b)));
    EXPECT_TRUE(at::equal(x.narrow(1, 2, 3).t().add(1).softmax(0).cpu(), a.narrow(1, 2, 3).t().add(1).softmax(0)));
    EXPECT_TRUE(at::equal(at::cat({x, x}).cpu(), at::cat({a, a})));
    x.select(0, 1).fill_(4);
    EXPECT_EQ(x[1].sum().item<float>(), 28);
    EXPECT_TRUE(
        at::equal(x.index_select(0, moved(at::tensor({3, 0}), index)).cpu(), a.index_select(0, at::tensor({3, 0}))));
    EXPECT_EQ(at::arange(5, on(index)).device(), protected_device(index));
  }
  EXPECT_TRUE(take_stream_errors().empty());
}

TEST(ProtectedDevice, RefusesTensorsOfTwoDevices) {
  const auto x = at::ones({3}, on(0));
  EXPECT_ANY_THROW(x + at::ones({3}, on(1)));
  EXPECT_ANY_THROW(x + at::ones({3}));
  EXPECT_ANY_THROW(x.index_select(0, at::tensor({1})));
  EXPECT_EQ((x + at::scalar_tensor(2)).sum().item<float>(), 9);
}

TEST(ProtectedDevice, CountsCopiesAndWaits) {
  const auto before = device_counts();
  const auto x = moved(at::ones({3}), 0);
  (void)x.cpu();
  (void)x.sum().item<float>();
  (void)at::equal(x, x.clone());
  (void)x.to(protected_device(1));
  const auto counts = device_counts() - before;
  EXPECT_EQ(counts.to_device, 1);
  EXPECT_EQ(counts.to_host, 1);
  EXPECT_EQ(counts.across, 1);
  EXPECT_EQ(counts.waits, 3) << "the copy to the host, the number, whether they are equal";
}

TEST(ProtectedDevice, MemoryIsCountedInStepsOfItsAllocator) {
  const auto before = device_bytes(1);
  auto x = at::empty({3}, on(1));
  EXPECT_EQ(device_bytes(1), before + 512);
  x = at::Tensor();
  EXPECT_EQ(device_bytes(1), before);
}

TEST(ProtectedDevice, WorkOfTwoStreamsNeedsAnOrder) {
  const auto x = at::ones({3}, on(0));
  const auto side = fresh_stream(0);
  c10::Event written(c10::kPrivateUse1);
  at::Tensor sum;
  {
    const c10::StreamGuard guard(side);
    sum = x.sum();
  }
  EXPECT_THAT(take_stream_errors(), ::testing::ElementsAre(::testing::StartsWith("aten::sum on stream 1 of")))
      << "x was written on the first stream";
  written.record(c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getStream(protected_device(0)));
  {
    const c10::StreamGuard guard(side);
    written.block(side);
    sum = x.sum();
    EXPECT_EQ(sum.item<float>(), 3);
  }
  EXPECT_TRUE(take_stream_errors().empty());
}

TEST(ProtectedDevice, DelayedWorkIsDoneWhenSomebodyWaits) {
  const auto x = at::ones({3}, on(0));
  const auto side = fresh_stream(0);
  c10::impl::VirtualGuardImpl(c10::kPrivateUse1).synchronizeDevice(0);
  const auto sum_behind = [&](bool waits) {
    const DelayedStreams delay;
    const auto twice = (x * 2).add_(1);
    c10::Event written(c10::kPrivateUse1);
    written.record(c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getStream(protected_device(0)));
    const c10::StreamGuard guard(side);
    if (waits) written.block(side);
    return twice.sum().item<float>();
  };
  EXPECT_EQ(sum_behind(true), 9);
  EXPECT_TRUE(take_stream_errors().empty());
  EXPECT_TRUE(std::isnan(sum_behind(false)));
  EXPECT_FALSE(take_stream_errors().empty());
}

TEST(ProtectedDevice, DelayedWorkComputesWhatACpuComputes) {
  const DelayedStreams delay;
  const auto a = at::randn({5, 7});
  const auto x = moved(a, 1);
  const auto y = at::empty({2, 7}, on(1));
  y.copy_(x.narrow(0, 1, 2));
  y.select(0, 1).fill_(4);
  const auto later = at::empty({2, 7});
  later.copy_(y, /*non_blocking=*/true);
  const auto chosen = x.index_select(0, moved(at::tensor({3, 0}), 1)).softmax(1);
  EXPECT_TRUE(at::allclose(chosen.cpu(), a.index_select(0, at::tensor({3, 0})).softmax(1)));
  EXPECT_TRUE(at::equal(later[0], a[1]));
  EXPECT_TRUE(at::equal(later[1], at::full({7}, 4.0F)));
}

TEST(ProtectedDevice, MemoryMustOutliveTheWorkOfOtherStreams) {
  const auto side = fresh_stream(0);
  for (const bool recorded : {false, true}) {
    auto x = at::ones({3}, on(0));
    c10::impl::VirtualGuardImpl(c10::kPrivateUse1).synchronizeDevice(0);
    at::Tensor twice;
    {
      const c10::StreamGuard guard(side);
      twice = x * 2;
    }
    if (recorded) x.record_stream(side);
    x = at::Tensor();
    EXPECT_EQ(take_stream_errors().size(), recorded ? 0U : 1U);
  }
}

TEST(ProtectedDevice, WhatIsCopiedWithoutWaitingComesWithTheWait) {
  const auto x = moved(at::arange(4), 0);
  const auto later = at::empty({4}, at::kLong);
  later.copy_(x, /*non_blocking=*/true);
  EXPECT_FALSE(at::equal(later, at::arange(4)));
  c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getStream(protected_device(0)).synchronize();
  EXPECT_TRUE(at::equal(later, at::arange(4)));
}

}  // namespace
}  // namespace llmcache::test
