// Rules of a calibration in force, with the gates that supervise them, and audits made in the background.
#pragma once

#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "execute/batch.h"
#include "model/probe.h"
#include "refresh/exit_model.h"
#include "refresh/sequential_test.h"

namespace llmcache {

/// A calibrated model, and one gate for each level of its thresholds. Thread-safe.
struct BudgetRules {
  ExitModel exit;
  ScoreFunction scores;
  std::vector<std::unique_ptr<RiskGate>> gates;  ///< by level; empty: nothing is supervised

  /// The most liberal level whose gate is open; the number of levels if all are closed.
  [[nodiscard]] std::size_t level() const;
};

/// An answer that was, or would have been, reused and is to be compared with the full computation.
struct Trial {
  std::size_t level = 0;
  RiskGate::Decision decision;
  at::Tensor answer;  ///< [values]
};

/// Tells the gates of `rules` what the trials of a sequence came to; `full`: its output [values]. Returns the largest
/// error.
double record(BudgetRules& rules, const std::vector<Trial>& trials, const at::Tensor& full);

/// Computes sequences in full on a thread of its own. Thread-safe; what is waiting when it goes is dropped.
class BudgetAudits {
 public:
  BudgetAudits(const Model& model, const OutputSpec& output);
  ~BudgetAudits();

  /// `sequence`: a batch of one row, which it keeps. Dropped, and counted so, where too many are waiting.
  void add(std::shared_ptr<BudgetRules> rules, Batch sequence, std::vector<Trial> trials);
  [[nodiscard]] std::uint64_t dropped() const;
  [[nodiscard]] std::uint64_t waiting() const;

 private:
  static constexpr std::size_t kMostWaiting = 256;
  struct Job {
    std::shared_ptr<BudgetRules> rules;
    Batch sequence;
    std::vector<Trial> trials;
  };
  void work();
  void audit(const Job& job) const;

  const Model& model_;
  const OutputSpec& output_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;  ///< the first is being worked on
  bool stopping_ = false;
  std::uint64_t dropped_ = 0;
  std::thread thread_;
};

}  // namespace llmcache
