#include "layer_cache_impl.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>

#include "caller_failed.h"
#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "execute/run_model.h"
#include "execute/wrap.h"
#include "reuse/prefix/prefix_reuse.h"
#include "reuse/similarity/similarity_reuse.h"
#include "reuse/source/source_reuse.h"

namespace llmcache {
namespace {

/// The texts of an error and of those nested in it.
std::string whole_reason(const std::exception& error) {
  std::string text = reason_of(error);
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& inner) {
    const auto more = whole_reason(inner);
    if (text.find(more) == std::string::npos) text += ": " + more;
  } catch (...) {
    text += ": what is no std::exception";
  }
  return text;
}

WrappedModel probed(std::shared_ptr<Model> model, const Options& options) {
  WrappedModel wrapped = wrap(std::move(model), options);
  tell(options.progress, "checking prefix reuse");
  find_prefix_reuse(wrapped);
  find_source_reuse(wrapped);
  auto& codes = wrapped.profile.verified.codes;  // of several checks
  std::sort(codes.begin(), codes.end());
  codes.erase(std::unique(codes.begin(), codes.end()), codes.end());
  return wrapped;
}

/// As the file says; none, and `why` not, if it does not fit the model.
std::optional<WrappedModel> as_saved(const std::shared_ptr<Model>& model, const Options& options, std::string& why) {
  try {
    const SavedProfile saved = read_saved_profile(options.profile_path);
    saved.check_conditions(options, model->device());
    tell(options.progress, "comparing a packed pass with the plain model");
    return wrap_as_saved(model, saved);
  } catch (const CallerFailed&) {
    throw;
  } catch (const std::exception& error) {
    why = reason_of(error);
    return std::nullopt;
  }
}

/// `make` may be called twice where the model knows its findings from a file.
WrappedModel wrap_all(const std::function<std::unique_ptr<Model>(const Options&)>& make, const Options& options) {
  std::shared_ptr<Model> model = make(options);
  if (options.profile_path.empty()) return probed(std::move(model), options);
  std::string why;
  if (auto wrapped = as_saved(model, options, why)) {
    wrapped->profile.from_file = true;
    wrapped->profile.file_note = "was read";
    return *std::move(wrapped);
  }
  if (const GraphFindings* found = model->findings(); found != nullptr && found->known) {
    Options anew = options;
    anew.profile_path.clear();
    model.reset();  // packed copies of its weights
    model = make(anew);
  }
  WrappedModel wrapped = probed(std::move(model), options);
  const std::string failed = write_saved_profile(options.profile_path, saved_profile_of(wrapped, options));
  wrapped.profile.file_note = failed.empty() ? "was written (" + why + ")" : "cannot be written: " + failed;
  return wrapped;
}

Options same_model(Options chosen, const Options& of) {
  chosen.validate();
  if (chosen.weights_sample.empty()) chosen.weights_sample = of.weights_sample;
  if (chosen.layers == of.layers && chosen.mask_argument == of.mask_argument && chosen.weights == of.weights &&
      chosen.weights_sample == of.weights_sample) {
    if (chosen.snapshot.path == of.snapshot.path) chosen.snapshot = {};  // the file is the other cache's
    return chosen;
  }
  throw Error(
      ErrorCode::kInvalidOptions,
      "with_options: layers, mask_argument, weights and weights_sample must be those of the cache that wrapped the "
      "model");
}

}  // namespace

LayerCacheBase::Impl::Impl(Options chosen, WrappedModel found)
    : options(std::move(chosen)),
      wrapped(std::move(found)),
      memory(options.capacity_bytes),
      verification(options.verify_rate),
      strategies({wrapped, options, verification, memory}),
      risk_(strategies.find<RiskController>()),
      hooked_(wrapped),
      verifier_(wrapped, options, verification, {[this] { return check_weights(); }, [this] { drop(); }}),
      snapshots_(options.snapshot, for_snapshots()),
      tiers_(options.store, stored_parts(), for_tiers()) {
  verification.envelope().take(wrapped.profile.verified);
  limit_tenants();
  if (!options.snapshot.path.empty()) tell(options.progress, "loading the snapshot");
  snapshots_.start();
}

