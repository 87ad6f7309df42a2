// A cryptographic hash, for what has to be told apart outside of the process that made it.
#pragma once

#include <sodium.h>

#include <cstddef>
#include <string>
#include <string_view>

namespace llmcache {

/// BLAKE2b with 256 bits, of what is given to it, part after part. One thread at a time.
class Digest {
 public:
  Digest() : Digest(std::string_view{}) {}
  /// With a key of at most 64 bytes: who does not know it cannot tell what comes out. Empty: as without one.
  explicit Digest(std::string_view key);

  void add(const void* data, std::size_t bytes);
  /// The text with its length, so that where one ends and the next begins counts too.
  void add(std::string_view text);
  /// Of all that was given so far, 64 hexadecimal digits.
  [[nodiscard]] std::string hex() const;

 private:
  crypto_generichash_state state_;
};

}  // namespace llmcache
