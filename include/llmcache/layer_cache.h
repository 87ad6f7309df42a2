// LayerCache: wraps a loaded transformer, keeps what it computed, runs what it must.
#pragma once

#include <ATen/core/ivalue.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llmcache/error.h"
#include "llmcache/execute/sequence_state.h"
#include "llmcache/layer_hook.h"
#include "llmcache/match/plan.h"
#include "llmcache/model/layered_model.h"
#include "llmcache/model/profile.h"
#include "llmcache/options.h"
#include "llmcache/refresh/calibration.h"
#include "llmcache/report.h"
#include "llmcache/snapshot.h"
#include "llmcache/tenants.h"

namespace llmcache {

/// The part of LayerCache that does not depend on the type of the model.
///
/// Thread safety: every member may be called from many threads at once. Calls of forward() run the
/// model in parallel; only look-up and insertion are serialised.
class LayerCacheBase {
 public:
  LayerCacheBase(const LayerCacheBase&) = delete;
  LayerCacheBase& operator=(const LayerCacheBase&) = delete;
  /// Moves the cache with all that it keeps. No call may be running on either. A cache that was moved from can only be
  /// destroyed or assigned to.
  LayerCacheBase(LayerCacheBase&&) noexcept;
  LayerCacheBase& operator=(LayerCacheBase&&) noexcept;

  /// Runs the model on `inputs` and returns what the model itself would return, within the
  /// request's fidelity. Runs without gradients. Inputs are not modified; nothing returned aliases
  /// a cached tensor. Where a batch is packed (Options::packing_cost_tokens) or a row comes from the cache, output
  /// entries at padding positions are zero (the plain model leaves arbitrary values there). With RequestOptions::output
  /// other than kAll, token dimensions cover the tokens asked for only.
  ///
  /// Fidelity kLossless on a causal model (ModelProfile::prefix_reuse): tokens of the longest prefix
  /// known from any request of the tenant are not computed again, and those that are become known.
  /// A generation loop calls forward() with the whole growing sequence, output kLastToken.
  ///
  /// `inputs`: integral or bool tensors `[batch, tokens]` on the model's device, in the order of the
  /// model's own forward; optional inputs may be left out or None.
  ///
  /// Throws Error: kInvalidInput (wrong number, type, rank, shape, device), kInvalidOptions,
  /// kModelChanged, kModelFailed (the model's own
  /// error, nested). The cache is then as it was before the call.
  c10::IValue forward(const Inputs& inputs, const RequestOptions& options = {});

  /// Tells that forward() will be called with the same arguments soon, so that what the store below the memory
  /// (Options::store) has of them can be fetched while the request waits for its turn. Returns at once: a thread of the
  /// cache fetches. Does nothing without a store. Inputs are copied. Throws Error(kInvalidInput) and
  /// Error(kInvalidOptions) as forward() does, and Error(kModelChanged).
  void prefetch(const Inputs& inputs, const RequestOptions& options = {});

  /// Runs exactly `plan`, looking nothing up and keeping nothing: the hook by which partial
  /// recomputation is tested and timed. `donors` are numbered as the plan numbers them. If `capture`
  /// is given it receives one state a sequence of the plan, in its order.
  ///
  /// Throws Error as forward(), and kNotAvailable if the model's granularity does not allow the
  /// plan, kInvalidOptions if plan, inputs and donors do not fit together.
  c10::IValue forward_plan(const Inputs& inputs, const Plan& plan,
                           const std::vector<std::shared_ptr<const SequenceState>>& donors = {},
                           std::vector<std::shared_ptr<const SequenceState>>* capture = nullptr);

  /// The plan that forward() would run for `inputs` if nothing was known: every real token through
  /// every layer. Throws Error(kInvalidInput), also where the mask has holes.
  [[nodiscard]] Plan full_plan(const Inputs& inputs) const;

  /// Mean over the real tokens of each row's hidden state at `layer` (0: the embedding output, k: the
  /// output of the first k layers): what fingerprints are made of. One vector of float a row, of the
  /// profile's `hidden` values; empty for a row without real tokens. Runs no deeper layer, keeps
  /// nothing. Throws Error as forward(), and kNotAvailable where the model runs whole layers only.
  [[nodiscard]] std::vector<std::vector<float>> pooled_state(const Inputs& inputs, std::int64_t layer = 0) const;

