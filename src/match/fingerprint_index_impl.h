// What the indexes of all kinds have in common.
#pragma once

#include <memory>
#include <memory_resource>

#include "llmcache/match/fingerprint_index.h"

namespace llmcache {

/// See FingerprintIndex for the contract of each function.
class FingerprintIndexImpl {
 public:
  using Match = FingerprintIndex::Match;

  FingerprintIndexImpl() = default;
  virtual ~FingerprintIndexImpl() = default;
  FingerprintIndexImpl(const FingerprintIndexImpl&) = delete;
  FingerprintIndexImpl& operator=(const FingerprintIndexImpl&) = delete;

  virtual void insert(std::uint32_t id, const Fingerprint& fingerprint) = 0;
  virtual void erase(std::uint32_t id) noexcept = 0;
  [[nodiscard]] virtual std::optional<Match> best(const Fingerprint& query, double tau) const = 0;
  [[nodiscard]] virtual std::size_t size() const noexcept = 0;
  virtual void clear() noexcept = 0;
};

/// `bits`: 64, 128 or 256.
std::unique_ptr<FingerprintIndexImpl> make_simhash_index(int bits, std::pmr::memory_resource* memory);
std::unique_ptr<FingerprintIndexImpl> make_vector_index(std::pmr::memory_resource* memory);
std::unique_ptr<FingerprintIndexImpl> make_jaccard_index(std::pmr::memory_resource* memory);

/// Throws Error(kInvalidInput) if the id cannot be used.
void check_new_id(std::uint32_t id, bool in_use);

}  // namespace llmcache
