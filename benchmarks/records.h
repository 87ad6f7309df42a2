// Results: what a run of the benchmark measured, and its JSON form.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "machine.h"
#include "statistics.h"

namespace llmcache::bench {

// What the fields mean stands in the list of records.cpp, from which the schema is made. NaN means not measured; NaN,
// and what is empty, is null in JSON.

struct TaskResult {
  std::string metric;
  double value = kNotMeasured;
  double baseline = kNotMeasured;
  double change = kNotMeasured;
  Interval ci95 = {kNotMeasured, kNotMeasured};
};

struct UnsafeServed {
  Rate rate;
  std::int64_t unlabelled = 0;
};

/// Two logits as near as that change places by rounding alone.
inline constexpr double kTiedLogits = 1e-4;

struct GreedyDifference {
  std::int64_t sequence = 0;
  std::int64_t token = 0;
  double gap = 0;
};

struct GreedyResult {
  std::int64_t compared = 0;
  std::int64_t different = 0;
  std::int64_t tied = 0;
  std::vector<GreedyDifference> differences;  ///< the first kListed

  static constexpr std::size_t kListed = 100;
};

struct LaterTurns {
  std::int64_t turns = 0;
  Summary prefill_ms;
  double speedup_vs_nocache = kNotMeasured;
  double speedup_vs_kvcache = kNotMeasured;
  double tokens_reused_fraction = kNotMeasured;
};

struct ObservedError {
  double value = kNotMeasured;
  Interval ci95 = {kNotMeasured, kNotMeasured};
  std::int64_t of = 0;
};

struct ReuseShares {
  double early_exit = 0;
  double cache_free_exit = 0;
  double token_reuse = 0;
  double segment_reuse = 0;
};

struct BudgetResult {
  std::string metric;
  double epsilon = 0;
  double delta = 0;
  bool cache_free = false;
  double promised = kNotMeasured;
  std::int64_t calibration_requests = 0;
  std::optional<std::int64_t> calibration_part;
  ReuseShares share_reused;
  std::vector<double> exits_by_layer;
  std::int64_t audits = 0;
  std::int64_t closings = 0;
  std::int64_t reopenings = 0;
};

struct Divergence {
  double mean = kNotMeasured;
  double p95 = kNotMeasured;
  double max = kNotMeasured;
};

struct Versions {
  std::string llmcache;
  std::string torch;
  std::string compiler;
  std::string model_torch;  ///< that exported the model; empty: unknown
  std::string model_transformers;
};

/// One model on one workload in one mode.
struct Record {
  std::string model;
  std::string weights;
  std::string workload;
  std::string mode;
  std::string fidelity;
  std::string weights_held = "as-loaded";
  std::string weights_sample;
  std::string output = "all";
  std::optional<double> threshold;
  std::string fingerprint;
  std::optional<std::int64_t> fingerprint_layer;
  std::string centring;
  std::string cache_layers;
  std::string eviction;
  std::optional<double> ttl_seconds;
  std::optional<double> audit_rate;
  std::optional<std::int64_t> capacity_bytes;
  std::int64_t threads = 1;
  std::int64_t requests = 0;
  std::int64_t requests_available = 0;
  std::int64_t filled = 0;
  std::int64_t fill_available = 0;
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  double tokens_computed_fraction = kNotMeasured;
  Summary latency_ms;
  double verification_ms = 0;
  double speedup_vs_nocache = kNotMeasured;
  double speedup_median = kNotMeasured;
  double speedup_vs_kvcache = kNotMeasured;
  std::optional<Summary> prefill_ms;
  double prefill_speedup_vs_nocache = kNotMeasured;
  double prefill_speedup_vs_kvcache = kNotMeasured;
  double tokens_reused_fraction = kNotMeasured;
  double tokens_shared_fraction = kNotMeasured;
  std::optional<Summary> decode_ms;
  double tokens_per_second = kNotMeasured;
  std::optional<LaterTurns> later_turns;
  std::optional<GreedyResult> greedy;
  std::optional<BudgetResult> budget;
  std::optional<ObservedError> observed_error;
  double hit_rate = kNotMeasured;
  std::vector<double> hit_rate_by_layer;
  std::optional<TaskResult> task;
  std::optional<TaskResult> second_task;
  double recall = kNotMeasured;
  std::optional<UnsafeServed> unsafe_served;
  std::optional<Rate> same_answer;
  Divergence divergence;
  std::int64_t cache_bytes = 0;
  std::optional<std::uint64_t> shuffle;
  std::string note;
  std::string source;
  Versions versions;
};

/// What wrapping a model cost.
struct WrapCost {
  std::string model;
  std::string weights;
  std::string held;  ///< a format, as ModelProfile::weights has it
  std::string granularity;
  std::vector<std::string> notes;  ///< why something is not available
  double wrap_ms = 0;
  std::int64_t resident_before = 0;  ///< VmRSS, bytes
  std::int64_t resident_after = 0;
  std::int64_t weight_bytes = 0;
  std::int64_t packed_bytes = 0;  ///< of packed weights
};

nlohmann::ordered_json to_json(const Record& record);

/// The whole document.
nlohmann::ordered_json results_json(const Machine& machine, const std::string& command,
                                    const std::vector<Record>& records);

/// The JSON schema of such documents.
nlohmann::ordered_json results_schema();

}  // namespace llmcache::bench
