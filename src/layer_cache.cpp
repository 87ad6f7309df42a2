#include "llmcache/layer_cache.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>

#include "budget_reuse.h"
#include "execute/batch.h"
#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "execute/pooled_states.h"
#include "execute/run_model.h"
#include "execute/self_check.h"
#include "known_outputs.h"
#include "model/probe.h"
#include "prefix_reuse.h"
#include "threshold_reuse.h"

namespace llmcache {
namespace {

/// The latest report of each cache that this thread used. Entries of caches that are gone are
/// dropped at the next call.
class ThreadReports {
 public:
  void set(const std::shared_ptr<const int>& cache, ForwardReport report) {
    std::erase_if(reports_, [](const Slot& slot) { return slot.cache.expired(); });
    for (Slot& slot : reports_) {
      if (slot.cache.lock() == cache) {
        slot.report = std::move(report);
        return;
      }
    }
    reports_.push_back({cache, std::move(report)});
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
  std::vector<Slot> reports_;
};

ThreadReports& thread_reports() {
  thread_local ThreadReports reports;
  return reports;
}

void number_rows(ForwardReport& report, std::uint64_t first) {
  for (std::size_t i = 0; i < report.sequences.size(); ++i) report.sequences[i].number = first + i;
}

}  // namespace

struct LayerCacheBase::Impl {
  Impl(std::unique_ptr<Model> wrapped, Options chosen)
      : model(std::move(wrapped)), options(std::move(chosen)), inputs(model->input_spec()) {
    const c10::NoGradGuard no_grad;
    Stopwatch clock;
    model->describe(profile);
    output = probe(*model, inputs.vocabulary, options.mask_argument, profile);
    self_check(*model, inputs.vocabulary, output, profile);
    std::size_t capacity = options.capacity_bytes;
    const auto share = [&](double part) {
      const auto bytes = static_cast<std::size_t>(static_cast<double>(capacity) * part);
      capacity -= bytes;
      return bytes;
    };
    if (options.fidelity == Fidelity::kThreshold) {
      threshold = std::make_unique<ThresholdReuse>(*model, inputs, output, profile, options,
                                                   share(options.threshold.capacity_share));
    } else {
      options.prefix.validate(model->layers());
      if (options.fidelity == Fidelity::kBudget) {
        options.budget.validate(model->layers());
        budget = std::make_unique<BudgetReuse>(*model, inputs, output, profile, options,
                                               share(options.budget.capacity_share));
      }
      make_prefix_reuse(share);
    }
    outputs = std::make_unique<KnownOutputs>(*model, inputs, output, profile, capacity);
    profile.wrap_ms += clock.lap();
  }

  /// Where the model lets a sequence take its beginning from another one.
  template <class Share>
  void make_prefix_reuse(Share share) {
    if (!profile.causal || profile.granularity != Granularity::kTokens || !KnownOutputs::keeps_rows(profile)) return;
    // Verified in a cache of its own, whatever the capacity is.
    constexpr std::size_t kVerifying = std::size_t{1} << 30;
    PrefixOptions all = options.prefix;
    all.layers.clear();
    std::string why;
    try {
      profile.prefix_reuse = PrefixReuse(*model, inputs, output, profile, all, kVerifying).verify(why);
    } catch (const std::exception& error) {
      why = reason_of(error);
    }
    if (!profile.prefix_reuse) {
      profile.notes.push_back("prefix reuse is not available: " + why);
      return;
    }
    const bool lossless = options.fidelity == Fidelity::kLossless || options.fidelity == Fidelity::kBudget;
    if (!lossless || options.capacity_bytes == 0) return;
    if (options.prefix.capacity_share == 0) return;
    prefix = std::make_unique<PrefixReuse>(*model, inputs, output, profile, options.prefix,
                                           share(options.prefix.capacity_share));
  }

  [[nodiscard]] bool can_pack(const Batch& batch) const {
    return batch.contiguous && batch.tokens > 0 && profile.granularity != Granularity::kWholeLayers &&
           (batch.right_padded || profile.left_padding);
  }

