#include "llmcache/layer_cache.h"

#include <c10/core/GradMode.h>
#include <fmt/core.h>

#include <algorithm>

#include "caller_failed.h"
#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "execute/pooled_states.h"
#include "execute/run_model.h"
#include "layer_cache_impl.h"

namespace llmcache {
namespace {

/// The latest report of each cache that this thread used. Entries of caches that are gone are
/// dropped at the next call.
class ThreadReports {
 public:
  /// Makes a place for the cache's report, so that set() cannot fail.
  void prepare(const std::shared_ptr<const int>& cache) {
    std::erase_if(reports_, [](const Slot& slot) { return slot.cache.expired(); });
    if (find(cache) == nullptr) reports_.push_back({cache, {}});
  }
  /// Nothing happens without a place.
  void set(const std::shared_ptr<const int>& cache, ForwardReport report) noexcept {
    if (Slot* slot = find(cache)) slot->report = std::move(report);
  }
  [[nodiscard]] ForwardReport get(const std::shared_ptr<const int>& cache) const {
    for (const Slot& slot : reports_) {
      if (slot.cache.lock() == cache) return slot.report;
    }
    return {};
  }

 private:
  struct Slot {
    std::weak_ptr<const int> cache;
    ForwardReport report;
  };
  [[nodiscard]] Slot* find(const std::shared_ptr<const int>& cache) noexcept {
    const auto same = [&](const Slot& slot) { return slot.cache.lock() == cache; };
    const auto slot = std::find_if(reports_.begin(), reports_.end(), same);
    return slot == reports_.end() ? nullptr : &*slot;
  }
  std::vector<Slot> reports_;
};

ThreadReports& thread_reports() {
  thread_local ThreadReports reports;
  return reports;
}

}  // namespace

LayerCacheBase::LayerCacheBase(const std::function<std::unique_ptr<Model>(const Options&)>& wrap, Options options)
    : impl_(as_the_caller_threw([&] {
        const c10::NoGradGuard no_grad;
        options.validate();
        Stopwatch clock;
        auto impl = std::make_unique<Impl>(wrap, options);
        impl->wrapped.profile.wrap_ms = clock.lap();
        tell(impl->options.progress, "done");
        return impl;
      })) {}

LayerCacheBase::LayerCacheBase(const LayerCacheBase& wrapped, Options options)
    : impl_([&] {
        const c10::NoGradGuard no_grad;
        return std::make_unique<Impl>(*wrapped.impl_, options);
      }()) {}

LayerCacheBase::LayerCacheBase(LayerCacheBase&&) noexcept = default;
LayerCacheBase& LayerCacheBase::operator=(LayerCacheBase&&) noexcept = default;
LayerCacheBase::~LayerCacheBase() = default;

c10::IValue LayerCacheBase::forward(const Inputs& inputs, const RequestOptions& options) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  ForwardReport report;
  thread_reports().prepare(impl_->identity);
  auto result = as_the_caller_threw([&] { return impl_->forward(inputs, options, report); });
  report.total_ms = clock.lap();
  impl_->verification.add_time(report.total_ms - report.verify_ms, 0);
  impl_->totals.add(report);
  thread_reports().set(impl_->identity, std::move(report));
  return result;
}

void LayerCacheBase::prefetch(const Inputs& inputs, const RequestOptions& options) {
  const c10::NoGradGuard no_grad;
  as_the_caller_threw([&] { impl_->prefetch(inputs, options); });
}

c10::IValue LayerCacheBase::forward_plan(const Inputs& inputs, const Plan& plan, const Donors& donors,
                                         Donors* capture) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  const Model& model = *impl_->wrapped.model;
  const ModelProfile& profile = impl_->wrapped.profile;
  model.check_unchanged();
  const Batch batch = check_batch(inputs, impl_->wrapped);
  check_plan(plan, batch, model, profile, donors);
  ForwardReport report;
  thread_reports().prepare(impl_->identity);
  auto result = run_model([&] { return execute_packed(model, batch, plan, donors, capture, report); });
  report.total_ms = clock.lap();
  thread_reports().set(impl_->identity, std::move(report));
  return result;
}

Plan LayerCacheBase::full_plan(const Inputs& inputs) const {
  const Batch batch = check_batch(inputs, impl_->wrapped);
  if (!batch.contiguous) throw Error(ErrorCode::kInvalidInput, "the mask has holes: such a batch cannot be packed");
  return batch.full_plan(static_cast<std::int32_t>(impl_->wrapped.model->layers()));
}

