// What a calibration needs of a way to reuse approximate states: several settings to choose from, and runs with them.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "execute/batch.h"
#include "kept_later.h"
#include "llmcache/options.h"
#include "llmcache/report.h"

namespace llmcache {

/// Thread-safe.
class ReuseLadder {
 public:
  /// What is known of a batch's rows.
  class Matches {
   public:
    virtual ~Matches() = default;
    /// By row: how far it is from what is known, 0 to 1; unset: nothing is reused for it.
    std::vector<std::optional<double>> distance;
  };
  struct Counters {
    std::uint64_t entries = 0, insertions = 0, evictions = 0, rejected = 0;
    std::size_t bytes = 0, peak_bytes = 0;
  };

  virtual ~ReuseLadder() = default;

  [[nodiscard]] virtual std::string name() const = 0;  ///< "token reuse"
  /// Settings to run with, the same in every build of a version of the library.
  [[nodiscard]] virtual std::size_t settings() const = 0;
  [[nodiscard]] virtual std::string describe(std::size_t setting) const = 0;
  /// Limits of Matches::distance that are worth trying, ascending.
  [[nodiscard]] virtual const std::vector<double>& limits() const = 0;
  /// While settings are compared: sequences that are this far from what is known, or farther, are kept.
  [[nodiscard]] virtual double kept_from() const = 0;

  [[nodiscard]] virtual std::unique_ptr<Matches> find(const Batch& batch, const std::string& tenant,
                                                      std::size_t setting) = 0;
  /// Runs a batch that can be packed, and has a real token: rows in `reused` with what is known of them, the others in
  /// full, which are kept when `kept` is committed; null: they are not. Fills `report`. The result is that of `output`
  /// where the head is token-wise.
  [[nodiscard]] virtual c10::IValue run_for(const Batch& batch, const Matches& matches, const std::vector<char>& reused,
                                            std::size_t setting, const std::string& tenant, Output output,
                                            KeptLater* kept, ForwardReport& report) = 0;
  /// The same by itself, outside of a call: what is to be kept is, at once.
  [[nodiscard]] c10::IValue run(const Batch& batch, const Matches& matches, const std::vector<char>& reused,
                                std::size_t setting, const std::string& tenant, Output output, bool keep,
                                ForwardReport& report) {
    KeptLater kept;
    auto result = run_for(batch, matches, reused, setting, tenant, output, keep ? &kept : nullptr, report);
    kept.commit();
    return result;
  }
  virtual void clear() = 0;
  [[nodiscard]] virtual Counters counters() const = 0;
};

}  // namespace llmcache
