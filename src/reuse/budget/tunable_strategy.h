// What a calibration needs of a way to reuse approximate states: several settings to choose from, and runs with them.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bank/capacity_bank.h"
#include "execute/batch.h"
#include "llmcache/options.h"
#include "llmcache/report.h"
#include "reuse/deferred_writes.h"
#include "reuse/snapshot/snapshot_part.h"

namespace llmcache {

/// Thread-safe.
class TunableStrategy {
 public:
  /// What is known of a batch's rows.
  class Matches {
   public:
    virtual ~Matches() = default;
    /// By row: how far it is from what is known, 0 to 1; unset: nothing is reused for it.
    std::vector<std::optional<double>> distance;
    /// By row: it is known, and reusing that would cost more than it saves. May be empty: none is.
    std::vector<char> not_worth;
  };
  /// A run of a batch that can be packed, and has a real token.
  struct Run {
    const Batch& batch;
    const Matches& matches;           ///< of find(), for this batch
    const std::vector<char>& reused;  ///< by row: with what is known of it; the others in full
    std::size_t setting = 0;
    const std::string& tenant;
    Output output = Output::kAll;  ///< where the head is token-wise, the result is that of these tokens
    /// Rows in full are kept when these are taken; null: they are not.
    DeferredWrites* writes = nullptr;
  };

  virtual ~TunableStrategy() = default;

  [[nodiscard]] virtual std::string name() const = 0;  ///< "token reuse"
  /// Settings to run with, the same in every build of a version of the library.
  [[nodiscard]] virtual std::size_t settings() const = 0;
  [[nodiscard]] virtual std::string describe(std::size_t setting) const = 0;
  /// Largest values of Matches::distance that are worth trying, ascending.
  [[nodiscard]] virtual const std::vector<double>& match_thresholds() const = 0;
  /// While settings are compared: sequences that are this far from what is known, or farther, are kept.
  [[nodiscard]] virtual double kept_from() const = 0;
  /// Shorter sequences are neither kept nor looked up, tokens.
  [[nodiscard]] virtual std::int64_t least_tokens() const = 0;

  [[nodiscard]] virtual std::unique_ptr<Matches> find(const Batch& batch, const std::string& tenant,
                                                      std::size_t setting) = 0;
  [[nodiscard]] virtual c10::IValue run(const Run& run, ForwardReport& report) = 0;
  /// Another one of the same kind, with an empty bank of its own that is part of no account.
  [[nodiscard]] virtual std::unique_ptr<TunableStrategy> fresh() const = 0;
  virtual void clear() = 0;
  virtual void each_bank(const BankVisitor& visit) = 0;
  /// What a snapshot holds of its bank; null: nothing.
  [[nodiscard]] virtual std::unique_ptr<SnapshotPart> snapshot_part() { return nullptr; }
  [[nodiscard]] virtual BankCounters counters() const = 0;
};

}  // namespace llmcache
