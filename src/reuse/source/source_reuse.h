// Encoder-decoders: what follows from a source alone (its encoder's states, and keys and values that the decoder's
// layers make of them) is computed once for a source, and kept.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "bank/output_bank.h"
#include "reuse/exact_match/output_part.h"
#include "reuse/strategy.h"

namespace llmcache {

/// Answers no row: it gives those that do what they need of the sources, so that they do not compute it. Rows of one
/// source compute that once. Keys are all bytes of a source and the tenant.
class SourceReuse final : public ReuseStrategy {
 public:
  /// The model has a source(). `wrapped` and `verification` must outlive it. `total`: the account that the bank's is
  /// part of; null: of none.
  SourceReuse(const WrappedModel& wrapped, const Verification& verification, std::size_t capacity_bytes,
              MemoryAccount* total = nullptr)
      : wrapped_(wrapped), verification_(verification), bank_(capacity_bytes, total) {}

  std::string name() const override { return "source"; }
  bool accepts(const Call& call) const override;
  void serve(const Call& call, Answers& answers) override;
  void clear() override { bank_.clear(); }
  void each_bank(const BankVisitor& visit) override { visit(bank_); }
  void add_to(Stats& stats) const override { add(stats, "sources", bank_.counters()); }
  void add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) override;
  void add_stored(std::vector<std::unique_ptr<StoredPart>>& parts) override;

  /// What of `batch`, whose rows are of the tenant, is known or can be shared, put together for its rows.
  [[nodiscard]] KnownSource find(const Batch& batch, const std::string& tenant, DeferredWrites& writes);

 private:
  struct Distinct;
  struct Found;
  [[nodiscard]] Found look_up(const Batch& batch, const std::string& tenant);
  void compute(const Batch& batch, Found& found, DeferredWrites& writes);
  [[nodiscard]] std::vector<at::Tensor> put_together(const Batch& batch, const Found& found) const;
  [[nodiscard]] RowForms forms() const;
  [[nodiscard]] std::vector<StoredRow> stored_rows(const Call& call) const;

  const WrappedModel& wrapped_;
  const Verification& verification_;
  OutputBank bank_;
};

/// Fills profile.source_reuse: does a model give the same from sources that were computed by themselves, without their
/// padding? Notes why not.
void find_source_reuse(WrappedModel& wrapped);

}  // namespace llmcache