LayerCacheBase::Impl::Impl(const std::function<std::unique_ptr<Model>(const Options&)>& make, const Options& chosen)
    : Impl(chosen, wrap_all(make, chosen)) {}

LayerCacheBase::Impl::Impl(Impl& other, const Options& chosen)
    : Impl(same_model(chosen, other.options), (std::shared_lock(other.weights_mutex_), WrappedModel(other.wrapped))) {
  verification.take(other.verification);
}

LayerCacheBase::Impl::~Impl() = default;

RiskController& LayerCacheBase::Impl::budget() const {
  if (risk_ != nullptr) return *risk_;
  throw Error(ErrorCode::kInvalidOptions,
              "fidelity 'budget' is asked for, but this cache keeps no banks for it; construct it with "
              "Options.fidelity = Fidelity::kBudget");
}

void LayerCacheBase::Impl::check_request(const RequestOptions& request, Fidelity fidelity) {
  check_fidelity(fidelity);
  check_output(request.output);
  if (fidelity == Fidelity::kThreshold && options.fidelity != Fidelity::kThreshold) {
    throw Error(ErrorCode::kInvalidOptions,
                "RequestOptions.fidelity is 'threshold', but this cache keeps no states of layers; construct it with "
                "Options.fidelity = Fidelity::kThreshold");
  }
  if (fidelity != Fidelity::kBudget || budget().has_profile()) return;
  std::call_once(told_uncalibrated_, [] {
    TORCH_WARN(
        "llmcache: fidelity 'budget' without a calibration reuses nothing beyond 'lossless'; call calibrate() with "
        "a sample of your traffic, or use_calibration()");
  });
}

/// Returns the epoch that the call belongs to.
std::uint64_t LayerCacheBase::Impl::check_weights() {
  const std::shared_lock lock(weights_mutex_);
  wrapped.model->check_unchanged();
  const std::uint64_t every = options.weight_check_requests;
  if (every > 0 && (weight_checks_.fetch_add(1, std::memory_order_relaxed) + 1) % every == 0) {
    wrapped.model->check_every_weight();
  }
  return epoch_.load(std::memory_order_acquire);
}

bool LayerCacheBase::Impl::can_pack(const Batch& batch) const {
  return batch.contiguous && batch.tokens > 0 && wrapped.profile.granularity != Granularity::kWholeLayers &&
         (batch.right_padded || wrapped.profile.left_padding) && batch.reads_real_tokens() &&
         !verification.closed(Mechanism::kPacked);
}

/// Why the request is for the plain model alone; empty: it is not.
std::string LayerCacheBase::Impl::plain_reason(const Call& call) const {
  const Batch& batch = call.batch;
  if (!call.hooks.empty()) return {};  // the plain model knows of no hooks
  if (!batch.plain_only.empty()) return batch.plain_only;
  if (verification.closed(Mechanism::kDense)) {
    return "an answer computed layer by layer was another than the model's";
  }
  if (const auto now = numeric_state(wrapped.model->device()); !(now == wrapped.wrapped_under)) {
    return what_changed(wrapped.wrapped_under, now);
  }
  const bool empty_row =
      std::any_of(batch.spans.begin(), batch.spans.end(), [](const RowSpan& s) { return !s.tokens; });
  if (batch.padded_length > 0 && empty_row && !wrapped.all_per_token()) {
    return "a row has no real token, and the output of a row is more than that of its tokens";
  }
  return {};
}

