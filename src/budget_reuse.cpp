#include "budget_reuse.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "background_audits.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "exit_pass.h"
#include "exit_rules.h"
#include "exit_sampler.h"
#include "ladder_calibrator.h"
#include "llmcache/error.h"
#include "refresh/exit_calibration.h"
#include "refresh/profile_check.h"
#include "segment_ladder.h"
#include "token_ladder.h"

namespace llmcache {
namespace {

/// Runs a step of a calibration; what is no Error yet becomes one.
template <class Run>
auto only_errors(const Run& run) {
  try {
    return run();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(
        Error(ErrorCode::kNotAvailable, "the calibration cannot be made or used: " + reason_of(error)));
  } catch (...) {
    std::throw_with_nested(Error(ErrorCode::kNotAvailable,
                                 "the calibration cannot be made or used: what was thrown is no std::exception"));
  }
}

}  // namespace

BudgetReuse::BudgetReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                         const ModelProfile& profile, const Options& options, std::size_t capacity_bytes,
                         MemoryAccount* total)
    : model_(model),
      inputs_(inputs),
      output_(output),
      profile_(profile),
      options_(options.budget),
      capacity_bytes_(capacity_bytes),
      account_(capacity_bytes, total),
      exits_(static_cast<std::size_t>(model.layers())) {
  const auto metric = options_.budget.metric;
  if (profile.granularity == Granularity::kWholeLayers) {
    no_exits_ = "it runs whole layers only; its profile says why";
  } else if (output.leaves.size() != 1 || output.leaves[0].tokens >= 0 || output.leaves[0].batch != 0) {
    no_exits_ = "its output is not one pooled vector a sequence, [batch, values]";
  } else if (options_.early_exit == EarlyExit::kOff) {
    no_exits_ = "BudgetOptions.early_exit is off";
  } else if (metric == BudgetMetric::kTokenAgreement) {
    no_exits_ = "its output is a pooled one, and the metric of the budget is for tokens; choose decision or relative";
  }
  make_ladder();
  if (options_.background_audit && (no_exits_.empty() || ladder_)) audits_ = std::make_unique<BackgroundAudits>();
}

/// Token states are reused where a model allows it, and its kind of answer fits the metric.
void BudgetReuse::make_ladder() {
  const bool wanted = profile_.causal ? options_.segment_reuse : options_.token_reuse;
  if (!wanted) {
    no_ladder_ = profile_.causal ? "BudgetOptions.segment_reuse is off" : "BudgetOptions.token_reuse is off";
    return;
  }
  if (output_.leaves.empty() || output_.leaves[0].batch != 0 || output_.leaves[0].tokens > 1) {
    no_ladder_ = "its first output is neither [batch, values] nor [batch, tokens, values]";
    return;
  }
  const auto make = [this](MemoryAccount* total) -> std::unique_ptr<ReuseLadder> {
    if (profile_.causal) {
      return std::make_unique<SegmentLadder>(model_, inputs_, output_, profile_, options_.format, capacity_bytes_,
                                             total);
    }
    return std::make_unique<TokenLadder>(model_, inputs_, output_, profile_, options_.format, capacity_bytes_, total);
  };
  try {
    // What a calibration holds is beside what the cache does (BudgetStats::calibrating_bytes).
    const auto fresh = [make] { return make(nullptr); };
    ladder_ = std::make_unique<LadderReuse>(make(&account_), fresh, model_, output_, profile_, options_, failures_);
  } catch (const std::exception& error) {
    no_ladder_ = reason_of(error);
  }
}

BudgetReuse::~BudgetReuse() = default;

std::shared_ptr<ExitRules> BudgetReuse::rules() const {
  const std::lock_guard lock(mutex_);
  return rules_;
}

std::optional<CalibrationProfile> BudgetReuse::profile() const {
  const std::lock_guard lock(mutex_);
  return calibration_;
}

void BudgetReuse::check_available() const {
  if (no_exits_.empty() || ladder_) return;
  throw Error(ErrorCode::kNotAvailable,
              fmt::format("fidelity 'budget' has nothing to reuse for this model: no early exit, because {}; no token "
                          "states, because {}",
                          no_exits_, no_ladder_));
}