  /// What was run for the missing rows.
  struct Computed {
    c10::IValue result;
    bool packed = false;
    bool keep = true;
    bool cut = false;  ///< the result is already that of the tokens asked for
    std::int64_t padding_skipped = 0;
  };

  static std::vector<std::int64_t> known_tokens(const ForwardReport& report) {
    std::vector<std::int64_t> known;
    for (const SequenceReport& sequence : report.sequences) known.push_back(sequence.reused_tokens);
    return known;
  }

  c10::IValue forward(const Inputs& given, const RequestOptions& request, ForwardReport& report);
  Computed compute(const Batch& part, const RequestOptions& request, bool exact, bool prefixes, ForwardReport& report);
  Computed compute_within_budget(const Batch& part, const RequestOptions& request, ForwardReport& report);
  void check_made_for_budget() const;
  void warn_uncalibrated();
  void count(const Batch& batch, const ForwardReport& report, const Computed& computed);
  c10::IValue forward_threshold(const Batch& batch, const RequestOptions& request, std::uint64_t first_number,
                                ForwardReport& report);

  std::unique_ptr<Model> model;
  Options options;
  InputSpec inputs;
  ModelProfile profile;
  OutputSpec output;
  std::unique_ptr<KnownOutputs> outputs;
  std::unique_ptr<PrefixReuse> prefix;  ///< null unless the cache was made for kLossless and the model allows it
  std::unique_ptr<BudgetReuse> budget;  ///< null unless the cache was made for kBudget
  std::once_flag told_uncalibrated;
  std::unique_ptr<ThresholdReuse> threshold;  ///< null unless the cache was made for kThreshold
  std::shared_ptr<const int> identity = std::make_shared<const int>(0);
  std::atomic<std::uint64_t> next_number{0}, requests{0}, sequences{0}, hits{0}, prefix_hits{0}, tokens{0},
      tokens_reused{0}, tokens_computed{0}, padding_skipped{0};
};

c10::IValue LayerCacheBase::Impl::forward(const Inputs& given, const RequestOptions& request, ForwardReport& report) {
  const Fidelity fidelity = request.fidelity.value_or(options.fidelity);
  check_fidelity(fidelity);
  check_output(request.output);
  if (fidelity == Fidelity::kThreshold && threshold == nullptr) {
    throw Error(ErrorCode::kInvalidOptions,
                "RequestOptions.fidelity is 'threshold', but this cache keeps no states of layers; construct it with "
                "Options.fidelity = Fidelity::kThreshold");
  }
  if (fidelity == Fidelity::kBudget) {
    check_made_for_budget();
    warn_uncalibrated();
  }
  model->check_unchanged();
  const Batch batch = check_batch(given, inputs, profile, model->device());
  const std::uint64_t first_number = next_number.fetch_add(static_cast<std::uint64_t>(batch.rows));
  if (fidelity == Fidelity::kThreshold && can_pack(batch)) {
    try {
      const auto all = forward_threshold(batch, request, first_number, report);
      return cut_output(all, output, batch, known_tokens(report), request.output);
    } catch (const std::exception&) {
      report = {};  // the model may still take it whole, below
    }
  }
  report.sequences = count_tokens(batch.full_plan(static_cast<std::int32_t>(model->layers())));

  Stopwatch clock;
  const bool within_budget =
      fidelity == Fidelity::kBudget && budget->ready() && budget->serves(request.output) && can_pack(batch);
  const bool lossless = fidelity == Fidelity::kLossless || fidelity == Fidelity::kBudget;
  const bool prefixes = lossless && prefix && !within_budget && can_pack(batch);
  const bool exact = fidelity == Fidelity::kIdentical;
  // Where only a part is wanted of what prefixes leave to compute, a whole output is not made.
  const bool cuts = prefixes || (within_budget && profile.causal);
  const bool keeps = KnownOutputs::keeps_rows(profile) && options.capacity_bytes > 0 && batch.rows > 0 &&
                     batch.width > 0 && !(cuts && request.output != Output::kAll);
  const KnownRows known =
      keeps ? outputs->look_up(batch, request.tenant, exact, report) : KnownRows(static_cast<std::size_t>(batch.rows));
  report.lookup_ms = clock.lap();

  Computed computed;
  const bool all_missing = static_cast<std::int64_t>(known.missing.size()) == batch.rows;
  if (all_missing || !known.missing.empty()) {
    const Batch part = all_missing ? batch : batch.select(known.missing);
    ForwardReport own;
    own.lookup_ms = report.lookup_ms;
    computed = run_model([&] {
      return within_budget ? compute_within_budget(part, request, own) : compute(part, request, exact, prefixes, own);
    });
    for (std::size_t m = 0; m < known.missing.size(); ++m) {
      report.sequences[static_cast<std::size_t>(known.missing[m])] = std::move(own.sequences[m]);
    }
    own.sequences = std::move(report.sequences);
    report = std::move(own);
  }
  number_rows(report, first_number);
  clock.lap();
  if (keeps && computed.keep) outputs->keep(batch, known, computed.result, !computed.packed, prefixes, report);
  c10::IValue result = std::move(computed.result);
  if (!all_missing) result = outputs->assemble(batch, known, result);
  if (!computed.cut) result = cut_output(result, output, batch, known_tokens(report), request.output);
  report.store_ms += clock.lap();
  count(batch, report, computed);
  return result;
}

LayerCacheBase::Impl::Computed LayerCacheBase::Impl::compute(const Batch& part, const RequestOptions& request,
                                                             bool exact, bool prefixes, ForwardReport& report) {
  Computed computed;
  const auto plan = part.full_plan(static_cast<std::int32_t>(model->layers()));
  const double looked_up = report.lookup_ms;
  try {
    if (prefixes && can_pack(part)) {
      computed.result = prefix->run(part, request.tenant, request.output, report);
      computed.cut = profile.head_tokenwise;
      computed.packed = true;
      if (computed.result.isNone()) computed.result = outputs->no_tokens(part.rows);
    } else if (!exact && part.padded && can_pack(part)) {
      computed.result = execute_packed(*model, part.inputs, plan, {}, nullptr, report);
      computed.packed = true;
    } else {
      computed.result = execute_dense(*model, part.inputs, report);
      report.sequences = count_tokens(plan);
    }
  } catch (const std::exception&) {
    // What the plain model can do must not fail here; if it cannot, what it raises is what the caller gets.
    computed = {};
    computed.result = model->plain(part.inputs);
    computed.keep = false;  // nothing is known about how such a result is made
    report = {};
    report.lookup_ms = looked_up;
    report.sequences = count_tokens(plan);
    report.execution = Execution::kDense;
  }
  if (computed.packed) computed.padding_skipped = part.rows * part.width - part.tokens;
  return computed;
}

void LayerCacheBase::Impl::check_made_for_budget() const {
  if (budget) return;
  throw Error(ErrorCode::kInvalidOptions,
              "fidelity 'budget' is asked for, but this cache keeps no banks for it; construct it with "
              "Options.fidelity = Fidelity::kBudget");
}

void LayerCacheBase::Impl::warn_uncalibrated() {
  if (budget->profile()) return;
  std::call_once(told_uncalibrated, [] {
    TORCH_WARN(
        "llmcache: fidelity 'budget' without a calibration reuses nothing beyond 'lossless'; call calibrate() with "
        "a sample of your traffic, or use_calibration()");
  });
}

LayerCacheBase::Impl::Computed LayerCacheBase::Impl::compute_within_budget(const Batch& part,
                                                                           const RequestOptions& request,
                                                                           ForwardReport& report) {
  const double looked_up = report.lookup_ms;
  try {
    if (auto answer = budget->run(part, request.tenant, request.output, report)) {
      Computed computed;
      computed.cut = answer->cut;
      computed.packed = true;
      computed.padding_skipped = part.rows * part.width - part.tokens;
      std::vector<std::int64_t> rows(static_cast<std::size_t>(part.rows));
      std::iota(rows.begin(), rows.end(), std::int64_t{0});
      const bool any =
          std::any_of(answer->rows.begin(), answer->rows.end(), [](const auto& row) { return !row.empty(); });
      if (answer->computed.isNone()) rows.clear();
      computed.result =
          any ? outputs->assemble(part, answer->rows, rows, answer->computed) : std::move(answer->computed);
      return computed;
    }
  } catch (const std::exception&) {
    // What it cannot do, the exact way may.
    report = {};
    report.lookup_ms = looked_up;
  }
  return compute(part, request, false, false, report);
}

void LayerCacheBase::Impl::count(const Batch& batch, const ForwardReport& report, const Computed& computed) {
  std::uint64_t identical = 0;
  std::uint64_t partly = 0;
  std::int64_t reused = 0;
  std::int64_t run = 0;
  for (const SequenceReport& sequence : report.sequences) {
    identical += sequence.source == Source::kIdentical ? 1 : 0;
    partly += sequence.source == Source::kPrefix ? 1 : 0;
    reused += sequence.reused_tokens;
    if (!sequence.layers.empty()) run += sequence.layers.front().computed;
  }
  requests += 1;
  sequences += static_cast<std::uint64_t>(batch.rows);
  hits += identical;
  prefix_hits += partly;
  tokens += static_cast<std::uint64_t>(batch.tokens);
  tokens_reused += static_cast<std::uint64_t>(reused);
  tokens_computed += static_cast<std::uint64_t>(run);
  padding_skipped += static_cast<std::uint64_t>(computed.padding_skipped);
}

c10::IValue LayerCacheBase::Impl::forward_threshold(const Batch& batch, const RequestOptions& request,
                                                    std::uint64_t first_number, ForwardReport& report) {
  Stopwatch clock;
  auto answer = run_model([&] { return threshold->run(batch, request, first_number, report); });
  number_rows(report, first_number);
  const double model_ms =
      report.embed_ms + report.head_ms + std::accumulate(report.layer_ms.begin(), report.layer_ms.end(), 0.0);
  c10::IValue result = std::move(answer.computed);
  std::vector<std::int64_t> rows;  // that the model's own result answers, all of its rows in order
  bool any_known = false;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    rows.push_back(row);
    any_known = any_known || !answer.rows[static_cast<std::size_t>(row)].empty();
  }
  if (any_known) {
    if (result.isNone()) rows.clear();
    result = outputs->assemble(batch, answer.rows, rows, result);
  }
  report.lookup_ms = std::max(clock.lap() - model_ms, 0.0);
  requests += 1;
  sequences += static_cast<std::uint64_t>(batch.rows);
  tokens += static_cast<std::uint64_t>(batch.tokens);
  tokens_computed += static_cast<std::uint64_t>(answer.tokens_computed);
  padding_skipped += static_cast<std::uint64_t>(batch.rows * batch.width - batch.tokens);
  return result;
}

LayerCacheBase::LayerCacheBase(std::unique_ptr<Model> model, Options options)
    : impl_(std::make_unique<Impl>(std::move(model), std::move(options))) {}

LayerCacheBase::~LayerCacheBase() = default;

c10::IValue LayerCacheBase::forward(const Inputs& inputs, const RequestOptions& options) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  ForwardReport report;
  auto result = impl_->forward(inputs, options, report);
  report.total_ms = clock.lap();
  thread_reports().set(impl_->identity, std::move(report));
  return result;
}

