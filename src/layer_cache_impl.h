// How a LayerCache answers: a loop over the chain of strategies of the request's fidelity.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "bank/memory.h"
#include "call_totals.h"
#include "execute/batch.h"
#include "llmcache/layer_cache.h"
#include "model/wrapped_model.h"
#include "reuse/answers.h"
#include "reuse/budget/risk_controller.h"
#include "reuse/chain.h"
#include "reuse/computed/computed.h"
#include "reuse/fallbacks.h"
#include "reuse/prefix/prefix_reuse.h"
#include "reuse/running_calls.h"
#include "reuse/snapshot/snapshots.h"
#include "reuse/tiers/tiers.h"
#include "reuse/verifier.h"

namespace llmcache {

struct LayerCacheBase::Impl {
  Impl(const std::function<std::unique_ptr<Model>(const Options&)>& make, const Options& chosen);
  /// Around the model of `other`, as that one found it.
  Impl(Impl& other, const Options& chosen);
  ~Impl();

  /// LayerCacheBase::forward(), without time and thread's report.
  c10::IValue forward(const Inputs& inputs, const RequestOptions& request, ForwardReport& report);
  /// LayerCacheBase::prefetch().
  void prefetch(const Inputs& inputs, const RequestOptions& request);
  void weights_changed();
  /// Drops all that is kept. What running calls compute is not kept.
  void drop();
  /// LayerCacheBase::erase_tenant().
  TenantErasure erase_tenant(const std::string& tenant);
  /// LayerCacheBase::pin(), of inputs that were given to forward().
  [[nodiscard]] PinLease pin(const Inputs& inputs, const std::string& tenant, double seconds);
  /// Of the strategy that can pin. Throws Error(kNotAvailable): there is none.
  [[nodiscard]] PrefixReuse& prefixes() const;
  /// Throws Error(kInvalidOptions) if the cache was not made for Fidelity::kBudget.
  [[nodiscard]] RiskController& budget() const;
  [[nodiscard]] Stats stats() const;
  /// LayerCacheBase::save() and load().
  [[nodiscard]] Snapshots& snapshots() noexcept { return snapshots_; }
  void add_hook(std::shared_ptr<LayerHook> hook);
  void remove_hook(const std::shared_ptr<LayerHook>& hook);

  Options options;
  WrappedModel wrapped;
  MemoryAccount memory;  ///< all that is kept; the accounts of the banks are parts of it
  Verification verification;
  StrategyChains strategies;
  CallTotals totals;  ///< of forward(), which adds to them when it knows the time of the whole call
  std::shared_ptr<const int> identity = std::make_shared<const int>(0);

 private:
  Impl(Options chosen, WrappedModel found);

  void check_request(const RequestOptions& request, Fidelity fidelity);
  std::uint64_t check_weights();
  [[nodiscard]] Snapshots::Cache for_snapshots();
  void limit_tenants();
  void erase_in_memory(const std::string& tenant, TenantErasure& erased);
  void add_tenants(Stats& stats) const;
  /// Another number after each drop() and erase_tenant().
  [[nodiscard]] std::uint64_t dropped() const noexcept;
  [[nodiscard]] Tiers::Cache for_tiers();
  [[nodiscard]] std::vector<std::unique_ptr<StoredPart>> stored_parts() const;
  /// Takes a step unless all, or a tenant, was dropped since: `epoch` is what dropped() gave then.
  bool publish(std::uint64_t epoch, const std::function<void()>& step);
  [[nodiscard]] ModelIdentity identity_of_model();
  [[nodiscard]] bool can_pack(const Batch& batch) const;
  [[nodiscard]] std::string plain_reason(const Call& call) const;
  [[nodiscard]] std::vector<std::shared_ptr<LayerHook>> hooks_for(const RequestOptions& request) const;
  /// The ones of the chain that accept the call.
  [[nodiscard]] std::vector<ReuseStrategy*> strategies_for(Call& call);
  [[nodiscard]] MissReason expected_miss(const Call& call, const std::vector<ReuseStrategy*>& chain) const;
  /// False: what is still open is for the plain model.
  bool serve(ReuseStrategy& strategy, const Call& call, Answers& answers);
  void serve_plainly(const Call& call, Answers& answers) const;
  /// Nothing fails from here on: only now the call leaves anything behind.
  void finish(const Call& call, Answers& answers);

  RiskController* const risk_;  ///< null unless the cache was made for kBudget
  Hooked hooked_;               ///< serves calls with hooks, alone
  std::atomic<bool> has_hooks_{false};
  mutable std::mutex hooks_mutex_;
  std::vector<std::shared_ptr<LayerHook>> hooks_;  ///< guarded by hooks_mutex_
  std::shared_mutex weights_mutex_;                ///< exclusive: the weights are taken as they are now
  std::shared_mutex kept_mutex_;                   ///< exclusive: all is dropped
  RunningCalls running_;
  std::atomic<std::uint64_t> erasures_{0};  ///< calls of erase_tenant()
  std::atomic<std::uint64_t> epoch_{0};     ///< raised by each drop(): what was begun before is not kept
  std::once_flag told_uncalibrated_;
  Fallbacks fallbacks_;
  std::atomic<std::uint64_t> weight_checks_{0}, next_number_{0};
  Verifier verifier_;    ///< its thread uses all above
  Snapshots snapshots_;  ///< likewise
  Tiers tiers_;          ///< likewise
};

}  // namespace llmcache
