// Cache Refresh and Replacement Controller (LLMCache, arXiv 2512.16843): its settings.
#pragma once

#include <cstdint>
#include <functional>

namespace at {
class Tensor;
}  // namespace at

namespace llmcache {

/// The caller's decision for one sequence, made from the first tensor of its output (batch dimension 1,
/// real tokens only), such as the number of the best class. Called from any thread that calls forward.
using DecisionFunction = std::function<std::int64_t(const at::Tensor& output)>;

/// How far a served answer may be from the full computation. An entry whose answer is beyond any of
/// them is dropped.
struct ErrorTolerance {
  double cosine = 0.05;    ///< largest 1 - cosine of the outputs, 0 to 2
  double relative = 0.35;  ///< largest ||served - full|| / ||full||, 0 or more
};

/// Divergence monitor and ageing. The monitor computes some hits in full as well, compares, and moves
/// the threshold of the layer that the hit came from:
///
///   over tolerance: the entry is dropped, tau += raise * (1 - tau);
///   `clean_audits` audits in a row within tolerance: tau -= lower * (tau - the configured tau).
///
/// So tau never passes 1 and never falls below what was configured.
struct RefreshOptions {
  /// Share of hits that are computed in full too, 0 to 1. Such a call costs as much as a miss, and
  /// returns the full computation's result. Default 0: nothing is audited.
  double audit_rate = 0;
  /// Chooses which hits are audited. Any value; default 0.
  std::uint64_t seed = 0;
  ErrorTolerance tolerance = {};
  /// A changed decision is over tolerance, whatever the numbers say. Empty (default): not asked.
  DecisionFunction decision = {};
  double raise = 0.25;              ///< 0 to 1
  double lower = 0.10;              ///< 0 to 1
  std::uint64_t clean_audits = 20;  ///< 1 or more

  /// Temporal decay flush: an entry goes once its score has fallen below this, whether room is needed
  /// or not. The score is that of bank/decay.h: 1 for an entry just made, half of that a half-life
  /// later, and each use adds 1. Needs Eviction::kDecay. 0 (default): never.
  double flush_below = 0;

  /// Seconds, from any fixed moment on, for TTL and decay. Default: a steady clock. A clock that goes
  /// backwards counts as one that stands still.
  std::function<double()> clock = {};

  /// Throws Error(kInvalidOptions) that names the field at fault.
  void validate() const;
};

}  // namespace llmcache