c10::IValue LayerCacheBase::forward_plan(const Inputs& inputs, const Plan& plan, const Donors& donors,
                                         Donors* capture) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  const Model& model = *impl_->model;
  const ModelProfile& profile = impl_->profile;
  model.check_unchanged();
  const Batch batch = check_batch(inputs, impl_->inputs, profile, model.device());
  check_plan(plan, batch, model, profile, donors);
  ForwardReport report;
  auto result = run_model([&] { return execute_packed(model, batch.inputs, plan, donors, capture, report); });
  report.total_ms = clock.lap();
  thread_reports().set(impl_->identity, std::move(report));
  return result;
}

Plan LayerCacheBase::full_plan(const Inputs& inputs) const {
  const Batch batch = check_batch(inputs, impl_->inputs, impl_->profile, impl_->model->device());
  if (!batch.contiguous) throw Error(ErrorCode::kInvalidInput, "the mask has holes: such a batch cannot be packed");
  return batch.full_plan(static_cast<std::int32_t>(impl_->model->layers()));
}

std::vector<std::vector<float>> LayerCacheBase::pooled_state(const Inputs& inputs, std::int64_t layer) const {
  const c10::NoGradGuard no_grad;
  const Model& model = *impl_->model;
  const ModelProfile& profile = impl_->profile;
  if (layer < 0 || layer > model.layers()) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("pooled_state: layer {}; 0 to {} is expected", layer, model.layers()));
  }
  model.check_unchanged();
  const Batch batch = check_batch(inputs, impl_->inputs, profile, model.device());
  check_packable(batch, model, profile);
  return run_model([&] { return pooled_states(model, batch, static_cast<std::int32_t>(layer)); });
}

