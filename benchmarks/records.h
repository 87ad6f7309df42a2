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

struct UnsafeServed {
  Rate rate;
  std::int64_t unlabelled = 0;
};

/// Two logits as near as that change places by rounding alone.
inline constexpr double kTiedLogits = 1e-4;

struct GreedyDifference {
  std::int64_t sequence = 0, token = 0;
  double gap = 0;
};

struct GreedyResult {
  std::int64_t compared = 0, different = 0, tied = 0;
  std::vector<GreedyDifference> differences = {};  ///< the first kListed

  static constexpr std::size_t kListed = 100;
};

struct LaterTurns {
  std::int64_t turns = 0;
  Summary prefill_ms = {};
  double speedup_vs_nocache = kNotMeasured, speedup_vs_kvcache = kNotMeasured, tokens_reused_fraction = kNotMeasured;
};

struct ObservedError : Rate {};

struct ReuseShares {
  double early_exit = 0, cache_free_exit = 0, token_reuse = 0, segment_reuse = 0;
};

struct BudgetResult {
  std::string metric;
  double epsilon = 0, delta = 0;
  bool cache_free = false;
  double promised = kNotMeasured;
  std::int64_t calibration_requests = 0;
  std::optional<std::int64_t> calibration_part = {};
  ReuseShares share_reused = {};
  std::vector<double> exits_by_layer = {};
  std::int64_t audits = 0, closings = 0, reopenings = 0;
};

struct Divergence {
  double mean = kNotMeasured, p95 = kNotMeasured, max = kNotMeasured;
};

struct Versions {
  std::string llmcache, torch, compiler;
  std::string model_torch,
      model_transformers;  ///< that exported the model; empty: unknown
};

/// One model on one workload in one mode.
struct Record {
  std::string model, weights, workload, mode, fidelity;
  std::string weights_held = "as-loaded", weights_sample, output = "all";
  std::optional<double> threshold;
  std::string fingerprint;
  std::optional<std::int64_t> fingerprint_layer;
  std::string centring, cache_layers, eviction;
  std::optional<double> ttl_seconds, audit_rate;
  std::optional<std::int64_t> capacity_bytes;
  std::int64_t threads = 1;
  std::int64_t requests = 0, requests_available = 0, filled = 0, fill_available = 0, sequences = 0, tokens = 0;
  double tokens_computed_fraction = kNotMeasured;
  Summary latency_ms;
  double verification_ms = 0;
  double speedup_vs_nocache = kNotMeasured, speedup_median = kNotMeasured, speedup_vs_kvcache = kNotMeasured;
  std::optional<Summary> prefill_ms;
  double prefill_speedup_vs_nocache = kNotMeasured, prefill_speedup_vs_kvcache = kNotMeasured;
  double tokens_reused_fraction = kNotMeasured, tokens_shared_fraction = kNotMeasured;
  std::optional<Summary> decode_ms;
  double tokens_per_second = kNotMeasured;
  std::optional<LaterTurns> later_turns;
  std::optional<GreedyResult> greedy;
  std::optional<BudgetResult> budget;
  std::optional<ObservedError> observed_error;
  double hit_rate = kNotMeasured;
  std::vector<double> hit_rate_by_layer;
  std::optional<Comparison> task, second_task;
  double recall = kNotMeasured;
  std::optional<UnsafeServed> unsafe_served;
  std::optional<Rate> same_answer;
  Divergence divergence;
  std::int64_t cache_bytes = 0;
  std::optional<std::uint64_t> shuffle;
  std::string note, source;
  Versions versions;

  [[nodiscard]] bool random_weights() const { return weights.starts_with("random"); }
};

/// What wrapping a model cost.
struct WrapCost {
  std::string model;
  std::string weights;
  std::string held;  ///< a format, as ModelProfile::weights has it
  std::string granularity;
  std::vector<std::string> notes;  ///< why something is not available
  std::string saved_profile;       ///< what became of it, as ModelProfile::file_note has it
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
