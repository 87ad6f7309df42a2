#include "reuse/budget/risk_controller.h"

#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "caller_failed.h"
#include "execute/engine.h"
#include "execute/plan_check.h"
#include "llmcache/error.h"
#include "refresh/exit_calibration.h"
#include "refresh/profile_check.h"
#include "reuse/budget/calibration_part.h"
#include "reuse/budget/calibrator.h"
#include "reuse/early_exit/exit_sampler.h"
#include "reuse/segment_reuse/segment_strategy.h"
#include "reuse/token_reuse/token_strategy.h"

namespace llmcache {
namespace {

constexpr double kWorthBoth = 0.97;  // of the cost of the cheaper mechanism alone, that both together must stay below

/// Of what the statistics tell.
RiskGate::Counters sum_of(RiskGate::Counters sum, const RiskGate::Counters& more) noexcept {
  sum.audits += more.audits;
  sum.losses += more.losses;
  sum.closings += more.closings;
  sum.reopenings += more.reopenings;
  return sum;
}

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

RiskController::RiskController(const WrappedModel& wrapped, const Options& options, std::size_t capacity_bytes,
                               MemoryAccount* total)
    : wrapped_(wrapped),
      options_(options.budget),
      progress_(options.progress),
      capacity_bytes_(capacity_bytes),
      account_(capacity_bytes, total),
      exits_(wrapped, options_, failures_) {
  make_states();
  if (options_.background_audit && (exits_.unavailable().empty() || states_)) {
    audits_ = std::make_unique<BackgroundJobs>(wrapped.model->device());
  }
}

RiskController::~RiskController() = default;

/// Token states are reused where a model allows it, and its kind of answer fits the metric.
void RiskController::make_states() {
  const bool causal = wrapped_.profile.causal;
  const bool wanted = causal ? options_.segment_reuse : options_.token_reuse;
  if (!wanted) {
    no_states_ = causal ? "BudgetOptions.segment_reuse is off" : "BudgetOptions.token_reuse is off";
    return;
  }
  const auto& leaves = wrapped_.output.leaves;
  if (leaves.empty() || leaves[0].batch != 0 || leaves[0].tokens > 1) {
    no_states_ = "its first output is neither [batch, values] nor [batch, tokens, values]";
    return;
  }
  try {
    std::unique_ptr<TunableStrategy> strategy;
    if (causal) {
      strategy = std::make_unique<SegmentStrategy>(wrapped_, options_.format, capacity_bytes_, &account_);
    } else {
      strategy = std::make_unique<TokenStrategy>(wrapped_, options_.format, capacity_bytes_, &account_);
    }
    states_ = std::make_unique<StateReuse>(std::move(strategy), wrapped_, options_, failures_);
  } catch (const std::exception& error) {
    no_states_ = reason_of(error);
  }
}

bool RiskController::has_profile() const {
  const std::lock_guard lock(mutex_);
  return calibration_.has_value();
}

std::optional<CalibrationProfile> RiskController::profile() const {
  const std::lock_guard lock(mutex_);
  return calibration_;
}

// --- serving -----------------------------------------------------------------------------------------

bool RiskController::takes_output(const Call& call) const {
  return !wrapped_.profile.causal || call.request.output != Output::kNewTokens;
}

/// Whatever output is asked for.
bool RiskController::serves(const Call& call) const {
  return call.packable && (exits_.policy() || (states_ && states_->policy()));
}

bool RiskController::accepts(const Call& call) const { return takes_output(call) && serves(call); }

bool RiskController::refuses_output(const Call& call) const { return !takes_output(call) && serves(call); }

bool RiskController::cuts_output(const Call& /*call*/) const { return wrapped_.profile.causal; }

void RiskController::serve(const Call& call, Answers& answers) {
  const auto exits = exits_.policy();
  const auto states = states_ ? states_->policy() : nullptr;
  if (!exits && !states) return;
  const Batch& batch = answers.open();
  // Each serves the rows that it was certified for. What is nobody's stays open: the next strategies compute it.
  std::vector<std::int64_t> reusing, leaving;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const std::int64_t tokens = batch.spans[static_cast<std::size_t>(row)].tokens;
    const bool reuses = states && states->owns(tokens);
    const bool leaves = !reuses && exits && exits->owns(tokens);
    if (reuses) reusing.push_back(row);
    if (leaves) leaving.push_back(row);
    if (tokens == 0) continue;
    if (states && !reuses) states->supervision.pass_over();
    if (exits && !leaves) exits->supervision.pass_over();
  }
  DeferredWrites& writes = answers.writes();
  const auto run = [&](const std::vector<std::int64_t>& rows, bool reuse) {
    const bool all = static_cast<std::int64_t>(rows.size()) == batch.rows;
    const Batch part = all ? batch : batch.select(rows);
    return reuse ? states_->run(states, part, call.request, writes, audits_.get())
                 : exits_.run(exits, part, writes, audits_.get());
  };
  std::vector<std::pair<std::vector<std::int64_t>, PassResult>> done;
  if (!reusing.empty()) done.emplace_back(reusing, run(reusing, true));
  if (!leaving.empty()) done.emplace_back(leaving, run(leaving, false));
  const auto open = answers.open_rows();
  for (auto& [rows, pass] : done) {
    for (std::int64_t& row : rows) row = open[static_cast<std::size_t>(row)];
    answers.put(std::move(rows), std::move(pass));
  }
}

void RiskController::clear() {
  if (states_) states_->clear();
}

void RiskController::each_bank(const BankVisitor& visit) {
  if (states_) states_->each_bank(visit);
}

void RiskController::weights_changed() {
  const std::lock_guard one_at_a_time(use_mutex_);
  {
    const std::lock_guard lock(mutex_);
    calibration_.reset();
    supervise({});
  }
  exits_.install(nullptr);
  account_.release(std::exchange(exit_bytes_, 0));
  if (states_) states_->install(nullptr);
}

// --- calibrating ------------------------------------------------------------------------------------

void RiskController::check_available() const {
  if (options_.budget.metric == BudgetMetric::kTokenAgreement && !wrapped_.profile.causal) {
    throw Error(ErrorCode::kInvalidOptions,
                "BudgetOptions.budget.metric is 'token', which is for causal language models, and this model is not "
                "causal; choose 'decision' or 'relative'");
  }
  if (exits_.unavailable().empty() || states_) return;
  throw Error(ErrorCode::kNotAvailable,
              fmt::format("fidelity 'budget' has nothing to reuse for this model: no early exit, because {}; no token "
                          "states, because {}",
                          exits_.unavailable(), no_states_));
}

CalibrationSample RiskController::run_sample(const std::function<std::optional<Inputs>()>& sample,
                                             std::size_t total) const {
  check_available();
  auto requests = std::make_shared<std::vector<Batch>>();
  std::optional<ExitSampler> exits;
  if (exits_.unavailable().empty()) exits.emplace(*wrapped_.model);
  ByteGauge::Share held(calibrating_);
  CalibrationSample done;
  done.model_digest = wrapped_.profile.digest;
  const auto add = [&](const Inputs& given) {
    Batch batch = check_sample(given);
    for (const RowSpan& span : batch.spans) done.sequences += span.tokens > 0 ? 1 : 0;
    if (exits && batch.tokens > 0) exits->add(batch);
    if (requests->size() < Calibrator::kMostRequests) {
      for (std::size_t i = 0; i < batch.inputs.size(); ++i) {  // the caller may use his again
        if (!batch.inputs[i].isTensor()) continue;
        batch.inputs[i] = batch.inputs[i].toTensor().clone();
        batch.on_host[i] = batch.on_host[i].clone();
      }
      done.bytes += batch.input_bytes();
      requests->push_back(std::move(batch));
    }
    held.set(done.bytes + (exits ? exits->bytes() : 0));
  };
  std::int64_t batches = 0;
  while (const auto given = sample()) {  // what it throws is the caller's own
    only_errors([&] { add(*given); });
    tell(progress_, "calibration: running the sample", ++batches, static_cast<std::int64_t>(total));
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
Batch RiskController::check_sample(const Inputs& given) const {
  try {
    Batch batch = check_batch(given, wrapped_);
    check_packable(batch, *wrapped_.model, wrapped_.profile);
    return batch;
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::throw_with_nested(
        Error(ErrorCode::kInvalidInput, "a batch of the sample cannot be read: " + reason_of(error)));
  }
}

CalibrationProfile RiskController::calibrate(const CalibrationSample& sample) {
  check_available();
  if (sample.model_digest != wrapped_.profile.digest || sample.requests == nullptr) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("the sample was run by a model of digest '{}', this one has '{}'", sample.model_digest,
                            wrapped_.profile.digest));
  }
  const std::lock_guard one_at_a_time(calibrate_mutex_);
  return only_errors([&] {
    wrapped_.model->check_unchanged();
    auto profile = fit(sample);
    wrapped_.model->check_unchanged();  // while it ran
    tell(progress_, "done");
    use(profile);
    return profile;
  });
}

/// Fits and certifies on what is its own: reads nothing that calls change, and changes nothing that they read.
CalibrationProfile RiskController::fit(const CalibrationSample& sample) const {
  ByteGauge::Share held(calibrating_);
  held.set(sample.bytes);
  CalibrationProfile profile;
  profile.budget = options_.budget;
  profile.early_exit = exits_.unavailable().empty() ? options_.early_exit : EarlyExit::kOff;
  profile.model_digest = wrapped_.profile.digest;
  const bool exits = exits_.unavailable().empty() && sample.exit;
  if (!exits) profile.reason = "no early exit: " + exits_.unavailable();
  if (!states_) {
    if (exits) fit_exits(sample, profile);
    if (profile.exit == nullptr) profile.reason += "; no reuse of token states: " + no_states_;
    return profile;
  }
  Calibrator states(states_->strategy().fresh(), wrapped_, options_, capacity_bytes_, calibrating_, progress_);
  if (exits) {
    fit_both(sample, states, profile);
    return profile;
  }
  const auto choice = states.explore(*sample.requests) ? states.certify(options_.budget, 0) : std::nullopt;
  if (choice) take_states(*choice, profile);
  if (!choice) profile.reason += "; no reuse of token states: " + states.reason();
  return profile;
}

/// Early exits alone.
void RiskController::fit_exits(const CalibrationSample& sample, CalibrationProfile& profile) const {
  tell(progress_, "calibration: fitting early exits");
  calibrate_exit(*sample.exit, options_, capacity_bytes_, profile);
  if (profile.exit == nullptr) profile.reason = "no early exit: " + profile.reason;
}

/// Chooses, by what certifies nothing, which of the two are worth a test and which sequences are whose; then tests.
void RiskController::fit_both(const CalibrationSample& sample, Calibrator& states, CalibrationProfile& profile) const {
  const bool any_states = states.explore(*sample.requests);
  tell(progress_, "calibration: fitting early exits");
  std::unique_ptr<ExitCalibration> exits;
  try {
    exits = std::make_unique<ExitCalibration>(*sample.exit, options_, capacity_bytes_);
  } catch (const Error& error) {
    // Token states take fewer sequences; if there are too few of them, that has thrown.
    if (error.code() != ErrorCode::kInvalidInput) throw;
    profile.reason = error.what();
  }
  Budget budget = options_.budget;
  constexpr double kNever = 2;  // of a mechanism that is worth no test
  const auto exit_cost = [&](double epsilon, std::int64_t longest) {
    return exits ? exits->expected_cost(epsilon, longest).value_or(kNever) : kNever;
  };
  const auto state_cost = [&](double epsilon, std::int64_t least_tokens) {
    return any_states ? states.expected_cost(epsilon, least_tokens).value_or(kNever) : kNever;
  };
  const double cheaper = std::min(exit_cost(budget.epsilon, ExitCalibration::kAll), state_cost(budget.epsilon, 0));
  const double dearer = std::max(exit_cost(budget.epsilon, ExitCalibration::kAll), state_cost(budget.epsilon, 0));
  std::int64_t border = 0;  // sequences of this many tokens or more reuse states; 0: one mechanism serves all
  if (dearer < kNever) {
    budget.delta /= 2;  // each is tested
    double least = kWorthBoth * cheaper;
    for (std::int64_t tokens = states_->strategy().least_tokens(); tokens <= states.longest(); tokens *= 2) {
      const double leaving = exit_cost(budget.epsilon / 2, tokens);
      const double reusing = state_cost(budget.epsilon / 2, tokens);
      const double share = states.token_share(tokens);
      const double cost = share * reusing + (1 - share) * leaving;
      if (std::max(leaving, reusing) >= kNever || cost >= least) continue;
      least = cost;
      border = tokens;
    }
  }
  if (border > 0) budget.epsilon /= 2;
  if (exits) exits->certify(budget, profile, border);
  if (profile.exit != nullptr) profile.exit_below = border;
  if (profile.exit == nullptr) profile.reason = "no early exit: " + profile.reason;
  auto choice = any_states ? states.certify(budget, border) : std::nullopt;
  if (!choice) {
    if (profile.exit == nullptr) profile.reason += "; no reuse of token states: " + states.reason();
    return;
  }
  if (border > 0 && profile.exit != nullptr) {
    choice->epsilon = budget.epsilon;
    profile.certified_error += choice->error;
    profile.error_bound += choice->bound;
    profile.certified = std::min(profile.certified, choice->certified);
    profile.reuse = std::move(choice);
    return;
  }
  // One of the two is used: the one that computes less.
  double layers_run = 1;
  for (std::size_t l = 0; l < profile.expected_exits.size(); ++l) {
    const auto layers = static_cast<double>(profile.expected_exits.size());
    layers_run -= profile.expected_exits[l] * (1 - static_cast<double>(l) / layers);
  }
  if (profile.exit == nullptr || choice->computed < layers_run) take_states(*choice, profile);
}

/// Makes reuse of states the only mechanism of a profile.
void RiskController::take_states(const ReuseChoice& choice, CalibrationProfile& profile) {
  profile.reason.clear();
  profile.reuse = choice;
  profile.exit = nullptr;
  profile.early_exit = EarlyExit::kOff;
  profile.exit_below = 0;
  profile.expected_exits.clear();
  profile.bytes = 0;
  profile.fitted = choice.fitted;
  profile.certified = choice.certified;
  profile.certified_error = choice.error;
  profile.error_bound = choice.bound;
  profile.typical_distance = choice.typical_distance;
  profile.expected_share = 1 - choice.computed;
}

// --- a profile comes into force ------------------------------------------------------------------------

/// Throws Error(kInvalidOptions) that says why a profile is not for this cache.
void RiskController::check_fits(const CalibrationProfile& profile) const {
  const auto refuse = [](const std::string& why) {
    throw Error(ErrorCode::kInvalidOptions, "the calibration profile does not fit this cache: " + why);
  };
  check_numbers(profile);
  if (profile.exit && !exits_.unavailable().empty()) {
    refuse("it has early exits, and there are none, because " + exits_.unavailable());
  }
  if (profile.reuse && !states_) refuse("it reuses token states, and that cannot be done, because " + no_states_);
  if (profile.model_digest != wrapped_.profile.digest) {
    refuse(fmt::format("it was made with a model of digest {}, this one has {}", profile.model_digest,
                       wrapped_.profile.digest));
  }
  const Budget& asked = options_.budget;
  const Budget& has = profile.budget;
  if (has.metric != asked.metric || has.epsilon > asked.epsilon || has.delta > asked.delta) {
    refuse(fmt::format("it promises {} error {} with confidence {}, BudgetOptions.budget asks for {} error {} with {}",
                       to_string(has.metric), has.epsilon, 1 - has.delta, to_string(asked.metric), asked.epsilon,
                       1 - asked.delta));
  }
  exits_.check_fits(profile, capacity_bytes_);
}

void RiskController::use(CalibrationProfile profile) {
  only_errors([&] {
    check_fits(profile);
    auto exits = exits_.make_policy(profile);
    auto states = states_ && profile.reuses_states() ? states_->make_policy(*profile.reuse) : nullptr;
    const std::lock_guard one_at_a_time(use_mutex_);
    const std::size_t bytes = exits ? exits->exit.bytes() : 0;
    if (bytes > exit_bytes_) reserve_exits(bytes);
    std::vector<std::shared_ptr<const SupervisedPolicy>> supervised;
    if (exits) supervised.push_back(exits);
    if (states) supervised.push_back(states);
    if (states_) states_->install(std::move(states));
    const std::lock_guard lock(mutex_);
    supervise(std::move(supervised));
    calibration_ = std::move(profile);
    exits_.install(std::move(exits));
    account_.release(std::exchange(exit_bytes_, bytes) - bytes);
  });
}

/// What was counted of others goes on to count. Needs mutex_.
void RiskController::supervise(std::vector<std::shared_ptr<const SupervisedPolicy>> policies) noexcept {
  for (const auto& policy : supervised_) retired_ = sum_of(retired_, policy->supervision.counters());
  supervised_ = std::move(policies);
}

/// Token states make room, as soon as no running request reads them any more.
void RiskController::reserve_exits(std::size_t bytes) {
  constexpr int kMostTurns = 2000;  // of a millisecond
  for (int round = 0; !account_.try_reserve(bytes - exit_bytes_); ++round) {
    if (round == kMostTurns) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("running requests hold token states that leave no room for the {} bytes of the "
                              "calibration's banks; use the calibration again when they have returned",
                              bytes));
    }
    if (round > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (states_) states_->clear();
  }
  exit_bytes_ = bytes;
}