CalibrationSample LayerCacheBase::run_sample(const std::function<std::optional<Inputs>()>& sample) const {
  const c10::NoGradGuard no_grad;
  impl_->check_made_for_budget();
  impl_->model->check_unchanged();
  return impl_->budget->run_sample(sample);
}

CalibrationProfile LayerCacheBase::calibrate(const CalibrationSample& sample) {
  const c10::NoGradGuard no_grad;
  impl_->check_made_for_budget();
  return impl_->budget->calibrate(sample);
}

CalibrationProfile LayerCacheBase::calibrate(const std::function<std::optional<Inputs>()>& sample) {
  return calibrate(run_sample(sample));
}

CalibrationProfile LayerCacheBase::calibrate(const std::vector<Inputs>& sample) {
  std::size_t next = 0;
  return calibrate([&]() -> std::optional<Inputs> {
    if (next == sample.size()) return std::nullopt;
    return sample[next++];
  });
}

void LayerCacheBase::use_calibration(const CalibrationProfile& profile) {
  const c10::NoGradGuard no_grad;
  impl_->check_made_for_budget();
  impl_->budget->use(profile);
}

std::optional<CalibrationProfile> LayerCacheBase::calibration() const {
  return impl_->budget ? impl_->budget->profile() : std::nullopt;
}

