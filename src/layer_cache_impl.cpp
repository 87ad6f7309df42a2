#include "layer_cache_impl.h"

#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/core.h>

#include <algorithm>
#include <exception>
#include <numeric>

#include "execute/clock.h"
#include "execute/engine.h"
#include "execute/self_check.h"
#include "model/tensors_of.h"

namespace llmcache {
namespace {

std::vector<std::int64_t> known_tokens(const ForwardReport& report) {
  std::vector<std::int64_t> known;
  for (const SequenceReport& sequence : report.sequences) known.push_back(sequence.reused_tokens);
  return known;
}

void number_rows(ForwardReport& report, std::uint64_t first) {
  for (std::size_t i = 0; i < report.sequences.size(); ++i) report.sequences[i].number = first + i;
}

/// A part of the capacity, which is then less.
std::size_t share_of(std::size_t& capacity, double part) {
  const auto bytes = static_cast<std::size_t>(static_cast<double>(capacity) * part);
  capacity -= bytes;
  return bytes;
}

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

}  // namespace

LayerCacheBase::Impl::Impl(std::unique_ptr<Model> wrapped, Options chosen)
    : model(std::move(wrapped)),
      options(std::move(chosen)),
      inputs(model->input_spec()),
      memory(options.capacity_bytes),
      verification(options.verify_rate) {
  const c10::NoGradGuard no_grad;
  Stopwatch clock;
  wrap();
  profile.wrap_ms += clock.lap();
  if (options.verify_rate > 0 && options.verify_in_background) verifying_ = std::make_unique<BackgroundAudits>();
}

LayerCacheBase::Impl::~Impl() = default;

void LayerCacheBase::Impl::wrap() {
  wrapped_under_ = numeric_state(model->device());
  model->describe(profile);
  output = probe(*model, inputs, options.mask_argument, profile);
  self_check(*model, inputs, output, profile);
  std::size_t capacity = options.capacity_bytes;
  if (options.fidelity == Fidelity::kThreshold) {
    threshold = std::make_unique<ThresholdReuse>(*model, inputs, output, profile, options,
                                                 share_of(capacity, options.threshold.capacity_share), &memory);
  } else {
    options.prefix.validate(model->layers());
    if (options.fidelity == Fidelity::kBudget) {
      options.budget.validate(model->layers());
      budget = std::make_unique<BudgetReuse>(*model, inputs, output, profile, options,
                                             share_of(capacity, options.budget.capacity_share), &memory);
    }
    make_prefix_reuse(capacity);
  }
  outputs = std::make_unique<KnownOutputs>(*model, inputs, output, profile, capacity, &memory);
  verification.envelope().take(profile.verified);
}

/// Where the model lets a sequence take its beginning from another one.
void LayerCacheBase::Impl::make_prefix_reuse(std::size_t& capacity) {
  if (!profile.causal || profile.granularity != Granularity::kTokens || !KnownOutputs::keeps_rows(profile)) return;
  for (std::size_t i = 0; i < inputs.opens_attention.size() && profile.prefix_obstacle.empty(); ++i) {
    // A mask closes attention; what another input does is not known.
    if (static_cast<int>(i) != profile.mask_argument) profile.prefix_obstacle = inputs.opens_attention[i];
  }
  std::string why = profile.prefix_obstacle;
  if (why.empty()) {
    // Verified in a cache of its own, whatever the capacity is.
    constexpr std::size_t kVerifying = std::size_t{1} << 30;
    PrefixOptions all = options.prefix;
    all.layers.clear();
    try {
      profile.prefix_reuse = PrefixReuse(*model, inputs, output, profile, all, kVerifying).verify(why);
    } catch (const std::exception& error) {
      why = reason_of(error);
    }
  }
  if (!profile.prefix_reuse) {
    profile.notes.push_back("prefix reuse is not available: " + why);
    return;
  }
  for (std::uint8_t a = 0; a <= PrefixReuse::kVerifiedClass; ++a) {
    for (std::uint8_t b = 0; b <= PrefixReuse::kVerifiedClass; ++b) {
      profile.verified.codes.push_back(SizeCode(SizeCode::Kind::kPrefix, a, b).number());
    }
  }
  const bool lossless = options.fidelity == Fidelity::kLossless || options.fidelity == Fidelity::kBudget;
  if (!lossless || options.capacity_bytes == 0 || options.prefix.capacity_share == 0) return;
  prefix = std::make_unique<PrefixReuse>(*model, inputs, output, profile, options.prefix,
                                         share_of(capacity, options.prefix.capacity_share), &memory);
}

bool LayerCacheBase::Impl::can_pack(const Batch& batch) const {
  return batch.contiguous && batch.tokens > 0 && profile.granularity != Granularity::kWholeLayers &&
         (batch.right_padded || profile.left_padding) && !verification.closed(Mechanism::kPacked);
}

/// Why the request is for the plain model alone; empty: it is not.
std::string LayerCacheBase::Impl::plain_reason(const Batch& batch) const {
  if (!batch.plain_only.empty()) return batch.plain_only;
  if (verification.closed(Mechanism::kDense)) return "an answer computed layer by layer was another than the model's";
  if (const auto now = numeric_state(model->device()); !(now == wrapped_under_)) {
    return what_changed(wrapped_under_, now);
  }
  const bool empty_row = std::any_of(batch.spans.begin(), batch.spans.end(), [](const RowSpan& s) { return !s.tokens; });
  if (batch.width > 0 && empty_row && !outputs->all_per_token()) {
    return "a row has no real token, and the output of a row is more than that of its tokens";
  }
  return {};
}

void LayerCacheBase::Impl::check_request(const RequestOptions& request, Fidelity fidelity) {
  check_fidelity(fidelity);
  check_output(request.output);
  if (fidelity == Fidelity::kThreshold && threshold == nullptr) {
    throw Error(ErrorCode::kInvalidOptions,
                "RequestOptions.fidelity is 'threshold', but this cache keeps no states of layers; construct it with "
                "Options.fidelity = Fidelity::kThreshold");
  }
  if (fidelity != Fidelity::kBudget) return;
  check_made_for_budget();
  warn_uncalibrated();
}

void LayerCacheBase::Impl::check_made_for_budget() const {
  if (budget) return;
  throw Error(ErrorCode::kInvalidOptions,
              "fidelity 'budget' is asked for, but this cache keeps no banks for it; construct it with "
              "Options.fidelity = Fidelity::kBudget");
}

void LayerCacheBase::Impl::warn_uncalibrated() {
  if (budget->profile()) return;
  std::call_once(told_uncalibrated_, [] {
    TORCH_WARN(
        "llmcache: fidelity 'budget' without a calibration reuses nothing beyond 'lossless'; call calibrate() with "
        "a sample of your traffic, or use_calibration()");
  });
}

/// Returns the epoch that the call belongs to.
std::uint64_t LayerCacheBase::Impl::check_weights() {
  const std::shared_lock lock(weights_mutex_);
  model->check_unchanged();
  const std::uint64_t every = options.weight_check_requests;
  if (every > 0 && (weight_checks_.fetch_add(1, std::memory_order_relaxed) + 1) % every == 0) {
    model->check_every_weight();
  }
  return epoch_.load(std::memory_order_acquire);
}

c10::IValue LayerCacheBase::Impl::forward(const Inputs& given, const RequestOptions& request, ForwardReport& report) {
  const Fidelity fidelity = request.fidelity.value_or(options.fidelity);
  check_request(request, fidelity);
  const std::uint64_t epoch = check_weights();
  const Batch batch = check_batch(given, inputs, profile, model->device());
  Call call{batch, request, fidelity, report};
  call.epoch = epoch;
  call.first_number = next_number_.fetch_add(static_cast<std::uint64_t>(batch.rows));
  c10::IValue result = answer(call);
  finish(call);
  return result;
}

/// Nothing fails from here on: only now the call leaves anything behind.
void LayerCacheBase::Impl::finish(Call& call) {
  Stopwatch clock;
  if (!call.fallbacks.empty()) {
    const auto& [mechanism, reason] = call.fallbacks.front();
    call.report.fallback = mechanism + ": " + reason;
    fallbacks_.add(call.fallbacks);
  }
  {
    const std::shared_lock lock(kept_mutex_);
    if (epoch_.load(std::memory_order_acquire) == call.epoch) call.kept.commit();
  }
  call.report.store_ms += clock.lap();
  count(call);
}

c10::IValue LayerCacheBase::Impl::answer(Call& call) {
  if (const auto reason = plain_reason(call.batch); !reason.empty()) return answer_plainly(call, reason);
  if (call.fidelity == Fidelity::kThreshold && can_pack(call.batch)) {
    if (auto result = answer_by_similarity(call)) return std::move(*result);
  }
  return answer_exactly(call);
}

c10::IValue LayerCacheBase::Impl::answer_plainly(Call& call, const std::string& reason) {
  const Batch& batch = call.batch;
  call.report.sequences = count_tokens(batch.full_plan(static_cast<std::int32_t>(model->layers())));
  call.report.execution = Execution::kDense;
  number_rows(call.report, call.first_number);
  auto result = run_model([&] { return plain_answer(batch, call.request.output, call.report); });
  call.fallbacks.emplace_back("request", reason);
  return result;
}

c10::IValue LayerCacheBase::Impl::plain_answer(const Batch& batch, Output wanted, const ForwardReport& report) const {
  return cut_output(model->plain(batch.inputs), output, batch, known_tokens(report), wanted);
}

/// Unset if it fails: the model may still take the request whole.
std::optional<c10::IValue> LayerCacheBase::Impl::answer_by_similarity(Call& call) {
  try {
    const auto all = run_threshold(call);
    return cut_output(all, output, call.batch, known_tokens(call.report), call.request.output);
  } catch (const std::exception& error) {
    call.fallbacks.emplace_back("threshold", whole_reason(error));
    call.report = {};
    call.kept = {};
    call.padding_skipped = 0;
    return std::nullopt;
  }
}

c10::IValue LayerCacheBase::Impl::run_threshold(Call& call) {
  Stopwatch clock;
  const Batch& batch = call.batch;
  ForwardReport& report = call.report;
  auto answer = run_model([&] { return threshold->run(batch, call.request, call.first_number, report, call.kept); });
  number_rows(report, call.first_number);
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
  call.padding_skipped = batch.rows * batch.width - batch.tokens;
  return result;
}

c10::IValue LayerCacheBase::Impl::answer_exactly(Call& call) {
  const Batch& batch = call.batch;
  ForwardReport& report = call.report;
  report.sequences = count_tokens(batch.full_plan(static_cast<std::int32_t>(model->layers())));
  Stopwatch clock;
  const bool within_budget = call.fidelity == Fidelity::kBudget && budget->ready() &&
                             budget->serves(call.request.output) && can_pack(batch);
  const bool lossless = call.fidelity == Fidelity::kLossless || call.fidelity == Fidelity::kBudget;
  const bool prefixes =
      lossless && prefix && !within_budget && can_pack(batch) && !verification.closed(Mechanism::kPrefix);
  const bool exact = call.fidelity == Fidelity::kIdentical;
  // Where only a part is wanted of what prefixes leave to compute, a whole output is not made.
  const bool cuts = prefixes || (within_budget && profile.causal);
  const bool keeps = KnownOutputs::keeps_rows(profile) && options.capacity_bytes > 0 && batch.rows > 0 &&
                     batch.width > 0 && !(cuts && call.request.output != Output::kAll) &&
                     !verification.closed(Mechanism::kExactMatch);
  const KnownRows known = keeps ? outputs->look_up(batch, call.request.tenant, exact, report)
                                : KnownRows(static_cast<std::size_t>(batch.rows));
  report.lookup_ms = clock.lap();

  Computed computed;
  const bool all_missing = static_cast<std::int64_t>(known.missing.size()) == batch.rows;
  if (all_missing || !known.missing.empty()) {
    const Batch part = all_missing ? batch : batch.select(known.missing);
    ForwardReport own;
    own.lookup_ms = report.lookup_ms;
    computed = run_model([&] {
      return within_budget ? compute_within_budget(call, part, own) : compute(call, part, prefixes, own);
    });
    if (computed.packed) call.padding_skipped = part.rows * part.width - part.tokens;
    for (PrefixUse& use : call.prefix_uses) use.row = known.missing[static_cast<std::size_t>(use.row)];
    for (std::size_t m = 0; m < known.missing.size(); ++m) {
      report.sequences[static_cast<std::size_t>(known.missing[m])] = std::move(own.sequences[m]);
    }
    own.sequences = std::move(report.sequences);
    report = std::move(own);
  }
  number_rows(report, call.first_number);
  clock.lap();
  if (keeps && computed.keep) {
    outputs->keep(batch, known, computed.result, !computed.packed, prefixes, report, call.kept);
  }
  c10::IValue result = std::move(computed.result);
  if (!all_missing) result = outputs->assemble(batch, known, result);
  if (!computed.cut) result = cut_output(result, output, batch, known_tokens(report), call.request.output);
  report.store_ms += clock.lap();
  return computed.keep ? verified(call, known, std::move(result)) : result;
}

LayerCacheBase::Impl::Computed LayerCacheBase::Impl::compute(Call& call, const Batch& part, bool prefixes,
                                                             ForwardReport& report) {
  Computed computed;
  const double looked_up = report.lookup_ms;
  const bool exact = call.fidelity == Fidelity::kIdentical;
  const char* mechanism = "dense";
  try {
    if (prefixes && can_pack(part)) {
      mechanism = "prefix";
      computed.result =
          prefix->run(part, call.request.tenant, call.request.output, report, call.kept, call.prefix_uses);
      computed.cut = profile.head_tokenwise;
      computed.packed = true;
      if (computed.result.isNone()) computed.result = outputs->no_tokens(part.rows);
    } else if (!exact && part.padded && can_pack(part)) {
      mechanism = "packed";
      const auto plan = part.full_plan(static_cast<std::int32_t>(model->layers()));
      computed.result = execute_packed(*model, part.inputs, plan, {}, nullptr, report);
      computed.packed = true;
    } else {
      computed.result = execute_dense(*model, part.inputs, report);
      report.sequences = count_tokens(part.full_plan(static_cast<std::int32_t>(model->layers())));
    }
    return computed;
  } catch (const std::exception& error) {
    report = {};
    report.lookup_ms = looked_up;
    return compute_plainly(call, part, mechanism, error, report);
  }
}

/// What the plain model can do must not fail here; if it cannot, what it raises is what the caller gets.
LayerCacheBase::Impl::Computed LayerCacheBase::Impl::compute_plainly(Call& call, const Batch& part,
                                                                     const char* mechanism,
                                                                     const std::exception& error,
                                                                     ForwardReport& report) {
  call.kept = {};
  call.prefix_uses.clear();
  const std::string reason = whole_reason(error);
  Computed computed;
  computed.result = model->plain(part.inputs);
  computed.keep = false;  // nothing is known about how such a result is made
  report.sequences = count_tokens(part.full_plan(static_cast<std::int32_t>(model->layers())));
  report.execution = Execution::kDense;
  call.fallbacks.emplace_back(mechanism, reason);
  return computed;
}

LayerCacheBase::Impl::Computed LayerCacheBase::Impl::compute_within_budget(Call& call, const Batch& part,
                                                                           ForwardReport& report) {
  const double looked_up = report.lookup_ms;
  try {
    if (auto answer = budget->run(part, call.request.tenant, call.request.output, report, call.kept)) {
      Computed computed;
      computed.cut = answer->cut;
      computed.packed = true;
      std::vector<std::int64_t> rows(static_cast<std::size_t>(part.rows));
      std::iota(rows.begin(), rows.end(), std::int64_t{0});
      const bool any =
          std::any_of(answer->rows.begin(), answer->rows.end(), [](const auto& row) { return !row.empty(); });
      if (answer->computed.isNone()) rows.clear();
      computed.result =
          any ? outputs->assemble(part, answer->rows, rows, answer->computed) : std::move(answer->computed);
      return computed;
    }
  } catch (const std::exception& error) {
    // What it cannot do, the exact way may.
    call.fallbacks.emplace_back("budget", whole_reason(error));
    call.kept = {};
    report = {};
    report.lookup_ms = looked_up;
  }
  return compute(call, part, false, report);
}

c10::IValue LayerCacheBase::Impl::verified(Call& call, const KnownRows& known, c10::IValue result) {
  AnswerSizes sizes = sizes_of(call.batch, known, call.prefix_uses, call.report);
  if (!sizes.checkable) return result;
  const auto due = verification.due(sizes.codes, sizes.reused);
  if (due == Verification::Due::kNo) return result;
  if (verifying_) {
    verify_later(call, due, std::move(sizes), result);
    return result;
  }
  Stopwatch clock;
  try {
    auto plain = plain_answer(call.batch, call.request.output, call.report);
    const bool same = compare(call.batch, call.request.output, call.report, due, sizes, result, plain);
    call.report.verified = true;
    call.report.verify_ms = clock.lap();
    if (due == Verification::Due::kSample) verification.add_time(0, call.report.verify_ms);
    if (same) return result;
    call.kept = {};
    call.fallbacks.emplace_back("verification", "the answer differed from the plain model's, which was returned");
    drop();
    return plain;
  } catch (const std::exception&) {
    verification.failed();  // the plain model may lack memory for what the packed one had enough for
    call.report.verify_ms = clock.lap();
    return result;
  }
}

bool LayerCacheBase::Impl::compare(const Batch& batch, Output wanted, const ForwardReport& report,
                                   Verification::Due due, const AnswerSizes& sizes, const c10::IValue& result,
                                   const c10::IValue& plain) {
  const auto found = differences(result, plain, output, batch, wanted, report);
  if (found.empty()) {
    verification.agreed(due, sizes.codes);
    verification.envelope().add_sizes(sizes.longest, batch.rows, sizes.padding);
    return true;
  }
  for (const Difference& difference : found) verification.differed(due, difference.mechanism, difference.what);
  return false;
}

void LayerCacheBase::Impl::verify_later(Call& call, Verification::Due due, AnswerSizes sizes,
                                        const c10::IValue& result) {
  std::size_t bytes = 0;
  const auto copy = [&](const at::Tensor& tensor) {
    bytes += tensor.nbytes();
    return tensor.clone();
  };
  auto batch = std::make_shared<Batch>(call.batch);
  for (c10::IValue& input : batch->inputs) input = map_tensors(input, copy);
  auto job = [this, batch, answer = map_tensors(result, copy), report = call.report, wanted = call.request.output,
              epoch = call.epoch, due, sizes = std::move(sizes), state = at::ThreadLocalState()] {
    const at::ThreadLocalStateGuard guard(state);
    const c10::NoGradGuard no_grad;
    Stopwatch clock;
    try {
      if (check_weights() != epoch) return;  // it was made with other weights, or from what was dropped
      const auto plain = plain_answer(*batch, wanted, report);
      const bool same = compare(*batch, wanted, report, due, sizes, answer, plain);
      if (due == Verification::Due::kSample) verification.add_time(0, clock.lap());
      if (!same) drop();
    } catch (const std::exception&) {
      verification.failed();
    }
  };
  if (!verifying_->add(std::move(job), bytes)) return;  // counted as dropped: another answer of the size is compared
}

void LayerCacheBase::Impl::drop() {
  const std::unique_lock lock(kept_mutex_);
  epoch_.fetch_add(1, std::memory_order_release);
  outputs->clear();
  if (prefix) prefix->clear();
  if (budget) budget->clear();
  if (threshold) threshold->clear();
}

void LayerCacheBase::Impl::weights_changed() {
  const std::unique_lock lock(weights_mutex_);
  model->weights_changed();
  profile.digest = model->digest();
  if (budget) budget->forget();
  verification.envelope().clear();
  verification.envelope().take(profile.verified);
  drop();
}

void LayerCacheBase::Impl::count(const Call& call) {
  std::uint64_t identical = 0;
  std::uint64_t partly = 0;
  std::int64_t reused = 0;
  std::int64_t run = 0;
  for (const SequenceReport& sequence : call.report.sequences) {
    identical += sequence.source == Source::kIdentical ? 1 : 0;
    partly += sequence.source == Source::kPrefix ? 1 : 0;
    reused += sequence.reused_tokens;
    if (!sequence.layers.empty()) run += sequence.layers.front().computed;
  }
  requests_ += 1;
  sequences_ += static_cast<std::uint64_t>(call.batch.rows);
  hits_ += identical;
  prefix_hits_ += partly;
  tokens_ += static_cast<std::uint64_t>(call.batch.tokens);
  tokens_reused_ += static_cast<std::uint64_t>(reused);
  tokens_computed_ += static_cast<std::uint64_t>(run);
  padding_skipped_ += static_cast<std::uint64_t>(call.padding_skipped);
}

Stats LayerCacheBase::Impl::stats() const {
  Stats stats;
  stats.requests = requests_;
  stats.sequences = sequences_;
  stats.identical_hits = hits_;
  stats.tokens = tokens_;
  stats.tokens_computed = tokens_computed_;
  stats.padding_skipped = padding_skipped_;
  stats.prefix_hits = prefix_hits_;
  stats.tokens_reused = tokens_reused_;
  const auto add = [&](const auto& counters) {
    stats.insertions += counters.insertions;
    stats.evictions += counters.evictions;
    stats.rejected += counters.rejected;
    stats.entries += counters.entries;
  };
  add(outputs->counters());
  if (prefix) add(prefix->counters());
  if (threshold) threshold->fill(stats);
  if (budget) budget->fill(stats);
  stats.bytes = memory.used();
  stats.peak_bytes = memory.peak();  // read last: never less than the bytes
  fallbacks_.fill(stats.fallbacks);
  verification.fill(stats.verification);
  if (verifying_) {
    stats.verification.waiting = verifying_->waiting();
    stats.verification.dropped = verifying_->dropped();
  }
  return stats;
}

}  // namespace llmcache