CalibrationSample BudgetReuse::run_sample(const std::function<std::optional<Inputs>()>& sample) const {
  check_available();
  auto requests = std::make_shared<std::vector<Batch>>();
  std::optional<ExitSampler> exits;
  if (no_exits_.empty()) exits.emplace(model_);
  ByteGauge::Share held(calibrating_);
  CalibrationSample done;
  done.model_digest = profile_.digest;
  const auto add = [&](const Inputs& given) {
    Batch batch = check_sample(given);
    for (const RowSpan& span : batch.spans) done.sequences += span.tokens > 0 ? 1 : 0;
    if (exits && batch.tokens > 0) exits->add(batch);
    if (requests->size() < LadderCalibrator::kMostRequests) {
      for (c10::IValue& input : batch.inputs) {
        if (input.isTensor()) input = input.toTensor().clone();  // the caller may use his again
      }
      done.bytes += batch.input_bytes();
      requests->push_back(std::move(batch));
    }
    held.set(done.bytes + (exits ? exits->bytes() : 0));
  };
  while (const auto given = sample()) {  // what it throws is the caller's own
    only_errors([&] { add(*given); });
  }
  if (done.sequences == 0) {
    throw Error(ErrorCode::kInvalidInput, "calibration got no sequence with a real token");
  }
  if (exits) {
    done.exit = only_errors([&] { return exits->finish(); });
    done.sequences = done.exit->outputs.size(0);
    done.bytes += exits->bytes();
  }
  done.requests = std::move(requests);
  return done;
}

/// Throws Error(kInvalidInput), or Error(kNotAvailable) where the model cannot run such a batch packed.
Batch BudgetReuse::check_sample(const Inputs& given) const {
  try {
    Batch batch = check_batch(given, inputs_, profile_, model_.device());
    check_packable(batch, model_, profile_);
    return batch;
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(
        Error(ErrorCode::kInvalidInput, "a batch of the sample cannot be read: " + reason_of(error)));
  }
}

CalibrationProfile BudgetReuse::calibrate(const CalibrationSample& sample) {
  check_available();
  if (sample.model_digest != profile_.digest || sample.requests == nullptr) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("the sample was run by a model of digest '{}', this one has '{}'", sample.model_digest,
                            profile_.digest));
  }
  const std::lock_guard one_at_a_time(calibrate_mutex_);
  return only_errors([&] {
    model_.check_unchanged();
    auto profile = fit(sample);
    model_.check_unchanged();  // while it ran
    use(profile);
    return profile;
  });
}

/// Fits and certifies on what is its own: reads nothing that calls change, and changes nothing that they read.
CalibrationProfile BudgetReuse::fit(const CalibrationSample& sample) const {
  ByteGauge::Share held(calibrating_);
  held.set(sample.bytes);
  CalibrationProfile profile;
  profile.budget = options_.budget;
  profile.early_exit = no_exits_.empty() ? options_.early_exit : EarlyExit::kOff;
  profile.model_digest = profile_.digest;
  if (no_exits_.empty() && sample.exit) calibrate_exit(*sample.exit, options_, capacity_bytes_, profile);
  if (!ladder_) return profile;
  held.set(sample.bytes + profile.bytes);
  // One of the two is used, so that one budget is spent: the one that computes less.
  double layers_run = 1;
  for (std::size_t l = 0; l < profile.expected_exits.size(); ++l) {
    const auto layers = static_cast<double>(profile.expected_exits.size());
    layers_run -= profile.expected_exits[l] * (1 - static_cast<double>(l) / layers);
  }
  const auto choice = ladder_->calibrate(*sample.requests, capacity_bytes_, calibrating_);
  if (choice && choice->computed < layers_run) {
    profile.reuse = choice;
    profile.exit = nullptr;
    profile.early_exit = EarlyExit::kOff;
    profile.expected_exits.clear();
    profile.bytes = 0;
    profile.fitted = choice->fitted;
    profile.certified = choice->certified;
    profile.certified_error = choice->error;
    profile.error_bound = choice->bound;
    profile.typical_distance = choice->typical_distance;
    profile.expected_share = 1 - choice->computed;
  }
  return profile;
}

