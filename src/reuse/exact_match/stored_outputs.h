// What an OutputBank keeps in a store: whole outputs, and what follows from sources.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bank/output_bank.h"
#include "reuse/exact_match/output_part.h"
#include "reuse/tiers/stored_part.h"

namespace llmcache {

class StoredOutputs : public StoredPart {
 public:
  /// `device`: of the model. `rows`: those of a call, their partitions the keys of the bank.
  StoredOutputs(TierDomain domain, RowForms forms, OutputBank& bank, at::Device device,
                std::function<std::vector<StoredRow>(const Call&)> rows);

  TierDomain domain() const override { return domain_; }
  std::string layout() const override { return forms_->text(); }
  std::vector<StoredRow> rows(const Call& call) const override { return rows_(call); }
  std::vector<StoredPiece> pieces(const StoredRow& row, std::int64_t block_tokens, TierKeys& keys) const override;
  std::int64_t known(const StoredRow& row) const override;
  std::size_t bytes(std::int64_t tokens) const override;
  Outcome take(const StoredRow& row, const StoredPiece& piece, std::string_view entry) const override;
  bool append(std::string& to, const StoredRow& row, const StoredPiece& piece) const override;

 private:
  [[nodiscard]] OutputPart part() const { return {{}, {}, forms_, bank_, device_}; }

  const TierDomain domain_;
  const std::shared_ptr<const RowForms> forms_;
  OutputBank& bank_;
  const at::Device device_;
  const std::function<std::vector<StoredRow>(const Call&)> rows_;
  std::size_t fixed_bytes_ = 0;  ///< of one entry, and
  std::size_t token_bytes_ = 0;  ///< of each of its tokens
};

}  // namespace llmcache
