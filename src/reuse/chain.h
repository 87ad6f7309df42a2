// Which strategies there are, and in which order a request asks them.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "bank/memory.h"
#include "llmcache/options.h"
#include "model/wrapped_model.h"
#include "refresh/verification.h"
#include "reuse/strategy.h"

namespace llmcache {

/// What a strategy is made from. All of it outlives the strategy.
struct StrategyContext {
  const WrappedModel& wrapped;
  const Options& options;
  const Verification& verification;  ///< may close a mechanism
  MemoryAccount& memory;             ///< all that the cache keeps
};

/// A line of the table: all that the library knows of a strategy by name.
struct StrategyEntry {
  std::vector<Fidelity> chains;  ///< requests of these fidelities ask it, in the order of the table
  /// False: this cache has none.
  bool (*wanted)(const StrategyContext&);
  /// Part of the capacity that the lines before it have left; null: what all others leave.
  double (*share)(const Options&);
  /// Throws Error with the reason if the model or the options do not allow it.
  std::unique_ptr<ReuseStrategy> (*make)(const StrategyContext&, std::size_t capacity_bytes);
};

/// The table. Tests add lines; nobody may while a cache is being made.
std::vector<StrategyEntry>& strategy_table();

/// The strategies of one cache. Const members may be called from many threads at once.
class StrategyChains {
 public:
  explicit StrategyChains(const StrategyContext& context);

  /// In the order in which they are asked.
  [[nodiscard]] const std::vector<ReuseStrategy*>& of(Fidelity fidelity) const;
  [[nodiscard]] const std::vector<std::unique_ptr<ReuseStrategy>>& all() const noexcept { return all_; }
  /// The one of that type; null: there is none.
  template <class Strategy>
  [[nodiscard]] Strategy* find() const noexcept {
    for (const auto& one : all_) {
      if (auto* found = dynamic_cast<Strategy*>(one.get())) return found;
    }
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<ReuseStrategy>> all_;
  std::vector<std::vector<ReuseStrategy*>> chains_;  ///< by fidelity
};

}  // namespace llmcache
