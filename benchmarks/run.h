// A run: one way to answer the requests of an experiment, and what was measured of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "records.h"
#include "scores.h"
#include "settings.h"
#include "systems.h"

namespace llmcache::bench {

/// Counts tokens that come out on top, compared with a reference's.
class GreedyCount {
 public:
  /// Row i of both, [rows, vocabulary], predicts token `first` + i of the sequence.
  void compare(std::int64_t sequence, std::int64_t first, const at::Tensor& reference, const at::Tensor& logits);
  /// The same for a token that was chosen; `reference`: [vocabulary]. True if the reference chooses it too.
  bool compare(std::int64_t sequence, std::int64_t token, const at::Tensor& reference, std::int64_t chosen);

  [[nodiscard]] const GreedyResult& result() const { return result_; }

 private:
  GreedyResult result_;
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
  std::int64_t prompt_tokens = 0, tokens_reused = 0, tokens_shared = 0;  ///< of prompts
  std::int64_t later_prompt_tokens = 0, later_tokens_reused = 0;         ///< of those, of turns behind the first
  double said = 0;                   ///< tokens, those counted that nocache was not given the time for
  std::int64_t hits = 0, asked = 0;  ///< sequences answered from an earlier one, and all

  std::vector<double> errors;                   ///< one a sequence, in the metric of the budget, where one runs
  std::vector<double> divergences;              ///< one a request of which something came back, if nocache runs too
  std::vector<Sample> samples, second_samples;  ///< one a request that can be scored, by each metric of the task
  std::optional<LastLogits> last = {};          ///< of the request before
  GreedyCount greedy;

  /// Adds the calls of a turn; `turn` counts from 0.
  void count(const std::vector<Answer>& answers, const Call& prompt, std::int64_t turn);
  void keep(const Scores& scores);
};

class Setup;

/// Completes `record`, which has what the experiment knows, with what was measured of `run`, beside all runs.
Record record_of(const Run& run, const std::vector<Run>& all, const Setup& setup, Record record);

}  // namespace llmcache::bench