c10::IValue LayerCacheBase::Impl::forward(const Inputs& inputs, const RequestOptions& request, ForwardReport& report) {
  const Fidelity fidelity = request.fidelity.value_or(options.fidelity);
  check_request(request, fidelity);
  const RunningCalls::Entry running(running_, request.tenant);
  const std::uint64_t epoch = check_weights();
  wrapped.streams->enter(wrapped.model->device());
  Call call{wrapped, check_batch(inputs, wrapped), request, fidelity};
  call.epoch = epoch;
  call.dropped = dropped();
  call.running = &running;
  call.first_number = next_number_.fetch_add(static_cast<std::uint64_t>(call.batch.rows));
  call.packable = can_pack(call.batch);
  call.hooks = hooks_for(request);
  Answers answers(call, report);
  std::vector<ReuseStrategy*> asked;
  bool tiered = false;
  if (auto reason = plain_reason(call); reason.empty()) {
    const auto chain = strategies_for(call);
    tiered = tiers_.on() && call.hooks.empty();
    if (tiered) tiers_.look_up(call, answers);
    answers.expect_misses(expected_miss(call, chain));
    for (ReuseStrategy* strategy : chain) {
      if (answers.complete()) break;
      asked.push_back(strategy);
      if (!serve(*strategy, call, answers)) break;
    }
  } else {
    answers.fallbacks().emplace_back("request", std::move(reason));
  }
  if (!answers.complete()) serve_plainly(call, answers);
  Stopwatch clock;
  for (ReuseStrategy* strategy : asked) strategy->store(call, answers);
  c10::IValue result = answers.result();
  report.store_ms += clock.lap();
  result = verifier_.verified(call, answers, std::move(result));
  finish(call, answers);
  if (tiered) tiers_.keep(call, report);
  return result;
}

void LayerCacheBase::Impl::prefetch(const Inputs& inputs, const RequestOptions& request) {
  const Fidelity fidelity = request.fidelity.value_or(options.fidelity);
  check_request(request, fidelity);
  const std::uint64_t epoch = check_weights();
  Call call{wrapped, check_batch(inputs, wrapped), request, fidelity};
  call.epoch = epoch;
  call.dropped = dropped();
  call.packable = can_pack(call.batch);
  call.hooks = hooks_for(request);
  if (!tiers_.on() || !call.hooks.empty() || !plain_reason(call).empty()) return;
  static_cast<void>(strategies_for(call));  // it finds out what the call cuts
  tiers_.prefetch(call);
}

std::vector<std::shared_ptr<LayerHook>> LayerCacheBase::Impl::hooks_for(const RequestOptions& request) const {
  std::vector<std::shared_ptr<LayerHook>> hooks;
  if (has_hooks_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(hooks_mutex_);
    hooks = hooks_;
  }
  if (request.hook) hooks.push_back(request.hook);
  return hooks;
}

void LayerCacheBase::Impl::add_hook(std::shared_ptr<LayerHook> hook) {
  if (!hook) throw Error(ErrorCode::kInvalidOptions, "add_hook: the hook is null");
  const std::lock_guard lock(hooks_mutex_);
  hooks_.push_back(std::move(hook));
  has_hooks_.store(true, std::memory_order_release);
}

void LayerCacheBase::Impl::remove_hook(const std::shared_ptr<LayerHook>& hook) {
  const std::lock_guard lock(hooks_mutex_);
  std::erase(hooks_, hook);
  has_hooks_.store(!hooks_.empty(), std::memory_order_release);
}

std::vector<ReuseStrategy*> LayerCacheBase::Impl::strategies_for(Call& call) {
  if (!call.hooks.empty()) return {&hooked_};
  std::vector<ReuseStrategy*> chain = strategies.of(call.fidelity);
  const auto cuts = [&](const ReuseStrategy* one) { return one->cuts_output(call) && one->accepts(call); };
  call.cuts_output = std::any_of(chain.begin(), chain.end(), cuts);
  std::erase_if(chain, [&](const ReuseStrategy* one) { return !one->accepts(call); });
  return chain;
}

/// Why what no strategy of the call's chain knows is computed, unless one of them says more.
MissReason LayerCacheBase::Impl::expected_miss(const Call& call, const std::vector<ReuseStrategy*>& chain) const {
  if (std::ranges::none_of(chain, [](const ReuseStrategy* one) { return one->looks_up(); })) {
    return MissReason::kNotLookedUp;
  }
  const auto& all = strategies.of(call.fidelity);
  const bool ruled_out = std::ranges::any_of(all, [&](const ReuseStrategy* one) { return one->refuses_output(call); });
  return ruled_out ? MissReason::kOutput : MissReason::kNew;
}

