// The run loop: one model on one workload, answered in all ways side by side.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "files.h"
#include "loaded_model.h"
#include "machine.h"
#include "records.h"
#include "settings.h"
#include "token_file.h"

namespace llmcache::bench {

/// What an experiment is made from; all of it must outlive run_experiment().
struct ExperimentContext {
  LoadedModel& model;
  const ModelFile& file;
  const TokenFile& tokens;
  const Settings& settings;
  double seconds;  ///< filling and warm-up included; one request always runs
  Progress& progress;

  /// Most tokens of a sequence.
  [[nodiscard]] std::int64_t cut() const {
    return file.max_tokens > 0 ? file.max_tokens : std::numeric_limits<std::int64_t>::max();
  }
  /// The module's inputs for a request of the file.
  [[nodiscard]] Inputs inputs(std::int64_t request) const {
    return model.inputs(tokens.request(request, cut()), tokens.marks(request, cut()));
  }
  template <class... Parts>
  void note(fmt::format_string<Parts...> text, Parts&&... parts) const {
    progress.note("note: " + fmt::format(text, std::forward<Parts>(parts)...));
  }
};

/// Measures; one record for each run. Throws Failure, or what the model throws.
std::vector<Record> run_experiment(const ExperimentContext& context);

}  // namespace llmcache::bench
