// Sizes of an ExitModel that do not depend on the model it was fitted for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmcache {

/// Sequences that a bank of early exits has at least.
inline constexpr std::int64_t kLeastExitEntries = 32;

/// Features that a gate of early exits takes.
constexpr std::size_t gate_features(bool cache_free) noexcept { return cache_free ? 3 : 18; }

}  // namespace llmcache
