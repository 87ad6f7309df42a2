// Rows whose whole outputs are known: found by everything that went into them, put together with computed ones, kept.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bank/output_bank.h"
#include "execute/batch.h"
#include "kept_later.h"
#include "llmcache/model/layered_model.h"
#include "llmcache/report.h"
#include "model/probe.h"

namespace llmcache {

/// Rows of a batch whose outputs are known, and those that have to be computed.
struct KnownRows {
  /// None is known.
  explicit KnownRows(std::size_t rows);

  std::vector<std::string> keys;  ///< empty for a row that cannot be kept
  std::vector<std::shared_ptr<const OutputEntry>> entries;
  std::vector<std::int64_t> missing;
};

/// Thread-safe, as its bank is.
class KnownOutputs {
 public:
  /// All but `capacity_bytes` must outlive it. Runs the model, for the structure of its result. `total`: the account
  /// that the bank's is part of; null: of none.
  KnownOutputs(const Model& model, const InputSpec& inputs, const OutputSpec& output, const ModelProfile& profile,
               std::size_t capacity_bytes, MemoryAccount* total = nullptr);

  /// True if a row's output is its own business, so that it can be kept.
  static bool keeps_rows(const ModelProfile& profile) { return profile.rows_independent && profile.per_row_output; }

  /// `exact`: only outputs that the model made as it is. Writes to the report of the rows that are known.
  [[nodiscard]] KnownRows look_up(const Batch& batch, const std::string& tenant, bool exact, ForwardReport& report);
  /// A result for all rows: known ones from their own tensors (none: not known), the others from `computed`, whose row
  /// number i is that of missing[i]. Padding is zero.
  [[nodiscard]] c10::IValue assemble(const Batch& batch, const std::vector<std::vector<at::Tensor>>& known,
                                     const std::vector<std::int64_t>& missing, const c10::IValue& computed) const;
  [[nodiscard]] c10::IValue assemble(const Batch& batch, const KnownRows& known, const c10::IValue& computed) const;
  /// Adds to `kept` the missing rows of `result`, whose row number i is that of missing[i], unless they are
  /// approximations; nobody writes to them before that is committed. They were computed in one batch, of the width of
  /// `batch`. `exact`: the model made them as it is. `small_only`: only rows that take little and that nothing was
  /// known of.
  void keep(const Batch& batch, const KnownRows& known, const c10::IValue& result, bool exact, bool small_only,
            const ForwardReport& report, KeptLater& kept);
  /// True if all of a row's output belongs to single tokens.
  [[nodiscard]] bool all_per_token() const noexcept { return all_per_token_; }
  /// A result of `rows` rows without any token.
  [[nodiscard]] c10::IValue no_tokens(std::int64_t rows) const;

  void clear() { bank_.clear(); }
  [[nodiscard]] OutputBank::Counters counters() const { return bank_.counters(); }

 private:
  /// Packing answers each row for itself, whatever the padding around it. Otherwise the padding is part of the key.
  [[nodiscard]] bool ignores_padding() const {
    return profile_.granularity != Granularity::kWholeLayers && profile_.row_obstacle.empty();
  }
  /// Everything that decides a row's output, byte by byte.
  [[nodiscard]] std::string key_of(const Batch& batch, const std::vector<at::Tensor>& on_cpu, std::int64_t row,
                                   const std::string& tenant) const;

  const Model& model_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  bool all_per_token_ = false;
  c10::IValue skeleton_;  ///< the structure of a result, without data; none where rows are not kept
  OutputBank bank_;
};

}  // namespace llmcache