  /// For a cache made for Fidelity::kBudget: runs a sample of the traffic in full (no labels are needed), fits what is
  /// to be reused, finds out how readily it may be (CalibrationProfile tells how), and goes by the result from then on.
  /// `sample` gives one batch after another, and nothing at the end: requests drawn independently from what will be
  /// served, in the thousands for an epsilon of 0.01. Identical ones count once. Nothing of it is kept but the banks;
  /// token states that were kept before are dropped when the result is taken over.
  ///
  /// Other calls may go on meanwhile, clear() included; those that begin later go by the result. A calibration shares
  /// nothing with them: it works in a bank of its own, as large as the one that serves may be (Options::capacity_bytes
  /// times BudgetOptions::capacity_share). Beside that it holds the sample (CalibrationSample::bytes) and outputs to
  /// compare with, at most as large as that bank or 256 MiB; BudgetStats::calibrating_bytes has the sum while it runs.
  /// Of several at once one runs after the other.
  ///
  /// What `sample` and BudgetOptions::scores throw passes through unchanged. All else is Error: kInvalidInput for a bad
  /// batch, or a sample that is too small (the message says how many sequences are needed at least and how many came);
  /// kModelFailed with what the model raised nested; kInvalidOptions if the cache was made for another fidelity, or the
  /// metric of the budget cannot work for this model; kNotAvailable with the reason where the model offers nothing to
  /// reuse, or where the fit cannot be made; kModelChanged. What was in force stays in force then.
  CalibrationProfile calibrate(const std::function<std::optional<Inputs>()>& sample);
  CalibrationProfile calibrate(const std::vector<Inputs>& sample);
  /// The two steps of it: running the sample, and fitting and certifying, which may be repeated for other budgets.
  [[nodiscard]] CalibrationSample run_sample(const std::function<std::optional<Inputs>()>& sample) const;
  CalibrationProfile calibrate(const CalibrationSample& sample);
  /// Goes by a profile that was made before, for the same model and options; token states that were kept before are
  /// dropped. Throws Error(kInvalidOptions) that says what does not fit; what was in force stays then.
  void use_calibration(const CalibrationProfile& profile);
  /// The profile in force; unset if there is none.
  [[nodiscard]] std::optional<CalibrationProfile> calibration() const;

  /// Writes all that is kept (whole outputs, prefixes, token states of encoders, the calibration) into a file, so that
  /// another process goes on where this one is. Calls may be running. The file is replaced in one step: whoever opens
  /// it sees the one before or the new one, whatever happens meanwhile. docs/operations.md has more,
  /// docs/snapshot-format.md every byte.
  /// Throws Error: kInvalidFile if it cannot be written, kModelChanged, kNotAvailable if the cache was cleared, a
  /// tenant erased, or its weights changed, meanwhile. The file is then as it was.
  SnapshotReport save(const std::filesystem::path& path);
  /// Makes known what a file of save() holds, as far as there is room without evicting, most valuable first. Calls may
  /// be running. Nothing is taken of a file that is missing, damaged, of another model or of a later version of the
  /// format: SnapshotReport::refused says why. Only files of a source that is trusted should be loaded: checksums find
  /// damage, not intent. Throws Error(kModelChanged).
  SnapshotReport load(const std::filesystem::path& path);

  /// What the latest call of forward() or forward_plan() on this cache did that was made by the
  /// calling thread and returned; an empty report if there was none.
  [[nodiscard]] ForwardReport last_report() const;
  [[nodiscard]] Stats stats() const;
  [[nodiscard]] const ModelProfile& profile() const noexcept;
  [[nodiscard]] const Options& options() const noexcept;

  /// Calls `hook` in every forward() that begins from now on (LayerHook tells what that means for these calls). Throws
  /// Error(kInvalidOptions) for a null pointer.
  void add_hook(std::shared_ptr<LayerHook> hook);
  /// Calls it no more in calls that begin later. One that was not added is ignored.
  void remove_hook(const std::shared_ptr<LayerHook>& hook);

  /// To be called after weights were changed in place. Every entry is dropped, and a calibration with it; calls that
  /// begin later run on the weights as they are now, and profile().digest is theirs. Calls that are running keep
  /// nothing; profile() must not be read meanwhile. What the library notices by itself is in docs/correctness.md.
  /// Throws Error(kNotAvailable) where the library works on copies of the weights (Options::weights), or other caches
  /// are around the same wrapped model (LayerCache::with_options()): construct a new LayerCache; Error(kModelChanged)
  /// if more than values was changed (a type, a place in memory, a mode).
  void weights_changed();

