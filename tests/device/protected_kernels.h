// Operators of the protected device.
#pragma once

namespace llmcache::test {

/// Registers them with LibTorch's dispatcher. Once for the process.
void register_protected_kernels();
/// Where a kernel finds what is at an address of either device; null stays null.
void* shadow_of(const void* address);
/// The host waited for a device.
void count_wait();

}  // namespace llmcache::test
