// Whole outputs in a store.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bank/output_bank.h"
#include "model/wrapped_model.h"
#include "reuse/tiers/stored_part.h"

namespace llmcache {

class StoredOutputs final : public StoredPart {
 public:
  /// `accepts`: the bank's owner may serve a call. `key_of`: how it names a row.
  StoredOutputs(const WrappedModel& wrapped, OutputBank& bank, std::function<bool(const Call&)> accepts,
                std::function<std::string(const Call&, std::int64_t)> key_of);

  TierDomain domain() const override { return TierDomain::kOutput; }
  std::string layout() const override { return layout_; }
  std::vector<StoredRow> rows(const Call& call) const override;
  std::vector<StoredPiece> pieces(const StoredRow& row, std::int64_t block_tokens, TierKeys& keys) const override;
  std::int64_t known(const StoredRow& row) const override;
  std::size_t bytes(std::int64_t tokens) const override;
  Outcome take(const StoredRow& row, const StoredPiece& piece, std::string_view entry) const override;
  bool append(std::string& to, const StoredRow& row, const StoredPiece& piece) const override;

 private:
  const WrappedModel& wrapped_;
  OutputBank& bank_;
  const std::function<bool(const Call&)> accepts_;
  const std::function<std::string(const Call&, std::int64_t)> key_of_;
  std::string layout_;
  std::size_t fixed_bytes_ = 0;  ///< of one output, and
  std::size_t token_bytes_ = 0;  ///< of each of its tokens
};

}  // namespace llmcache
