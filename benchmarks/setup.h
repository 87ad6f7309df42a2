// What an experiment is set up from: what can be measured of a model on a workload, and the runs that do.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "calibration.h"
#include "experiment.h"
#include "linear_probe.h"
#include "run.h"
#include "scores.h"

namespace llmcache::bench {

class Setup {
 public:
  /// `context` must outlive it. Throws Failure.
  explicit Setup(const ExperimentContext& context);

  /// All that the settings ask for and is possible; they refer to this object. Throws Failure.
  std::vector<Run> make_runs();

  [[nodiscard]] bool judged() const { return judged_; }        ///< the weights are real ones
  [[nodiscard]] bool decoder() const { return decoder_; }      ///< it can reuse prefixes
  [[nodiscard]] bool generates() const { return generates_; }  ///< text is generated
  [[nodiscard]] Task task() const { return tokens_.task; }
  [[nodiscard]] const Scorer& scorer() const { return scorer_; }
  [[nodiscard]] const Calibration& calibration() const { return calibration_; }
  /// What is asked of the runs that choose: the setting, or what the task needs.
  [[nodiscard]] std::string output() const;
  /// The top tokens of the logits can be compared.
  [[nodiscard]] bool compares_greedy() const;

 private:
  [[nodiscard]] bool reuses_prefixes() const;
  [[nodiscard]] std::optional<LinearProbe> linear_probe() const;
  [[nodiscard]] bool can_have_budgets() const;
  [[nodiscard]] bool has_quality() const;
  [[nodiscard]] double threshold_for(double epsilon, RunConfig config);
  [[nodiscard]] std::vector<Nearest> find_nearest(const Options& options) const;
  [[nodiscard]] std::shared_ptr<const PcaModel> pca() const;

  const ExperimentContext& context_;
  LoadedModel& model_;
  const TokenFile& tokens_;
  const Settings& settings_;
  const bool judged_;
  const bool decoder_;
  const bool generates_;
  const std::optional<LinearProbe> probe_;
  const Scorer scorer_;
  Calibration calibration_;
  std::map<std::string, std::vector<Nearest>> nearest_;  ///< by how weights are held
  FingerprintOptions fingerprint_;
};

}  // namespace llmcache::bench