void RiskController::add_parts(std::vector<std::unique_ptr<SnapshotPart>>& parts) {
  auto calibration = std::make_unique<CalibrationPart>(*this);
  const CalibrationPart& in_front = *calibration;
  parts.push_back(std::move(calibration));
  auto states = states_ ? states_->snapshot_part() : nullptr;
  if (states) parts.push_back(std::make_unique<CalibratedPart>(std::move(states), in_front));
}

// --- telling ------------------------------------------------------------------------------------------

void RiskController::add_to(Stats& stats) const {
  BudgetStats& budget = stats.budget.emplace();
  exits_.add_to(stats);
  if (states_) states_->add_to(stats);
  budget.calibrating_bytes = calibrating_.bytes();
  budget.audits_failed = failures_.count();
  budget.audit_failure = failures_.last_reason();
  if (audits_) {
    budget.audits_waiting = audits_->waiting();
    budget.audits_dropped = audits_->dropped();
  }
  add_supervision(budget);
}

/// Counters of all that was ever in force. With both mechanisms, the threshold is that of early exit, and that of
/// states follows it.
void RiskController::add_supervision(BudgetStats& stats) const {
  RiskGate::Counters sum;
  {
    const std::lock_guard lock(mutex_);
    sum = retired_;
    for (const auto& policy : supervised_) {
      const Supervision& own = policy->supervision;
      sum = sum_of(sum, own.counters());
      if (own.thresholds() > 0) stats.threshold_index += own.threshold_index();
    }
    stats.calibrated = !supervised_.empty();
  }
  if (const auto exits = exits_.policy()) stats.thresholds += exits->exit.thresholds.size();
  if (states_ && states_->policy()) stats.thresholds += 1;
  stats.audits = sum.audits;
  stats.audit_errors = sum.losses;
  stats.closings = sum.closings;
  stats.reopenings = sum.reopenings;
}

}  // namespace llmcache