  /// Computes `inputs` for the tenant, and holds on to what is kept of their rows, all of their real tokens: neither
  /// evicted nor too old while the lease lives, for `seconds` at most, so that an owner who is lost holds nothing for
  /// longer. For what many requests begin with, a system prompt say. It counts in the capacity and in the tenant's
  /// quota; TenantOptions::pinned_share bounds it. clear(), weights_changed() and erase_tenant() end it; snapshots hold
  /// the entry, not the pin.
  /// Throws Error as forward(), kInvalidOptions unless `seconds` is above 0 and finite, and kNotAvailable with the
  /// reason: no prefix reuse, not enough room or quota, more than may be pinned, 4,096 pins already, rows that
  /// cannot be packed.
  [[nodiscard]] PinLease pin(const Inputs& inputs, const std::string& tenant, double seconds);

  /// Drops every entry and every pin of a tenant ("": of requests that name none), in memory, and then what the store
  /// below (Options::store) has of this model's entries of the tenant, which takes as long as the store needs for what
  /// waits to be written and for looking through its keys. Of calls of the tenant that are running nothing is kept;
  /// what they read is freed when they end. Files are the caller's: a save() that is running
  /// fails, a load() ends, and one that was saved before holds the tenant's entries until it is written again.
  /// Also forgotten is why entries of any tenant went (SequenceReport::evicted_tokens). What was made of all tenants'
  /// requests and is nobody's stays: a calibration, the running mean of fingerprints, and counters.
  /// Throws std::bad_alloc; calling it again is harmless.
  TenantErasure erase_tenant(const std::string& tenant);

  /// Drops every entry of every tenant, and forgets the running mean of fingerprints. A calibration stays in force.
  /// Running calls are not disturbed; what they have computed is not kept.
  void clear();

 protected:
  /// `wrap` makes the model, with these options; once more if what Options::profile_path told it (Model::findings())
  /// turns out not to fit.
  LayerCacheBase(const std::function<std::unique_ptr<Model>(const Options&)>& wrap, Options options);
  /// See LayerCache::with_options().
  LayerCacheBase(const LayerCacheBase& wrapped, Options options);
  ~LayerCacheBase();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// How a model type is turned into a Model. The primary template takes any LayeredModel; an adapter
/// for another kind of model (a TorchScript module, say) specialises it.
template <class M>
struct ModelTraits {
  static_assert(LayeredModel<M>,
                "LayerCache<M>: M must satisfy llmcache::LayeredModel (embed, layers, layer, head, device, dtype, "
                "digest), or llmcache::ModelTraits<M> must be specialised");
  static std::unique_ptr<Model> wrap(M model, const Options& options) {
    check_weights_as_loaded(options);
    return std::make_unique<LayeredModelAdapter<M>>(std::move(model));
  }
};

/// Wraps a loaded model. See LayerCacheBase for everything it can do.
///
/// The model is wrapped, not copied: weights are shared with the caller's object, which keeps
/// working by itself. Constructing finds the chain of layers, probes it with a few tiny forwards and
/// checks the result (profile() tells). It throws Error(kUnsupportedModel) with the reason where the
/// model cannot be wrapped, Error(kNotAvailable) where it does not allow the fidelity or the weights that
/// `options` ask for, and Error(kInvalidOptions).
///
///     llmcache::LayerCache cache(torch::jit::load("gpt2.pt"), {.capacity_bytes = std::size_t{512} << 20});
///     torch::IValue out = cache.forward({input_ids, attention_mask});
template <class M>
class LayerCache : public LayerCacheBase {
 public:
  explicit LayerCache(M model, Options options = {})
      : LayerCacheBase([&](const Options& chosen) { return ModelTraits<M>::wrap(std::move(model), chosen); },
                       std::move(options)) {}

  /// A further cache around the model that is wrapped already, with options of its own (what is not set has its
  /// default; start from options() to keep the rest): nothing is probed or packed again, and weights are held once. The
  /// two keep nothing in common. `layers`, `mask_argument` and `weights` of the options must be those of this cache;
  /// so must `weights_sample`, or empty. May be called while calls are running. Throws Error(kInvalidOptions), and
  /// Error(kNotAvailable) where the model does not allow the fidelity.
  [[nodiscard]] LayerCache with_options(Options options) const { return LayerCache(*this, std::move(options)); }

 private:
  LayerCache(const LayerCache& wrapped, Options options) : LayerCacheBase(wrapped, std::move(options)) {}
};

}  // namespace llmcache