std::vector<std::vector<float>> LayerCacheBase::pooled_state(const Inputs& inputs, std::int64_t layer) const {
  const c10::NoGradGuard no_grad;
  const Model& model = *impl_->wrapped.model;
  const ModelProfile& profile = impl_->wrapped.profile;
  if (layer < 0 || layer > model.layers()) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("pooled_state: layer {}; 0 to {} is expected", layer, model.layers()));
  }
  model.check_unchanged();
  const Batch batch = check_batch(inputs, impl_->wrapped);
  check_packable(batch, model, profile);
  return run_model([&] { return pooled_states(model, batch, static_cast<std::int32_t>(layer)); });
}

CalibrationSample LayerCacheBase::run_sample(const std::function<std::optional<Inputs>()>& sample) const {
  const c10::NoGradGuard no_grad;
  RiskController& budget = impl_->budget();
  impl_->wrapped.model->check_unchanged();
  return as_the_caller_threw([&] { return budget.run_sample(sample, 0); });
}

CalibrationProfile LayerCacheBase::calibrate(const CalibrationSample& sample) {
  const c10::NoGradGuard no_grad;
  RiskController& budget = impl_->budget();
  CalibrationProfile profile = as_the_caller_threw([&] { return budget.calibrate(sample); });
  impl_->wrapped.streams->publish(impl_->wrapped.model->device(), [] {});
  profile.verified = impl_->verification.envelope().plain();
  return profile;
}

CalibrationProfile LayerCacheBase::calibrate(const std::function<std::optional<Inputs>()>& sample) {
  return calibrate(run_sample(sample));
}

CalibrationProfile LayerCacheBase::calibrate(const std::vector<Inputs>& sample) {
  const c10::NoGradGuard no_grad;
  RiskController& budget = impl_->budget();
  impl_->wrapped.model->check_unchanged();
  std::size_t next = 0;
  const auto one = [&]() -> std::optional<Inputs> {
    if (next == sample.size()) return std::nullopt;
    return sample[next++];
  };
  return calibrate(as_the_caller_threw([&] { return budget.run_sample(one, sample.size()); }));
}

void LayerCacheBase::use_calibration(const CalibrationProfile& profile) {
  const c10::NoGradGuard no_grad;
  RiskController& budget = impl_->budget();
  as_the_caller_threw([&] { budget.use(profile); });
  impl_->wrapped.streams->publish(impl_->wrapped.model->device(), [] {});
  impl_->verification.envelope().take(profile.verified);  // the same model: its digest was compared
}

std::optional<CalibrationProfile> LayerCacheBase::calibration() const {
  const auto* budget = impl_->strategies.find<RiskController>();
  auto profile = budget != nullptr ? budget->profile() : std::nullopt;
  if (profile) profile->verified = impl_->verification.envelope().plain();
  return profile;
}

SnapshotReport LayerCacheBase::save(const std::filesystem::path& path) { return impl_->snapshots().save(path); }
SnapshotReport LayerCacheBase::load(const std::filesystem::path& path) { return impl_->snapshots().load(path); }

ForwardReport LayerCacheBase::last_report() const { return thread_reports().get(impl_->identity); }

Stats LayerCacheBase::stats() const { return impl_->stats(); }

const ModelProfile& LayerCacheBase::profile() const noexcept { return impl_->wrapped.profile; }
const Options& LayerCacheBase::options() const noexcept { return impl_->options; }
void LayerCacheBase::clear() { impl_->drop(); }

PinLease LayerCacheBase::pin(const Inputs& inputs, const std::string& tenant, double seconds) {
  check_pin_seconds(seconds);
  static_cast<void>(impl_->prefixes());
  forward(inputs, {.fidelity = Fidelity::kLossless, .output = Output::kLastToken, .tenant = tenant});
  return impl_->pin(inputs, tenant, seconds);
}

TenantErasure LayerCacheBase::erase_tenant(const std::string& tenant) { return impl_->erase_tenant(tenant); }

void LayerCacheBase::add_hook(std::shared_ptr<LayerHook> hook) { impl_->add_hook(std::move(hook)); }
void LayerCacheBase::remove_hook(const std::shared_ptr<LayerHook>& hook) { impl_->remove_hook(hook); }
void LayerCacheBase::weights_changed() {
  const c10::NoGradGuard no_grad;
  impl_->weights_changed();
}

}  // namespace llmcache
