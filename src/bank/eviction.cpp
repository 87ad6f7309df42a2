#include "llmcache/bank/eviction.h"

#include <fmt/core.h>

#include "llmcache/error.h"

namespace llmcache {

const char* to_string(Eviction eviction) noexcept {
  switch (eviction) {
    case Eviction::kLru:
      return LruPolicy::kName;
    case Eviction::kDecay:
      return DecayPolicy::kName;
    case Eviction::kS3Fifo:
      return S3FifoPolicy::kName;
    case Eviction::kGdsf:
      return GdsfPolicy::kName;
  }
  return "unknown";
}

Eviction eviction_from_string(const std::string& text) {
  for (const auto eviction : {Eviction::kLru, Eviction::kDecay, Eviction::kS3Fifo, Eviction::kGdsf}) {
    if (text == to_string(eviction)) return eviction;
  }
  throw Error(ErrorCode::kInvalidOptions,
              fmt::format("'{}' is no eviction policy; known are lru, decay, s3fifo, gdsf", text));
}

void EvictionOptions::validate() const {
  const auto value = static_cast<int>(policy);
  if (value < 0 || value > static_cast<int>(Eviction::kGdsf)) {
    throw Error(ErrorCode::kInvalidOptions, fmt::format("EvictionOptions.policy is {}, which is no Eviction", value));
  }
  lru.validate();
  decay.validate();
  s3_fifo.validate();
  gdsf.validate();
}

EvictionPolicy::EvictionPolicy(const EvictionOptions& options, std::pmr::memory_resource* memory)
    : policy_(make(options, memory)) {}

EvictionPolicy::Policy EvictionPolicy::make(const EvictionOptions& options, std::pmr::memory_resource* memory) {
  options.validate();
  switch (options.policy) {
    case Eviction::kDecay:
      return Policy(std::in_place_type<DecayPolicy>, options.decay, memory);
    case Eviction::kS3Fifo:
      return Policy(std::in_place_type<S3FifoPolicy>, options.s3_fifo, memory);
    case Eviction::kGdsf:
      return Policy(std::in_place_type<GdsfPolicy>, options.gdsf, memory);
    case Eviction::kLru:
      break;
  }
  return Policy(std::in_place_type<LruPolicy>, options.lru, memory);
}

}  // namespace llmcache