ForwardReport LayerCacheBase::last_report() const { return thread_reports().get(impl_->identity); }

Stats LayerCacheBase::stats() const {
  Stats stats;
  stats.requests = impl_->requests;
  stats.sequences = impl_->sequences;
  stats.identical_hits = impl_->hits;
  stats.tokens = impl_->tokens;
  stats.tokens_computed = impl_->tokens_computed;
  stats.padding_skipped = impl_->padding_skipped;
  stats.prefix_hits = impl_->prefix_hits;
  stats.tokens_reused = impl_->tokens_reused;
  const auto counters = impl_->outputs->counters();
  stats.insertions = counters.insertions;
  stats.evictions = counters.evictions;
  stats.rejected = counters.rejected;
  stats.entries = counters.entries;
  stats.bytes = counters.bytes;
  stats.peak_bytes = counters.peak_bytes;
  if (impl_->prefix) {
    const auto kept = impl_->prefix->counters();
    stats.insertions += kept.insertions;
    stats.evictions += kept.evictions;
    stats.rejected += kept.rejected;
    stats.entries += kept.entries;
    stats.bytes += kept.bytes;
    stats.peak_bytes += kept.peak_bytes;
  }
  if (impl_->threshold) impl_->threshold->fill(stats);
  if (impl_->budget) impl_->budget->fill(stats);
  return stats;
}

const ModelProfile& LayerCacheBase::profile() const noexcept { return impl_->profile; }
const Options& LayerCacheBase::options() const noexcept { return impl_->options; }
void LayerCacheBase::clear() {
  impl_->outputs->clear();
  if (impl_->prefix) impl_->prefix->clear();
  if (impl_->budget) impl_->budget->clear();
  if (impl_->threshold) impl_->threshold->clear();
}

}  // namespace llmcache
