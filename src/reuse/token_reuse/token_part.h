// States of whole sequences of an encoder in a snapshot.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bank/token_bank.h"
#include "reuse/snapshot/snapshot_part.h"
#include "store/snapshot_entries.h"

namespace llmcache {

/// Entries are written in the format in which they are held.
class TokenPart final : public SnapshotPart {
 public:
  /// `ids_per_token`: numbers a token. `device`: of the model. `now`: the clock of the bank's owner.
  TokenPart(TokenBank& bank, std::size_t ids_per_token, at::Device device, std::function<double()> now)
      : bank_(bank), ids_per_token_(ids_per_token), device_(device), now_(std::move(now)) {}

  std::string name() const override { return "token states"; }
  FrameKind kind() const override { return FrameKind::kTokenStates; }
  std::string layout() const override;
  void save(SnapshotWriter& writer, SnapshotPartReport& report) const override;
  std::size_t check(std::string_view entry) const override;
  std::size_t room() const override { return bank_.room(); }
  Outcome take(std::string_view entry, SnapshotPartReport& report) override;
  void finish() override;

 private:
  [[nodiscard]] std::vector<EncodedTensor> tensors_in(const TokenRecord& record, at::Device device) const;

  TokenBank& bank_;
  const std::size_t ids_per_token_;
  const at::Device device_;
  const std::function<double()> now_;
  struct Sequence {
    std::string partition;
    std::vector<std::int64_t> tokens;
  };
  std::vector<Sequence> taken_;  ///< in order
};

}  // namespace llmcache
