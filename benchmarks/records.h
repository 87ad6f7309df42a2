// Results, and their JSON form (results.schema.json).
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "machine.h"
#include "quality_served.h"
#include "statistics.h"

namespace llmcache::bench {

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

/// What a mode did to the quality of the outputs.
struct TaskResult {
  std::string metric;
  double value = kNotMeasured;
  double baseline = kNotMeasured;  ///< without caching
  double change = kNotMeasured;    ///< value - baseline
  Interval ci95 = {kNotMeasured, kNotMeasured};
};

/// Served requests that may not stand for each other, by their label.
struct UnsafeServed {
  Rate rate;                    ///< over all served
  std::int64_t unlabelled = 0;  ///< of the served: from a text that nobody compared with this one
};

/// Two logits as near as that change places by rounding alone.
inline constexpr double kTiedLogits = 1e-4;

/// A token that comes out on top, but not so in nocache.
struct GreedyDifference {
  std::int64_t sequence = 0;  ///< of the token file
  std::int64_t token = 0;     ///< place in the sequence of what the logits predict
  double gap = 0;             ///< nocache's logit of this token is that much below its best one
};

/// Tokens that come out on top of the logits, against nocache.
struct GreedyResult {
  std::int64_t compared = 0;
  std::int64_t different = 0;
  std::int64_t tied = 0;                      ///< of the different ones, with a gap of kTiedLogits at most
  std::vector<GreedyDifference> differences;  ///< the first kListed

  static constexpr std::size_t kListed = 100;
};

/// Prefill of all turns of conversations but the first.
struct LaterTurns {
  std::int64_t turns = 0;
  Summary prefill_ms;
  double speedup_vs_nocache = kNotMeasured;
  double speedup_vs_kvcache = kNotMeasured;
  double tokens_reused_fraction = kNotMeasured;
};

/// Error of answers against nocache, in the metric of a budget.
struct ObservedError {
  double value = kNotMeasured;
  Interval ci95 = {kNotMeasured, kNotMeasured};
  std::int64_t of = 0;  ///< sequences
};

/// What fidelity budget was allowed and did.
struct BudgetResult {
  std::string metric;  ///< "decision", "relative" or "token"
  double epsilon = 0;
  double delta = 0;
  bool cache_free = false;
  double promised = kNotMeasured;  ///< upper bound of the error, by calibration
  std::int64_t calibration_requests = 0;
  // Of the sequences that asked, the share answered so.
  double early_exit = 0;
  double cache_free_exit = 0;
  double token_reuse = 0;
  double segment_reuse = 0;
  std::vector<double> exits_by_layer;
  std::int64_t audits = 0;
  std::int64_t closings = 0;
  std::int64_t reopenings = 0;
};

/// One model on one workload in one mode. NaN means not measured, and is null in JSON.
struct Record {
  std::string model;
  std::string weights;
  std::string workload;
  std::string mode;                        ///< "nocache", "kvcache", "llmcache" or "doccache"
  std::string fidelity;                    ///< empty (null in JSON) unless llmcache or kvcache
  std::string weights_held = "as-loaded";  ///< or "packed-fp32", "packed-fp16"
  std::string output = "all";              ///< asked for: "all", "last", "new", or "last+new" of two calls
  // How similar requests were found: unset and empty (null in JSON) where only identical ones count.
  std::optional<double> threshold;
  std::string fingerprint;
  std::optional<std::int64_t> fingerprint_layer;
  std::string centring;
  std::string cache_layers;
  std::string eviction;
  std::optional<double> ttl_seconds;
  std::optional<double> shadow_rate;
  std::optional<std::int64_t> capacity_bytes;  ///< unset for nocache and kvcache
  int threads = 1;
  std::int64_t requests = 0;            ///< timed
  std::int64_t requests_available = 0;  ///< in the stream
  std::int64_t filled = 0;              ///< requests that were only kept, before
  std::int64_t fill_available = 0;      ///< requests of the workload that only fill
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;  ///< real ones
  double tokens_computed_fraction = kNotMeasured;
  Summary latency_ms;                        ///< per request
  double verification_ms = 0;                ///< in all, beside the latencies: comparing answers with the plain model
  double speedup_vs_nocache = kNotMeasured;  ///< of sums over the same requests
  double speedup_median = kNotMeasured;      ///< median of the ratios of single requests
  double speedup_vs_kvcache = kNotMeasured;  ///< as against nocache; kvcache with the same weights
  // Of decoders.
  std::optional<Summary>
      prefill_ms;  ///< per request, and per turn of a conversation; empty (null in JSON): not a decoder
  double prefill_speedup_vs_nocache = kNotMeasured;
  double prefill_speedup_vs_kvcache = kNotMeasured;
  double tokens_reused_fraction = kNotMeasured;  ///< of prompts: known from earlier requests
  double tokens_shared_fraction = kNotMeasured;  ///< of prompts: computed for several rows at once
  std::optional<Summary> decode_ms;              ///< per token behind the first; empty: no text was generated
  double tokens_per_second = kNotMeasured;       ///< generated, of all time
  std::optional<LaterTurns> later_turns;
  std::optional<GreedyResult> greedy;
  std::optional<BudgetResult> budget;           ///< empty (null in JSON) but for fidelity budget
  std::optional<ObservedError> observed_error;  ///< where a fidelity budget runs too
  double hit_rate = kNotMeasured;
  std::vector<double> hit_rate_by_layer;  ///< empty (null in JSON): the mode has none
  std::optional<TaskResult> task;
  std::optional<TaskResult> task_per_byte;  ///< of choices: by log-likelihoods a byte
  double recall = kNotMeasured;
  std::optional<UnsafeServed> unsafe_served;
  std::optional<Rate> same_answer;
  Summary divergence = {kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured};
  std::int64_t cache_bytes = 0;
  std::optional<double> zipf;
  std::optional<std::uint64_t> shuffle;
  std::string note;  ///< why it is slower than nocache; empty (null in JSON): it is not
  std::string source;
  std::string model_torch;  ///< versions that exported the model; empty (null in JSON): unknown
  std::string model_transformers;
};

/// What wrapping a model cost.
struct WrapCost {
  std::string model;
  std::string weights;
  std::string held;  ///< "as-loaded", "packed-fp32" or "packed-fp16"
  std::string granularity;
  std::vector<std::string> notes;  ///< why something is not available
  double wrap_ms = 0;
  std::int64_t resident_before = 0;  ///< VmRSS, bytes
  std::int64_t resident_after = 0;
  std::int64_t weight_bytes = 0;
  std::int64_t packed_bytes = 0;  ///< of packed weights
};

/// Of the programs that measured.
struct Versions {
  std::string llmcache;
  std::string torch;
  std::string compiler;
};

nlohmann::ordered_json to_json(const Record& record, const Versions& versions);
/// The inverse of to_json; fields that JSON does not carry keep their defaults.
Record record_from_json(const nlohmann::ordered_json& json);

/// The whole document.
nlohmann::ordered_json results_json(const Machine& machine, const Versions& versions, const std::string& command,
                                    const std::vector<Record>& records);

/// Writes a temporary file beside `path` and renames it, so that `path` is whole or as it was.
/// Throws Failure.
void write_atomically(const std::filesystem::path& path, const std::string& text);

}  // namespace llmcache::bench
