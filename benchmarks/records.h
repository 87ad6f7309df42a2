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

/// One model on one workload in one mode. NaN means not measured, and is null in JSON.
struct Record {
  std::string model;
  std::string weights;
  std::string workload;
  std::string mode;      ///< "nocache", "llmcache" or "doccache"
  std::string fidelity;  ///< empty (null in JSON) unless llmcache
  // How similar requests were found: unset and empty (null in JSON) where only identical ones count.
  std::optional<double> threshold;
  std::string fingerprint;
  std::optional<std::int64_t> fingerprint_layer;
  std::string centring;
  std::string cache_layers;
  std::string eviction;
  std::optional<double> ttl_seconds;
  std::optional<double> shadow_rate;
  std::optional<std::int64_t> capacity_bytes;  ///< unset for nocache
  int threads = 1;
  std::int64_t requests = 0;            ///< timed
  std::int64_t requests_available = 0;  ///< in the stream
  std::int64_t filled = 0;              ///< requests that were only kept, before
  std::int64_t fill_available = 0;      ///< requests of the workload that only fill
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;  ///< real ones
  double tokens_computed_fraction = kNotMeasured;
  Summary latency_ms;                        ///< per request
  double speedup_vs_nocache = kNotMeasured;  ///< of sums over the same requests
  double speedup_median = kNotMeasured;      ///< median of the ratios of single requests
  double hit_rate = kNotMeasured;
  std::vector<double> hit_rate_by_layer;  ///< empty (null in JSON): the mode has none
  std::optional<TaskResult> task;
  double recall = kNotMeasured;
  std::optional<UnsafeServed> unsafe_served;
  std::optional<Rate> same_answer;
  Summary divergence = {kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured, kNotMeasured};
  std::int64_t cache_bytes = 0;
  std::optional<double> zipf;
  std::optional<std::uint64_t> shuffle;
  std::string source;
  std::string model_torch;  ///< versions that exported the model; empty (null in JSON): unknown
  std::string model_transformers;
};

/// What wrapping a model cost.
struct WrapCost {
  std::string model;
  std::string weights;
  std::string granularity;
  std::vector<std::string> notes;  ///< why something is not available
  double wrap_ms = 0;
  std::int64_t resident_before = 0;  ///< VmRSS, bytes
  std::int64_t resident_after = 0;
  std::int64_t weight_bytes = 0;
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
