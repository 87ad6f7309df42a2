// A run: one way to answer the requests of an experiment, and what was measured of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "greedy.h"
#include "quality_score.h"
#include "quality_served.h"
#include "records.h"
#include "run_config.h"
#include "systems.h"

namespace llmcache::bench {

/// Sums of squares, for a relative L2 distance.
struct Distance {
  double difference = 0;
  double norm = 0;
};

struct Run {
  Run(RunConfig run_config, std::unique_ptr<System> made, const TokenFile& file)
      : config(std::move(run_config)), system(std::move(made)), served(file) {}

  RunConfig config;
  std::unique_ptr<System> system;
  ServedCounts served;

  std::vector<double> latencies;       ///< ms, one a request
  std::vector<double> prefills;        ///< ms, one a turn: until the first call was back
  std::vector<double> later_prefills;  ///< of these, those of turns behind the first
  std::vector<double> decodes;         ///< ms, one a generated token but the first
  double verify_ms = 0;                ///< beside the latencies
  std::int64_t tokens = 0;             ///< real ones that a plain pass without repetition would compute
  double tokens_computed = 0;          ///< padding included where it was computed
  std::int64_t prompt_tokens = 0;
  std::int64_t tokens_reused = 0;  ///< of prompts
  std::int64_t tokens_shared = 0;  ///< the same
  std::int64_t later_prompt_tokens = 0;
  std::int64_t later_tokens_reused = 0;
  double said = 0;         ///< tokens, those counted that nocache was not given the time for
  std::int64_t hits = 0;   ///< sequences answered from an earlier one
  std::int64_t asked = 0;  ///< all sequences

  std::vector<double> errors;           ///< one a sequence, in the metric of the budget, where one runs
  std::vector<double> divergences;      ///< one a request of which something came back, if nocache runs too
  std::vector<Sample> samples;          ///< one a request that can be scored
  std::vector<Sample> second_samples;   ///< the same by the second metric of the task, if it has two
  std::optional<LastLogits> last = {};  ///< of the request before
  GreedyCount greedy;

  /// Adds the calls of a turn; `turn` counts from 0.
  void count(const std::vector<Answer>& answers, const Call& prompt, std::int64_t turn);
  void keep(const Scores& scores);
};

/// What all runs of an experiment have in common in their records.
struct RunContext {
  const Scorer& scorer;
  BudgetMetric budget_metric;
  Task task;
  std::string output;      ///< that is asked of those that choose it
  bool decoder = false;    ///< prefixes can be reused
  bool generates = false;  ///< text is generated
  bool judged = false;     ///< the weights are real ones
  bool greedy = false;     ///< top tokens are compared
};

/// Completes `record`, which has what the experiment knows, with what was measured of `run`, beside all runs.
Record record_of(const Run& run, const std::vector<Run>& all, const RunContext& context, Record record);

}  // namespace llmcache::bench
