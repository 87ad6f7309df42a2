// Approximate states within an error budget: calibrates a ReuseLadder on a sample of the traffic, serves by the chosen
// setting, and watches over it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "llmcache/refresh/calibration.h"
#include "model/probe.h"
#include "refresh/output_error.h"
#include "refresh/sequential_test.h"
#include "reuse_ladder.h"

namespace llmcache {

/// Thread-safe.
class LadderReuse {
 public:
  LadderReuse(std::unique_ptr<ReuseLadder> ladder, const Model& model, const OutputSpec& output,
              const ModelProfile& profile, const BudgetOptions& options);

  [[nodiscard]] const ReuseLadder& ladder() const { return *ladder_; }

  /// Serves the sample, request after request, with each setting and in full, and chooses one by the errors
  /// (choose_setting). Empties the bank before and after. Unset if nothing of the sample is ever known from requests
  /// before, or nothing can be certified.
  std::optional<ReuseChoice> calibrate(const std::vector<Batch>& sample);

  /// Serves by `choice` from here on; unset: nothing is reused. Throws Error(kInvalidOptions) if this version of the
  /// library or this model has no such setting.
  void use(const std::optional<ReuseChoice>& choice);

  /// Runs a batch that can be packed and has a real token. Fills `report`. Unset if nothing may be reused.
  std::optional<c10::IValue> run(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report);

  [[nodiscard]] bool ready() const;
  void clear() { ladder_->clear(); }
  void fill(Stats& stats) const;

 private:
  struct Rules {
    std::size_t setting = 0;
    double limit = 0;
    OutputError error;
    std::unique_ptr<RiskGate> gate;  ///< null: not supervised
  };
  [[nodiscard]] std::shared_ptr<Rules> rules() const;
  [[nodiscard]] at::Tensor first_output(const c10::IValue& result, const Batch& batch, std::int64_t row) const;
  [[nodiscard]] double typical_distance(const std::vector<Batch>& sample) const;

  const std::unique_ptr<ReuseLadder> ladder_;
  const Model& model_;
  const OutputSpec& output_;
  const ModelProfile& profile_;
  const BudgetOptions options_;
  const bool per_token_;
  mutable std::mutex mutex_;
  std::shared_ptr<Rules> rules_;  ///< guarded by mutex_; null: nothing is reused
  std::atomic<std::uint64_t> served_{0};
};

}  // namespace llmcache