bool LayerCacheBase::Impl::serve(ReuseStrategy& strategy, const Call& call, Answers& answers) {
  const std::size_t before = answers.writes().size();
  try {
    strategy.serve(call, answers);
    return true;
  } catch (const std::exception& error) {
    if (!call.hooks.empty()) throw;  // what the plain model gives is not what was asked for
    answers.writes().cut(before);
    answers.fallbacks().emplace_back(strategy.name(), whole_reason(error));
    return !strategy.exact();
  }
}

/// What the plain model can do must not fail here; if it cannot, what it raises is what the caller gets.
void LayerCacheBase::Impl::serve_plainly(const Call& /*call*/, Answers& answers) const {
  answers.forget_source();
  const Batch& batch = answers.open();
  PassResult pass;
  pass.value = run_model([&] { return wrapped.model->plain(batch.inputs); });
  pass.storable = false;  // nothing is known about how such a result is made
  pass.verified = false;  // there is nothing to compare it with
  pass.report.execution = Execution::kDense;
  pass.report.sequences = count_tokens(batch.full_plan(wrapped.layers()));
  answers.put(std::move(pass));
}

void LayerCacheBase::Impl::finish(const Call& call, Answers& answers) {
  Stopwatch clock;
  ForwardReport& report = answers.report();
  if (!answers.fallbacks().empty()) {
    const auto& [mechanism, reason] = answers.fallbacks().front();
    report.fallback = mechanism + ": " + reason;
    fallbacks_.add(answers.fallbacks());
  }
  {
    const std::shared_lock lock(kept_mutex_);
    const bool erased = call.running != nullptr && call.running->erased();
    if (epoch_.load(std::memory_order_acquire) == call.epoch && !erased) {
      wrapped.streams->publish(wrapped.model->device(), [&] { answers.writes().commit(); });
    }
  }
  report.padding_skipped = answers.padding_skipped();
  report.store_ms += clock.lap();
}

bool LayerCacheBase::Impl::publish(std::uint64_t epoch, const std::function<void()>& step) {
  const std::shared_lock lock(kept_mutex_);
  if (dropped() != epoch) return false;
  wrapped.streams->enter(wrapped.model->device());  // it may read what calls on other streams have kept
  wrapped.streams->publish(wrapped.model->device(), step);
  return true;
}

ModelIdentity LayerCacheBase::Impl::identity_of_model() {
  const std::shared_lock lock(weights_mutex_);
  wrapped.model->check_unchanged();
  return wrapped.identity();
}

Snapshots::Cache LayerCacheBase::Impl::for_snapshots() {
  const auto parts = [this] {
    SnapshotParts all;
    for (const auto& strategy : strategies.all()) strategy->add_parts(all);
    return all;
  };
  return {[this] { return identity_of_model(); }, parts, [this] { return dropped(); },
          [this](std::uint64_t epoch, const std::function<void()>& step) { return publish(epoch, step); }};
}

std::vector<std::unique_ptr<StoredPart>> LayerCacheBase::Impl::stored_parts() const {
  std::vector<std::unique_ptr<StoredPart>> parts;
  if (options.store.store == nullptr) return parts;
  for (const auto& strategy : strategies.all()) strategy->add_stored(parts);
  return parts;
}

Tiers::Cache LayerCacheBase::Impl::for_tiers() {
  return {[this] { return identity_of_model().digest(); }, [this] { return dropped(); },
          [this](std::uint64_t epoch, const std::function<void()>& step) { return publish(epoch, step); }};
}

void LayerCacheBase::Impl::drop() {
  const std::unique_lock lock(kept_mutex_);
  epoch_.fetch_add(1, std::memory_order_release);
  for (const auto& strategy : strategies.all()) strategy->clear();
}

