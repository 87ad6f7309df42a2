// Linear probes: a classifier on a model's pooled output, fitted beforehand. docs/benchmark-files.md says what their
// files hold.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "token_file.h"

namespace llmcache::bench {

struct LinearProbe {
  std::string workload;
  std::string model;
  std::string model_sha256;
  std::vector<std::string> classes;
  double train_accuracy = 0;        ///< 0 to 1
  std::int64_t fit_sequences = -1;  ///< the first of the fill part, which it was fitted on; -1: all
  std::int64_t dims = 0;
  std::vector<float> weight;  ///< [classes, dims], row by row
  std::vector<float> bias;    ///< [classes]

  /// The class with the largest score; the first of equals. A row with NaN has no class: -1.
  /// `row` must have `dims` entries.
  [[nodiscard]] std::int64_t classify(std::span<const float> row) const;
};

/// Throws Failure that names the file and what is wrong with it.
LinearProbe parse_linear_probe(std::string_view bytes, const std::string& name);

/// FOLDER/WORKLOAD.MODEL.probe.safetensors
std::filesystem::path linear_probe_path(const std::filesystem::path& folder, const std::string& workload,
                                        const std::string& model);

/// The first request of the fill part that the probe was not fitted on: on texts that it was fitted on its decisions
/// are clearer than on others. 0 if it was fitted on all.
std::int64_t first_unfitted(const LinearProbe& probe, const TokenFile& file);

/// The probe of `model` on `file` in `folder`; unset if there is none. Throws Failure if it is
/// damaged, or was fitted for another model, other weights or other classes.
std::optional<LinearProbe> find_linear_probe(const std::filesystem::path& folder, const TokenFile& file,
                                             const ModelFile& model);

}  // namespace llmcache::bench
