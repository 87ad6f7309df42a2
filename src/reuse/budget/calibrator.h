// Calibrates a TunableStrategy on a sample of the traffic.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llmcache/options.h"
#include "llmcache/refresh/calibration.h"
#include "model/wrapped_model.h"
#include "refresh/candidate_choice.h"
#include "refresh/output_error.h"
#include "reuse/budget/byte_gauge.h"
#include "reuse/budget/first_output.h"
#include "reuse/budget/tunable_strategy.h"

namespace llmcache {

/// A candidate is a setting with a match threshold. Made for one calibration, on a strategy of its own: nothing that
/// serves is read or changed. Of one thread.
class Calibrator {
 public:
  /// Of a sample: each runs several times.
  static constexpr std::size_t kMostRequests = 1000;

  /// `strategy` is empty and nobody else's. At most `most_remembered` bytes of outputs are remembered. `gauge` is told
  /// what this holds. All references must outlive it, the sample too.
  Calibrator(std::unique_ptr<TunableStrategy> strategy, const WrappedModel& wrapped, const BudgetOptions& options,
             std::size_t most_remembered, ByteGauge& gauge, const ProgressFunction& progress);

  /// Runs the first half of the sample with each setting and in full. False: nothing of it is ever known from requests
  /// before, and reason() says so. Throws Error(kInvalidInput) if the sample is too small, Error(kModelFailed) with
  /// what the model raised. Once, before all else.
  bool explore(const std::vector<Batch>& sample);
  /// Part of the token-layers that would be computed of the sequences of `least_tokens` or more, at an error of
  /// `epsilon` of all traffic, by the first half; unset: there is no such candidate.
  [[nodiscard]] std::optional<double> expected_cost(double epsilon, std::int64_t least_tokens) const;
  /// Part of the tokens of the sample that belongs to such sequences.
  [[nodiscard]] double token_share(std::int64_t least_tokens) const;
  /// Of the longest sequence of the first half.
  [[nodiscard]] std::int64_t longest() const;

  /// Serves the second half with up to three candidates that the first half chose by their errors
  /// (choose_candidates()), as StateReuse::run() would, what it reuses in full too, from the safest on: fixed-sequence
  /// testing (Learn then Test, arXiv 2110.01052, section 2, the order learnt on other data). Of those that pass, the
  /// last one computes least. Shorter sequences than `least_tokens` are left alone. Unset if nothing can be certified:
  /// reason() says so.
  [[nodiscard]] std::optional<ReuseChoice> certify(const Budget& budget, std::int64_t least_tokens);
  [[nodiscard]] const std::string& reason() const noexcept { return reason_; }

 private:
  /// What serving by one candidate led to.
  struct TrialRun {
    std::vector<double> errors;  ///< one a sequence
    double computed = 0;         ///< part of the token-layers
  };
  void check_size() const;
  [[nodiscard]] c10::IValue run(const Batch& batch, const TunableStrategy::Matches& matches,
                                const std::vector<char>& reused, std::size_t setting, bool keep, ForwardReport& report);
  std::vector<at::Tensor> compute(const Batch& batch, const std::vector<char>& kept);
  std::vector<at::Tensor> full_outputs(std::size_t request, const Batch& batch);
  void explore_request(const Batch& batch, const std::vector<char>& kept, bool counts);
  [[nodiscard]] std::vector<CandidateDraw> draws_from(std::int64_t least_tokens) const;
  TrialRun try_out(std::size_t setting, double match_threshold, std::int64_t least_tokens);
  [[nodiscard]] Output asked_for() const;
  [[nodiscard]] double typical_distance() const;
  [[nodiscard]] bool binary() const;

  const std::unique_ptr<TunableStrategy> strategy_;
  const WrappedModel& wrapped_;
  const BudgetOptions& options_;
  const FirstOutput first_output_;
  const std::size_t most_remembered_;
  std::span<const Batch> sample_;  ///< as far as it counts
  std::size_t warm_up_ = 0;        ///< requests that fill the bank before anything counts
  std::size_t explored_ = 0;       ///< requests that put candidates in order; the others certify
  double typical_distance_ = 0;
  std::unique_ptr<OutputError> error_;
  std::vector<CandidateDraw> draws_;
  std::map<std::size_t, std::vector<at::Tensor>> full_;  ///< by request: what its rows give in full, as far as known
  std::size_t remembered_ = 0;                           ///< bytes of these
  ByteGauge::Share held_;
  const ProgressFunction& progress_;
  std::string reason_;
};

}  // namespace llmcache
