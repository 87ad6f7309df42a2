// Keys and values of known prefixes in a store, in blocks of tokens.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bank/prefix_bank.h"
#include "reuse/tiers/stored_part.h"

namespace llmcache {

class StoredPrefixes final : public StoredPart {
 public:
  /// `layers`: which are kept, as text. `now`: the clock of the bank's owner. `accepts`: that one may serve a call.
  StoredPrefixes(PrefixBank& bank, std::string layers, std::function<double()> now,
                 std::function<bool(const Call&)> accepts);

  TierDomain domain() const override { return TierDomain::kPrefixBlock; }
  std::string layout() const override { return layout_; }
  std::vector<StoredRow> rows(const Call& call) const override;
  std::vector<StoredPiece> pieces(const StoredRow& row, std::int64_t block_tokens, TierKeys& keys) const override;
  std::int64_t known(const StoredRow& row) const override;
  std::size_t bytes(std::int64_t tokens) const override;
  Outcome take(const StoredRow& row, const StoredPiece& piece, std::string_view entry) const override;
  bool append(std::string& to, const StoredRow& row, const StoredPiece& piece) const override;

 private:
  PrefixBank& bank_;
  const std::function<double()> now_;
  const std::function<bool(const Call&)> accepts_;
  std::string layout_;
  std::size_t token_bytes_ = 0;
};

}  // namespace llmcache
