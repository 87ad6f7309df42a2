#include "failing_allocation.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace llmcache::test {
namespace {

constexpr std::size_t kNever = static_cast<std::size_t>(-1);
constexpr std::size_t kFired = kNever - 1;
thread_local std::size_t countdown = kNever;

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (countdown < kFired && countdown-- == 0) {
    countdown = kFired;
    throw std::bad_alloc();
  }
  const std::size_t size = std::max<std::size_t>(bytes, 1);
  void* const pointer = alignment <= alignof(std::max_align_t)
                            ? std::malloc(size)
                            : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (pointer == nullptr) throw std::bad_alloc();
  return pointer;
}

void* allocate_or_null(std::size_t bytes, std::size_t alignment) noexcept {
  try {
    return allocate(bytes, alignment);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace

FailingAllocation::FailingAllocation(std::size_t number) { countdown = number; }
FailingAllocation::~FailingAllocation() { countdown = kNever; }
bool FailingAllocation::fired() const { return countdown == kFired; }

}  // namespace llmcache::test

void* operator new(std::size_t bytes) { return llmcache::test::allocate(bytes, 0); }
void* operator new[](std::size_t bytes) { return llmcache::test::allocate(bytes, 0); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return llmcache::test::allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return llmcache::test::allocate(bytes, static_cast<std::size_t>(alignment));
}
// Those that return null in place of throwing too: a sanitizer's runtime brings its own, whose memory is not free()'s.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return llmcache::test::allocate_or_null(bytes, 0);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return llmcache::test::allocate_or_null(bytes, 0);
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return llmcache::test::allocate_or_null(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return llmcache::test::allocate_or_null(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete[](void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete[](void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete[](void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept { std::free(pointer); }
void operator delete[](void* pointer, std::size_t, std::align_val_t) noexcept { std::free(pointer); }
