// What is known so far of the answer to a request: by which rows, from whom, and the report.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "execute/batch.h"
#include "llmcache/report.h"
#include "refresh/verification.h"
#include "reuse/call.h"
#include "reuse/deferred_writes.h"
#include "reuse/fallbacks.h"

namespace llmcache {

/// What a strategy made of some rows in one go.
struct PassResult {
  c10::IValue value;  ///< the model's result for these rows; None: none of them needs it
  /// By row: tensors of a result in place of its part of `value`, batch dimension 1, token dimension cut to its
  /// real tokens. May be empty, and so may each element.
  std::vector<std::vector<at::Tensor>> rows = {};
  bool cut = false;                  ///< `value` has only the tokens that the request's Output names
  bool storable = true;              ///< it is known how it was made: it may be kept
  bool verified = true;              ///< it may be compared with the plain model's
  ForwardReport report;              ///< one sequence a row
  std::vector<SizeCode> sizes = {};  ///< at which what was reused had been computed
};

/// What follows from the sources of a batch alone, and where it came from.
struct KnownSource {
  std::vector<at::Tensor> values;                   ///< BatchSource::values
  std::vector<std::int64_t> reused_tokens;          ///< by row: tokens that were not computed for it
  bool as_model = false;                            ///< computed as the model itself does it, for this batch
  std::vector<SizeCode> sizes;                      ///< as PassResult::sizes
  std::vector<std::shared_ptr<const void>> owners;  ///< kept for as long as the values are read
  double lookup_ms = 0, compute_ms = 0;
};

/// The only place that puts rows together, cuts outputs and writes into ForwardReport::sequences. Belongs to one call
/// and its thread.
class Answers {
 public:
  /// All rows are open. `report` outlives it.
  Answers(const Call& call, ForwardReport& report);

  /// True if every row has an answer. Rows without real tokens need none where all of an output belongs to tokens.
  [[nodiscard]] bool complete() const;
  /// The rows without an answer as a batch of their own. Valid until the next put().
  [[nodiscard]] const Batch& open();
  /// Which rows of the call these are.
  [[nodiscard]] const std::vector<std::int64_t>& open_rows() const;

  /// Why rows are computed of which nothing else is told: by the strategy that computes them (SequenceReport::miss), by
  /// was_evicted(), or by a fallback before that.
  void expect_misses(MissReason reason) noexcept { expected_miss_ = reason; }
  /// The whole output of the row was known once, and went for that reason.
  void was_evicted(std::int64_t row, MissReason because) noexcept { evicted_[static_cast<std::size_t>(row)] = because; }

  /// What a store was asked of the row did not come from it, for that reason.
  void not_stored(std::int64_t row, MissReason because) noexcept { stored_[static_cast<std::size_t>(row)] = because; }

  /// The row's whole output is known: one tensor a leaf, batch dimension 1. `sizes`: see PassResult; empty if the model
  /// would be given just what it was given then.
  /// `owner`: kept for as long as this reads the tensors.
  void put_known(std::int64_t row, std::vector<at::Tensor> tensors, std::vector<SizeCode> sizes,
                 std::shared_ptr<const void> owner);
  /// What is known of the sources of the open rows: open() has it from now on, until the next put().
  void know_source(KnownSource known);
  /// The open rows are computed without what is known of their sources.
  void forget_source() noexcept;
  /// True if some row's source was not computed as the model itself does it.
  [[nodiscard]] bool reused_source() const noexcept { return reused_source_; }

  /// Answers all open rows.
  void put(PassResult pass);
  /// Answers some of them: rows of the call, ascending.
  void put(std::vector<std::int64_t> rows, PassResult pass);

  /// The answer to the request. The call is complete.
  [[nodiscard]] c10::IValue result() const;
  /// Tokens known before the call, by row.
  [[nodiscard]] std::vector<std::int64_t> known_tokens() const;

  struct Pass {
    std::vector<std::int64_t> rows;  ///< of the call
    PassResult result;
  };
  /// What put() was given; empty: all rows were known.
  [[nodiscard]] const std::vector<Pass>& passes() const noexcept { return passes_; }
  /// What the row's answer came from.
  [[nodiscard]] Mechanism mechanism(std::int64_t row) const { return mechanisms_[static_cast<std::size_t>(row)]; }
  [[nodiscard]] const std::vector<SizeCode>& sizes() const noexcept { return sizes_; }
  [[nodiscard]] std::int64_t padding_skipped() const noexcept { return padding_skipped_; }

  [[nodiscard]] ForwardReport& report() noexcept { return report_; }
  [[nodiscard]] const ForwardReport& report() const noexcept { return report_; }
  [[nodiscard]] DeferredWrites& writes() noexcept { return writes_; }
  [[nodiscard]] CallFallbacks& fallbacks() noexcept { return fallbacks_; }

 private:
  [[nodiscard]] MissReason reason_for(const SequenceReport& sequence, std::size_t row) const noexcept;
  [[nodiscard]] c10::IValue assemble() const;
  [[nodiscard]] at::Tensor assemble_leaf(std::size_t leaf, const std::vector<std::vector<at::Tensor>>& computed) const;
  [[nodiscard]] bool cuts() const;
  [[nodiscard]] std::int64_t asked_tokens(std::int64_t row) const;

  const Call& call_;
  ForwardReport& report_;
  std::vector<std::vector<at::Tensor>> known_;  ///< by row; empty: it is not
  std::vector<std::shared_ptr<const void>> owners_;
  bool any_known_ = false;
  mutable bool stale_ = true;  ///< open_rows_ is to be found anew
  mutable std::vector<std::int64_t> open_rows_;
  std::optional<Batch> open_;  ///< unset: all rows, or not made yet
  bool reused_source_ = false;
  std::vector<Pass> passes_;
  std::vector<char> done_;             ///< by row: it is known, or in a pass
  std::vector<Mechanism> mechanisms_;  ///< by row, of those
  std::vector<MissReason> evicted_;    ///< by row; kNew: it was not
  std::vector<MissReason> stored_;     ///< by row: why nothing came from a store; kNew: none was asked, or it did
  MissReason expected_miss_ = MissReason::kNew;
  std::vector<SizeCode> sizes_;
  std::int64_t padding_skipped_ = 0;
  DeferredWrites writes_;
  CallFallbacks fallbacks_;
};

/// Of a result over all tokens of a batch the part that `output` names; `known[row]`: tokens known before the call.
c10::IValue cut_output(const c10::IValue& result, const OutputSpec& spec, const Batch& batch,
                       const std::vector<std::int64_t>& known, Output output);

}  // namespace llmcache
