// Cache Refresh and Replacement Controller (LLMCache, arXiv 2512.16843): watches how far served
// answers are from the full computation, and moves the thresholds.
#pragma once

#include <cstdint>
#include <mutex>
#include <random>
#include <vector>

#include "llmcache/refresh/options.h"
#include "llmcache/report.h"

namespace llmcache {

/// How far a served answer is from the full computation, over all its tensors together.
struct OutputDifference {
  double cosine = 0;    ///< 1 - cosine
  double relative = 0;  ///< ||served - full|| / ||full||
  bool decision_changed = false;
};

/// Thread-safe.
class DivergenceMonitor {
 public:
  /// `taus`: the configured threshold of each bank.
  DivergenceMonitor(RefreshOptions options, std::vector<double> taus);

  /// The threshold of a bank now.
  [[nodiscard]] double tau(std::size_t bank) const;
  /// Draws whether a hit is checked.
  bool choose();
  /// Takes in a check of a hit of a bank; false if it was over tolerance.
  bool record(std::size_t bank, const OutputDifference& difference);
  void add_to(std::size_t bank, LayerStats& stats) const;

 private:
  struct Layer {
    double configured = 0;
    double tau = 0;
    std::uint64_t clean = 0;  ///< audits within tolerance since tau was last moved
    std::uint64_t audits = 0;
    std::uint64_t decision_changes = 0;
    double cosine_sum = 0, cosine_max = 0, relative_sum = 0, relative_max = 0;
  };

  const RefreshOptions options_;
  mutable std::mutex mutex_;
  std::vector<Layer> layers_;
  std::mt19937_64 generator_;
};

}  // namespace llmcache