std::uint64_t LayerCacheBase::Impl::dropped() const noexcept {
  return epoch_.load(std::memory_order_acquire) + erasures_.load(std::memory_order_acquire);
}

TenantErasure LayerCacheBase::Impl::erase_tenant(const std::string& tenant) {
  TenantErasure erased;
  erase_in_memory(tenant, erased);
  if (tiers_.on()) erased.store_failure = tiers_.erase_tenant(tenant, dropped());
  return erased;
}

void LayerCacheBase::Impl::erase_in_memory(const std::string& tenant, TenantErasure& erased) {
  const std::unique_lock lock(kept_mutex_);
  erasures_.fetch_add(1, std::memory_order_release);
  for (const auto& strategy : strategies.all()) {
    const TenantErasure part = strategy->erase_tenant(tenant);
    erased.entries += part.entries;
    erased.bytes += part.bytes;
    erased.pins += part.pins;
  }
  // Last: a call that began meanwhile may have found what is gone now.
  erased.calls = running_.erase(tenant);
}

PrefixReuse& LayerCacheBase::Impl::prefixes() const {
  if (auto* const found = strategies.find<PrefixReuse>()) return *found;
  throw Error(ErrorCode::kNotAvailable,
              "there are no prefixes to pin: that takes a causal model with ModelProfile::prefix_reuse, "
              "Options.fidelity kLossless or kBudget, and room for prefixes");
}

PinLease LayerCacheBase::Impl::pin(const Inputs& inputs, const std::string& tenant, double seconds) {
  const Batch batch = check_batch(inputs, wrapped);
  check_packable(batch, *wrapped.model, wrapped.profile);
  return prefixes().pin(batch, tenant, seconds);
}

/// Gives the banks their part of the limits.
void LayerCacheBase::Impl::limit_tenants() {
  const auto clock = options.refresh.clock ? options.refresh.clock : std::function<double()>([] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  });
  if (auto* const found = strategies.find<PrefixReuse>()) found->allow_pins(options.tenants.pinned_share, clock);
  if (!options.tenants.accounts()) return;
  for (const auto& strategy : strategies.all()) {
    strategy->each_bank(
        [&](CapacityBank& bank) { bank.limit_tenants(options.tenants, options.capacity_bytes, clock); });
  }
}

void LayerCacheBase::Impl::add_tenants(Stats& stats) const {
  if (!options.tenants.accounts()) return;
  TenantUsages usages;
  for (const auto& strategy : strategies.all()) {
    strategy->each_bank([&](CapacityBank& bank) { bank.add_to(usages); });
  }
  constexpr std::array kNames = {"unnamed", "listed", "others"};
  for (std::size_t i = 0; i < kTenantClasses; ++i) {
    stats.tenants.push_back({kNames[i], usages[i].entries, usages[i].bytes});
  }
}

void LayerCacheBase::Impl::weights_changed() {
  const std::unique_lock lock(weights_mutex_);
  if (wrapped.model.use_count() > 1) {
    throw Error(ErrorCode::kNotAvailable,
                "other caches, made by with_options(), are around the same wrapped model: construct a new LayerCache");
  }
  wrapped.model->weights_changed();
  wrapped.profile.digest = wrapped.model->digest();
  for (const auto& strategy : strategies.all()) strategy->weights_changed();
  verification.envelope().clear();
  verification.envelope().take(wrapped.profile.verified);
  drop();
}

Stats LayerCacheBase::Impl::stats() const {
  Stats stats;
  totals.fill(stats);
  for (const auto& strategy : strategies.all()) strategy->add_to(stats);
  add_tenants(stats);
  stats.bytes = memory.used();
  stats.peak_bytes = memory.peak();  // read last: never less than the bytes
  fallbacks_.fill(stats.fallbacks);
  verifier_.fill(stats.verification);
  stats.snapshot = snapshots_.stats();
  stats.store = tiers_.stats();
  return stats;
}

}  // namespace llmcache