/// Throws Error(kInvalidOptions) that says why a profile is not for this cache.
void BudgetReuse::check_fits(const CalibrationProfile& profile) const {
  const auto refuse = [](const std::string& why) {
    throw Error(ErrorCode::kInvalidOptions, "the calibration profile does not fit this cache: " + why);
  };
  check_numbers(profile);
  if (profile.exit && !no_exits_.empty()) refuse("it has early exits, and there are none, because " + no_exits_);
  if (profile.reuse && !ladder_) refuse("it reuses token states, and that cannot be done, because " + no_ladder_);
  if (profile.model_digest != profile_.digest) {
    refuse(
        fmt::format("it was made with a model of digest {}, this one has {}", profile.model_digest, profile_.digest));
  }
  const Budget& asked = options_.budget;
  const Budget& has = profile.budget;
  if (has.metric != asked.metric || has.epsilon > asked.epsilon || has.delta > asked.delta) {
    refuse(fmt::format("it promises {} error {} with confidence {}, BudgetOptions.budget asks for {} error {} with {}",
                       to_string(has.metric), has.epsilon, 1 - has.delta, to_string(asked.metric), asked.epsilon,
                       1 - asked.delta));
  }
  if (!profile.exit) return;
  if (profile.early_exit != options_.early_exit) {
    refuse(fmt::format("its early exit is {}, BudgetOptions.early_exit is {}", to_string(profile.early_exit),
                       to_string(options_.early_exit)));
  }
  const ExitModel& exit = *profile.exit;
  const auto fits = [&](const ExitLayer& layer) { return !layer.used() || layer.centre.size(0) == profile_.hidden; };
  if (static_cast<std::int64_t>(exit.layers.size()) != model_.layers() ||
      !std::all_of(exit.layers.begin(), exit.layers.end(), fits)) {
    refuse("its banks are for another number of layers or another width");
  }
  if (exit.bytes() > capacity_bytes_) {
    refuse(
        fmt::format("its banks take {} bytes, and {} are there for them (Options.capacity_bytes, "
                    "BudgetOptions.capacity_share)",
                    exit.bytes(), capacity_bytes_));
  }
  const bool decides = exit.metric == BudgetMetric::kDecision && exit.outputs.size(0) > 0;
  const auto device = model_.device();
  if (decides && !at::equal(decisions_of(exit.outputs.to(device), options_.scores), exit.decisions.to(device))) {
    refuse("BudgetOptions.scores decides otherwise than when it was made");
  }
}

void BudgetReuse::use(CalibrationProfile profile) {
  only_errors([&] {
    check_fits(profile);
    std::shared_ptr<ExitRules> rules;
    if (profile.exit) {
      std::vector<RiskGate::Settings> gates;
      for (std::size_t level = 0; options_.audit_rate > 0 && level < profile.exit->thresholds.size(); ++level) {
        RiskGate::Settings& settings = gates.emplace_back();
        settings.epsilon = options_.budget.epsilon;
        settings.audit_rate = options_.audit_rate;
        settings.closed_audit_rate = std::max(options_.audit_rate, 0.25);
        settings.seed = options_.seed + level;
      }
      rules = std::make_shared<ExitRules>(profile.exit->to(model_.device()), options_.scores, failures_, gates);
    }
    const std::lock_guard one_at_a_time(use_mutex_);
    const std::size_t bytes = rules ? rules->exit.bytes() : 0;
    if (bytes > exit_bytes_) reserve_exits(bytes);
    if (ladder_) ladder_->use(profile.reuse);
    const std::lock_guard lock(mutex_);
    calibration_ = std::move(profile);
    rules_ = std::move(rules);
    account_.release(std::exchange(exit_bytes_, bytes) - bytes);
  });
}

/// What the ladder holds makes room, as soon as no running request reads it any more.
void BudgetReuse::reserve_exits(std::size_t bytes) {
  constexpr int kMostTurns = 2000;  // of a millisecond
  for (int turn = 0; !account_.try_reserve(bytes - exit_bytes_); ++turn) {
    if (turn == kMostTurns) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("running requests hold token states that leave no room for the {} bytes of the "
                              "calibration's banks; use the calibration again when they have returned",
                              bytes));
    }
    if (turn > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (ladder_) ladder_->clear();
  }
  exit_bytes_ = bytes;
}

std::optional<BudgetReuse::Answer> BudgetReuse::run(const Batch& batch, const std::string& tenant, Output output,
                                                    ForwardReport& report, KeptLater& kept) {
  if (!ladder_ || !ladder_->ready()) return run_exits(batch, report, kept);
  auto result = ladder_->run(batch, tenant, output, report, audits_.get(), kept);
  if (!result) return std::nullopt;
  return Answer{std::move(*result), profile_.causal && profile_.head_tokenwise,
                std::vector<std::vector<at::Tensor>>(static_cast<std::size_t>(batch.rows))};
}

void BudgetReuse::forget() {
  const std::lock_guard one_at_a_time(use_mutex_);
  {
    const std::lock_guard lock(mutex_);
    calibration_.reset();
    rules_.reset();
    account_.release(std::exchange(exit_bytes_, 0));
  }
  if (ladder_) ladder_->use(std::nullopt);
}

void BudgetReuse::clear() {
  if (ladder_) ladder_->clear();
}

