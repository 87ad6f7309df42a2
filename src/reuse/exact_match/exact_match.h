// Rows whose whole outputs are known: found by everything that went into them, and kept.
#pragma once

#include <cstddef>
#include <string>

#include "bank/output_bank.h"
#include "reuse/strategy.h"

namespace llmcache {

/// With Fidelity::kIdentical only outputs count that the model made as it is. Where a later strategy of the chain
/// computes only a part of an output (Call::cuts_output), or one row's output is not its own, it takes no part.
class ExactMatch final : public ReuseStrategy {
 public:
  /// `wrapped` and `verification` must outlive it. `total`: the account that the bank's is part of; null: of none.
  ExactMatch(const WrappedModel& wrapped, const Verification& verification, std::size_t capacity_bytes,
             MemoryAccount* total = nullptr)
      : wrapped_(wrapped), verification_(verification), bank_(capacity_bytes, total) {}

  std::string name() const override { return "exact match"; }
  bool accepts(const Call& call) const override;
  void serve(const Call& call, Answers& answers) override;
  /// Keeps the rows that were computed, unless they are approximations.
  void store(const Call& call, Answers& answers) override;
  void clear() override { bank_.clear(); }
  void each_bank(const BankVisitor& visit) override { visit(bank_); }
  void add_to(Stats& stats) const override;
  void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) override;
  void add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) override;

 private:
  void store(const Call& call, const Answers::Pass& pass, Answers& answers);
  [[nodiscard]] std::string key_of(const Call& call, std::int64_t row) const;
  /// What is kept is cut to the real tokens.
  [[nodiscard]] bool cuts(const Batch& batch) const { return wrapped_.ignores_padding() && batch.contiguous; }

  const WrappedModel& wrapped_;
  const Verification& verification_;
  OutputBank bank_;
};

}  // namespace llmcache
