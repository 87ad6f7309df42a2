// Calibrates a ReuseLadder on a sample of the traffic.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "byte_gauge.h"
#include "first_output.h"
#include "llmcache/refresh/calibration.h"
#include "refresh/ladder_calibration.h"
#include "refresh/output_error.h"
#include "reuse_ladder.h"

namespace llmcache {

/// Made for one calibration, on a ladder of its own: nothing that serves is read or changed. Of one thread.
class LadderCalibrator {
 public:
  /// Of a sample: each runs several times.
  static constexpr std::size_t kMostRequests = 1000;

  /// `ladder` is empty and nobody else's. At most `most_remembered` bytes of outputs are remembered. `gauge` is told
  /// what this holds. All references must outlive it.
  LadderCalibrator(std::unique_ptr<ReuseLadder> ladder, const Model& model, const OutputSpec& output,
                   const ModelProfile& profile, const BudgetOptions& options, std::size_t most_remembered,
                   ByteGauge& gauge);

  /// Runs the first half of the sample with each setting and in full, and chooses a few settings by their errors
  /// (choose_rungs). Serves the second half with each of these as LadderReuse::run() would, what it reuses in full too,
  /// from the safest on: fixed-sequence testing (Learn then Test, arXiv 2110.01052, section 2, the order learnt on
  /// other data). Of those that pass, the last one computes least. Unset if nothing of the sample is ever known from
  /// requests before, or nothing can be certified.
  /// Throws Error(kInvalidInput) if the sample is too small for any of that, Error(kModelFailed) with what the model
  /// raised.
  std::optional<ReuseChoice> calibrate(const std::vector<Batch>& sample);

 private:
  /// What serving by one setting led to.
  struct Trial {
    std::vector<double> errors;  ///< one a sequence
    double computed = 0;         ///< part of the token-layers, mean
  };
  void check_size(std::span<const Batch> sample) const;
  [[nodiscard]] c10::IValue run(const Batch& batch, const ReuseLadder::Matches& matches,
                                const std::vector<char>& reused, std::size_t setting, bool keep, ForwardReport& report);
  std::vector<at::Tensor> compute(const Batch& batch, const std::vector<char>& kept);
  std::vector<at::Tensor> full_outputs(std::size_t request, const Batch& batch);
  std::vector<LadderDraw> explore(std::span<const Batch> sample, std::size_t warm_up, const OutputError& error);
  Trial try_out(std::span<const Batch> sample, std::size_t warm_up, std::size_t setting, double limit,
                const OutputError& error);
  [[nodiscard]] Output asked_for() const;
  [[nodiscard]] double typical_distance(std::span<const Batch> sample) const;

  const std::unique_ptr<ReuseLadder> ladder_;
  const Model& model_;
  const ModelProfile& profile_;
  const BudgetOptions& options_;
  const FirstOutput first_output_;
  const std::size_t most_remembered_;
  std::map<std::size_t, std::vector<at::Tensor>> full_;  ///< by request: what its rows give in full, as far as known
  std::size_t remembered_ = 0;                           ///< bytes of these
  ByteGauge::Share held_;
};

}  // namespace llmcache
