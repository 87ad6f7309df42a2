#include "store/digest.h"

#include <array>
#include <cstdint>
#include <stdexcept>

namespace llmcache {

Digest::Digest(std::string_view key) {
  // Without it libsodium does not look for what the processor can do, and is half as fast.
  static const bool ready = sodium_init() >= 0;
  const auto* bytes = key.empty() ? nullptr : reinterpret_cast<const unsigned char*>(key.data());
  if (!ready || crypto_generichash_init(&state_, bytes, key.size(), crypto_generichash_BYTES) != 0) {
    throw std::runtime_error("libsodium cannot be used");
  }
}

void Digest::add(const void* data, std::size_t bytes) {
  crypto_generichash_update(&state_, static_cast<const unsigned char*>(data), bytes);
}

void Digest::add(std::string_view text) {
  const std::uint64_t size = text.size();
  add(&size, sizeof(size));
  add(text.data(), text.size());
}

std::string Digest::hex() const {
  crypto_generichash_state last = state_;
  std::array<unsigned char, crypto_generichash_BYTES> sum{};
  crypto_generichash_final(&last, sum.data(), sum.size());
  std::array<char, 2 * crypto_generichash_BYTES + 1> text{};
  sodium_bin2hex(text.data(), text.size(), sum.data(), sum.size());
  return text.data();
}

}  // namespace llmcache
