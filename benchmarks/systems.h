// What answers requests: the plain model, and caches around it, behind one interface.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "calibration.h"
#include "llmcache/fingerprint/options.h"
#include "loaded_model.h"
#include "outputs.h"
#include "records.h"
#include "settings.h"
#include "token_file.h"

namespace llmcache::bench {

/// One call of a model.
struct Call {
  Rows rows;
  std::vector<RowMarks> marks = {};  ///< one a row, or none
  Inputs inputs = {};
  Output output = Output::kAll;
  std::int64_t first_sequence = 0;  ///< of the token file; the other rows follow it
};

/// What a call returned and did.
struct Answer {
  Returned returned;
  double ms = 0;                          ///< wall time
  double verify_ms = 0;                   ///< comparing answers with the plain model: not in `ms`
  double tokens_computed = 0;             ///< padding included where it was computed
  std::int64_t tokens_reused = 0;         ///< known from calls before
  std::int64_t tokens_shared = 0;         ///< computed for several rows at once
  std::vector<std::int64_t> served_from;  ///< one a row: sequence of the file, or see ServedCounts
};

/// What several systems need of a fill request: set by the first one that does.
struct FillValues {
  std::optional<c10::IValue> output = {};                      ///< of the plain model
  std::optional<std::vector<std::vector<float>>> states = {};  ///< that are fingerprinted
};

/// For one thread.
class System {
 public:
  virtual ~System() = default;

  /// Called before each request and each turn of a conversation.
  virtual void begin() {}
  virtual Answer run(const Call& call) = 0;
  /// Keeps the request for later ones; outside timing.
  virtual void fill(const Call&, FillValues&) {}
  /// True if fill() is worth calling only for requests that have a sequence in common with a later one.
  [[nodiscard]] virtual bool identical_only() const { return true; }
  /// Forgets all requests.
  virtual void clear() {}
  /// From here on counts what describe() tells.
  virtual void start() {}
  /// Fills in settings, shares of reuse and memory.
  virtual void describe(Record&) const {}
};

/// Everything that a system is made from.
struct SystemContext {
  LoadedModel& model;
  const Settings& settings;
  const FingerprintOptions& fingerprint;  ///< of threshold and semantic-cache
  Calibration* calibration = nullptr;     ///< of fidelity budget
};

/// Throws Failure. The model must have been wrapped unless the mode is nocache.
std::unique_ptr<System> make_system(const RunConfig& config, const SystemContext& context);

/// By which LoadedModel knows the cache of a run of mode llmcache.
std::string cache_name(const RunConfig& config, const Settings& settings);

/// Options of a LayerCache for a run of mode llmcache or kvcache.
Options cache_options(const RunConfig& config, const Settings& settings, const FingerprintOptions& fingerprint,
                      std::int64_t layers);

}  // namespace llmcache::bench
