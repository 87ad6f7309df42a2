// What probing found about a model, on disk (Options::profile_path). docs/saved-profiles.md describes the format.
#pragma once

#include <c10/core/Device.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "llmcache/model/profile.h"
#include "llmcache/options.h"
#include "model/graph_findings.h"
#include "model/wrapped_model.h"

namespace llmcache {

/// Of the format, and of what is probed and how: a file of another one is not read.
constexpr int kSavedProfileVersion = 4;

struct SavedProfile {
  /// What it holds under, beside the model: by name, as texts that must be equal.
  std::map<std::string, std::string> conditions;
  std::string digest;                    ///< of the model
  Weights weights = Weights::kAsLoaded;  ///< the format that they are held in; never kFastest
  std::optional<GraphFindings> graph;    ///< known; none: the model was not run before it was probed
  OutputSpec output;
  ModelProfile profile;  ///< what probing fills, and all notes; the rest is the model's to describe

  /// Throws DamagedData that names the first condition that is another one now.
  void check_conditions(const Options& options, at::Device device) const;
  [[nodiscard]] std::string to_json() const;
};

/// Gives `profile`, which describes the model itself, what probing found.
void take_probed(ModelProfile& profile, const ModelProfile& probed);

/// What was found about a wrapped model, of now.
SavedProfile saved_profile_of(const WrappedModel& wrapped, const Options& options);

/// Throws DamagedData if anything is not as to_json() writes it. White space does not count.
SavedProfile parse_saved_profile(std::string_view json);

/// Throws DamagedData as parse_saved_profile(), and UnreadableFile.
SavedProfile read_saved_profile(const std::filesystem::path& path);

/// Puts it in the place of the file at once, so that nobody ever sees half of it. Empty, or why it cannot be written.
std::string write_saved_profile(const std::filesystem::path& path, const SavedProfile& saved);

}  // namespace llmcache
