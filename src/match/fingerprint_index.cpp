#include "llmcache/match/fingerprint_index.h"

#include <fmt/core.h>

#include "llmcache/error.h"
#include "match/fingerprint_index_impl.h"

namespace llmcache {
namespace {

std::unique_ptr<FingerprintIndexImpl> make_impl(FingerprintKind kind, std::pmr::memory_resource* memory) {
  switch (kind) {
    case FingerprintKind::kRaw:
    case FingerprintKind::kPca:
      return make_vector_index(memory);
    case FingerprintKind::kJaccard:
      return make_jaccard_index(memory);
    default:
      if (const int bits = simhash_bits(kind)) return make_simhash_index(bits, memory);
  }
  throw Error(
      ErrorCode::kInvalidOptions,
      fmt::format("the kind of a fingerprint index is {}, which is no FingerprintKind", static_cast<int>(kind)));
}

}  // namespace

void check_new_id(std::uint32_t id, bool in_use) {
  if (id > FingerprintIndex::kMaxId) {
    throw Error(ErrorCode::kInvalidInput,
                fmt::format("fingerprint id {} is too large; at most {} is possible", id, FingerprintIndex::kMaxId));
  }
  if (in_use) {
    throw Error(ErrorCode::kInvalidInput, fmt::format("fingerprint id {} is in use; erase it first", id));
  }
}

FingerprintIndex::FingerprintIndex(FingerprintKind kind, std::pmr::memory_resource* memory)
    : kind_(kind), impl_(make_impl(kind, memory)) {}
FingerprintIndex::~FingerprintIndex() = default;
FingerprintIndex::FingerprintIndex(FingerprintIndex&&) noexcept = default;
FingerprintIndex& FingerprintIndex::operator=(FingerprintIndex&&) noexcept = default;

void FingerprintIndex::insert(std::uint32_t id, const Fingerprint& fingerprint) { impl_->insert(id, fingerprint); }
void FingerprintIndex::erase(std::uint32_t id) noexcept { impl_->erase(id); }
std::optional<FingerprintIndex::Match> FingerprintIndex::best(const Fingerprint& query, double tau) const {
  return impl_->best(query, tau);
}
std::size_t FingerprintIndex::size() const noexcept { return impl_->size(); }
void FingerprintIndex::clear() noexcept { impl_->clear(); }

}  // namespace llmcache
