// The ways to run a request that are measured side by side: one variant for each Setting.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "calibration.h"
#include "llmcache/fingerprint/options.h"
#include "loaded_model.h"
#include "outputs.h"
#include "records.h"
#include "token_file.h"

namespace llmcache::bench {

/// One call of a model.
struct Call {
  Rows rows;
  Inputs inputs;
  Output output = Output::kAll;
};

/// A request of a token file, ready to run.
struct Request {
  std::int64_t number = 0;          ///< in the file
  std::int64_t first_sequence = 0;  ///< of the file; the other rows follow it
  Rows rows;                        ///< cut to what the model takes
  Inputs inputs;
  std::int64_t tokens = 0;  ///< real
  std::int64_t padded = 0;  ///< batch x width

  /// How a variant that computes exactly runs it: at once, or a prompt and then the whole. Others run the whole and
  /// return all.
  std::vector<Call> calls = {};
};

/// What a run of a request did.
struct Run {
  std::vector<Returned> returned;         ///< one a call
  std::vector<double> ms;                 ///< wall time, one a call
  double verify_ms = 0;                   ///< comparing answers with the plain model: not in `ms`
  double tokens_computed = 0;             ///< padding included where it was computed
  std::int64_t tokens_reused = 0;         ///< of the first call, known from calls before
  std::int64_t tokens_shared = 0;         ///< of the first call, computed for several rows at once
  std::vector<std::int64_t> served_from;  ///< one a row: sequence of the file, or see ServedCounts

  [[nodiscard]] double total_ms() const;
};

/// What several variants need of a fill request: each is computed once, when first asked for.
struct FillRun {
  std::function<const c10::IValue&()> output;                      ///< of the plain model
  std::function<const std::vector<std::vector<float>>&()> states;  ///< that are fingerprinted
};

/// For one thread.
class Variant {
 public:
  virtual ~Variant() = default;

  /// Makes what takes long and requests like this one need.
  virtual void prepare(const Request&) {}
  /// Called before each request and each turn of a conversation.
  virtual void begin() {}
  virtual Run run(const Request& request) = 0;
  /// Keeps the request for later ones; outside timing.
  virtual void fill(const Request& request, const FillRun& run) = 0;
  /// True if fill() is worth calling only for requests that have a sequence in common with a later one.
  [[nodiscard]] virtual bool identical_only() const = 0;
  /// Forgets all requests.
  virtual void clear() = 0;
  /// From here on counts what describe() tells.
  virtual void start() = 0;
  /// Fills in settings, hits and memory.
  virtual void describe(Record& record) const = 0;
};

/// Everything that a variant is made from.
struct VariantContext {
  LoadedModel& model;
  const Arguments& arguments;
  const TokenFile& tokens;
  const FingerprintOptions& fingerprint;  ///< of threshold and doccache
  Calibration* calibration = nullptr;     ///< of fidelity budget
};

/// Throws Failure. The model must have been wrapped unless the mode is nocache.
std::unique_ptr<Variant> make_variant(const Setting& setting, const VariantContext& context);

/// By which LoadedModel knows the cache of a setting of mode llmcache.
std::string cache_name(const Setting& setting, const Arguments& arguments);

/// Options of a LayerCache for a setting of mode llmcache or kvcache.
Options cache_options(const Setting& setting, const Arguments& arguments, const FingerprintOptions& fingerprint,
                      std::int64_t layers);

}  // namespace llmcache::bench
