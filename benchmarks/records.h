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
#include "statistics.h"

namespace llmcache::bench {

inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

/// One model on one workload in one mode. NaN means not measured, and is null in JSON.
struct Record {
  std::string model;
  std::string weights;
  std::string workload;
  std::string mode;      ///< "nocache" or "llmcache"
  std::string fidelity;  ///< empty (null in JSON) for nocache
  int threads = 1;
  std::int64_t requests = 0;            ///< timed
  std::int64_t requests_available = 0;  ///< in the stream
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;  ///< real ones
  double tokens_computed_fraction = kNotMeasured;
  Summary latency_ms;                        ///< per request
  double speedup_vs_nocache = kNotMeasured;  ///< of sums over the same requests
  double speedup_median = kNotMeasured;      ///< median of the ratios of single requests
  double hit_rate = kNotMeasured;
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