std::optional<BudgetReuse::Answer> BudgetReuse::run_exits(const Batch& batch, ForwardReport& report, KeptLater& kept) {
  const auto rules = this->rules();
  if (rules == nullptr) return std::nullopt;
  const Plan plan = batch.full_plan(static_cast<std::int32_t>(model_.layers()));
  ExitPass pass(*rules, plan.sequences.size(), audits_ != nullptr);
  Answer answer;
  // If it throws nothing is served by reuse, and the gates are never told of the audits that they asked for.
  answer.computed = execute_packed(model_, batch.inputs, plan, {}, nullptr, report, &pass);
  answer.rows.resize(static_cast<std::size_t>(batch.rows));
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const ExitPass::Sequence& sequence = pass.sequences()[i];
    if (sequence.left < 0) continue;
    const auto row = static_cast<std::size_t>(plan.sequences[i].row);
    kept.add([this, left = sequence.left] { ++exits_[static_cast<std::size_t>(left)]; });
    answer.rows[row] = {sequence.answer.to(profile_.dtype).unsqueeze(0)};
    report.sequences[row].source = Source::kEarlyExit;
    report.sequences[row].resumed_layer = sequence.left;
    report.sequences[row].expected_error = sequence.expected;
  }
  // There is an answer: whatever becomes of the audits, it is served.
  pass.close();
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    const ExitPass::Sequence& sequence = pass.sequences()[i];
    const std::int64_t row = plan.sequences[i].row;
    if (sequence.trials.empty()) continue;
    if (sequence.left >= 0) {
      audit_later(rules, batch, row, sequence.trials);
    } else {
      audit_now(*rules, batch, row, sequence.trials, answer.computed, report.sequences[static_cast<std::size_t>(row)]);
    }
  }
  return answer;
}

/// Compares what could have been reused with `computed`, which has the row in full.
void BudgetReuse::audit_now(ExitRules& rules, const Batch& batch, std::int64_t row, const std::vector<Trial>& trials,
                            const c10::IValue& computed, SequenceReport& report) const {
  const auto& span = batch.spans[static_cast<std::size_t>(row)];
  try {
    const auto full = row_of(computed, output_, row, span.first, span.tokens, batch.width)[0];
    report.drift = record(rules, trials, full.reshape({-1}), AuditPlace::kWithinCall);
    report.shadowed = true;
  } catch (...) {
    fail(rules, trials, AuditPlace::kWithinCall, std::current_exception());
  }
}

/// Puts the comparison of a row that has left in the queue.
void BudgetReuse::audit_later(const std::shared_ptr<ExitRules>& rules, const Batch& batch, std::int64_t row,
                              const std::vector<Trial>& trials) {
  try {
    const Batch one = batch.select({row});
    std::size_t bytes = one.input_bytes();
    for (const Trial& trial : trials) bytes += trial.answer.nbytes();
    if (audits_->add([this, rules, one, trials] { audit(*rules, one, trials); }, bytes)) {
      rules->supervision.queued();
    } else {
      drop(*rules, trials);
    }
  } catch (...) {
    fail(*rules, trials, AuditPlace::kInBackground, std::current_exception());
  }
}

void BudgetReuse::audit(ExitRules& rules, const Batch& sequence, const std::vector<Trial>& trials) const {
  try {
    model_.check_unchanged();
    ForwardReport report;
    const auto plan = sequence.full_plan(static_cast<std::int32_t>(model_.layers()));
    const auto result = execute_packed(model_, sequence.inputs, plan, {}, nullptr, report);
    const RowSpan& span = sequence.spans[0];
    record(rules, trials, row_of(result, output_, 0, span.first, span.tokens, sequence.width)[0].reshape({-1}),
           AuditPlace::kInBackground);
  } catch (...) {
    fail(rules, trials, AuditPlace::kInBackground, std::current_exception());
  }
}

void BudgetReuse::fill(Stats& stats) const {
  BudgetStats& budget = stats.budget.emplace();
  const auto rules = this->rules();
  for (const auto& exits : exits_) {
    budget.exits_by_layer.push_back(exits);
    budget.early_exits += exits;
  }
  if (ladder_) ladder_->fill(stats);
  budget.calibrating_bytes = calibrating_.bytes();
  budget.audits_failed = failures_.count();
  budget.audit_failure = failures_.last_reason();
  if (audits_) {
    budget.audits_waiting = audits_->waiting();
    budget.audits_dropped = audits_->dropped();
  }
  if (rules == nullptr) return;
  budget.calibrated = true;
  budget.levels = rules->exit.thresholds.size();
  budget.bytes = rules->exit.bytes();
  const Supervision& supervision = rules->supervision;
  const auto gates = supervision.counters();
  budget.audits = gates.audits;
  budget.audit_errors = gates.losses;
  budget.closings = gates.closings;
  budget.reopenings = gates.reopenings;
  budget.level = supervision.levels() == 0 ? 0 : supervision.level();
  stats.entries += static_cast<std::uint64_t>(rules->exit.outputs.size(0));
}

}  // namespace llmcache
