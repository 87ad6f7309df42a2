#include "budget_reuse.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <unordered_set>
#include <utility>

#include "background_audits.h"
#include "execute/engine.h"
#include "execute/observer.h"
#include "exit_rules.h"
#include "llmcache/error.h"
#include "refresh/exit_calibration.h"
#include "segment_ladder.h"
#include "token_ladder.h"

namespace llmcache {
namespace {

/// Mean over the tokens of each `[1, tokens, hidden]`, float32 `[n, hidden]`.
at::Tensor means_of(const std::vector<at::Tensor>& states) {
  std::vector<at::Tensor> means;
  for (const at::Tensor& state : states) means.push_back(state.mean(1, false, at::kFloat));
  return at::cat(means);
}

/// All that decides a sequence's output.
std::string key_of(const Batch& batch, std::int64_t row) {
  const RowSpan& span = batch.spans[static_cast<std::size_t>(row)];
  std::string key;
  for (const c10::IValue& input : batch.inputs) {
    key.push_back(input.isTensor() ? '+' : '-');
    if (!input.isTensor()) continue;
    const auto own =
        input.toTensor().select(0, row).narrow(0, span.first, span.tokens).to(at::kCPU, at::kLong).contiguous();
    key.append(static_cast<const char*>(own.const_data_ptr()), own.nbytes());
  }
  return key;
}

}  // namespace

/// Collects the mean states of sequences that run in full.
class BudgetReuse::Recorder final : public LayerObserver {
 public:
  explicit Recorder(std::int64_t layers) : means_(static_cast<std::size_t>(layers)) {}

  bool watches(std::int32_t l) const override { return static_cast<std::size_t>(l) < means_.size(); }
  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override {
    means_[static_cast<std::size_t>(l)] = means_of(states);
    return {};
  }
  const at::Tensor& means(std::size_t layer) const { return means_[layer]; }

 private:
  std::vector<at::Tensor> means_;
};

/// Lets sequences leave.
class BudgetReuse::Pass final : public LayerObserver {
 public:
  struct Sequence {
    std::int32_t left = -1;  ///< in front of this layer
    at::Tensor answer;       ///< [values]; of a sequence that left
    double expected = 0;     ///< its error, by the gate
    bool stays = false;      ///< it is computed in full whatever could be reused
    std::size_t tried = 0;   ///< levels that have proposed something, from the most liberal one on
    std::vector<Trial> trials;
  };

  Pass(ExitRules& rules, std::size_t sequences, bool background)
      : rules_(rules), background_(background), level_(rules.level()), sequences_(sequences) {}

  bool watches(std::int32_t l) const override {
    const auto layer = static_cast<std::size_t>(l);
    return layer < rules_.exit.layers.size() && rules_.exit.layers[layer].used();
  }

  std::vector<std::size_t> at_layer(std::int32_t l, const std::vector<at::Tensor>& states) override {
    std::vector<std::size_t> running;
    std::vector<at::Tensor> own;
    for (std::size_t i = 0; i < states.size(); ++i) {
      if (!states[i].defined() || sequences_[i].stays) continue;
      running.push_back(i);
      own.push_back(states[i]);
    }
    std::vector<std::size_t> leaving;
    if (running.empty()) return leaving;
    const auto proposal = rules_.exit.propose(static_cast<std::size_t>(l), means_of(own), rules_.scores);
    for (std::size_t j = 0; j < running.size(); ++j) {
      Sequence& sequence = sequences_[running[j]];
      const auto answer = proposal.answers[static_cast<std::int64_t>(j)];
      if (!leaves(sequence, static_cast<std::size_t>(l), proposal.expected[j], answer)) continue;
      sequence.left = l;
      sequence.answer = answer;
      sequence.expected = proposal.expected[j];
      leaving.push_back(running[j]);
    }
    return leaving;
  }

  /// Tells the gates of the sequences that they had no proposal for. Once, behind the pass.
  void close() {
    for (const Sequence& sequence : sequences_) {
      for (std::size_t k = sequence.tried; k < watched(); ++k) rules_.gates[k]->next(false);
    }
  }

  std::vector<Sequence>& sequences() { return sequences_; }

 private:
  /// Levels whose gates are told: the one that serves, and the closed ones before it.
  std::size_t watched() const { return std::min(level_ + 1, rules_.gates.size()); }

  bool leaves(Sequence& sequence, std::size_t l, double expected, const at::Tensor& answer) {
    const auto& thresholds = rules_.exit.thresholds;
    if (rules_.gates.empty()) return expected <= thresholds[0][l];
    // A safer level proposes nothing before a more liberal one has.
    while (sequence.tried < watched() && expected <= thresholds[sequence.tried][l]) {
      const std::size_t level = sequence.tried++;
      const auto decision = rules_.gates[level]->next(true);
      if (decision.audit) sequence.trials.push_back({level, decision, answer});
      if (level < level_) {
        sequence.stays = sequence.stays || (decision.audit && !background_);
        continue;
      }
      if (decision.reuse && !sequence.stays && (!decision.audit || background_)) return true;
      sequence.stays = true;
    }
    return false;
  }

  ExitRules& rules_;
  const bool background_;
  const std::size_t level_;
  std::vector<Sequence> sequences_;
};

BudgetReuse::BudgetReuse(const Model& model, const InputSpec& inputs, const OutputSpec& output,
                         const ModelProfile& profile, const Options& options, std::size_t capacity_bytes,
                         MemoryAccount* total)
    : model_(model),
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
  make_ladder(inputs, options_);
  if (options_.background_audit && (no_exits_.empty() || ladder_)) audits_ = std::make_unique<BackgroundAudits>();
}

/// Token states are reused where a model allows it, and its kind of answer fits the metric.
void BudgetReuse::make_ladder(const InputSpec& inputs, const BudgetOptions& options) {
  const bool wanted = profile_.causal ? options.segment_reuse : options.token_reuse;
  if (!wanted) {
    no_ladder_ = profile_.causal ? "BudgetOptions.segment_reuse is off" : "BudgetOptions.token_reuse is off";
    return;
  }
  if (output_.leaves.empty() || output_.leaves[0].batch != 0 || output_.leaves[0].tokens > 1) {
    no_ladder_ = "its first output is neither [batch, values] nor [batch, tokens, values]";
    return;
  }
  try {
    std::unique_ptr<ReuseLadder> ladder;
    if (profile_.causal) {
      ladder = std::make_unique<SegmentLadder>(model_, inputs, output_, profile_, options.format, capacity_bytes_,
                                               &account_);
    } else {
      ladder =
          std::make_unique<TokenLadder>(model_, inputs, output_, profile_, options.format, capacity_bytes_, &account_);
    }
    ladder_ = std::make_unique<LadderReuse>(std::move(ladder), model_, output_, profile_, options);
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

CalibrationSample BudgetReuse::run_sample(const std::function<std::optional<Batch>()>& sample) const {
  check_available();
  auto requests = std::make_shared<std::vector<Batch>>();
  std::int64_t tokens = 0;
  CalibrationSample done{profile_.digest, 0, {}, {}};
  while (auto batch = sample()) {
    tokens += batch->tokens;
    for (c10::IValue& input : batch->inputs) {
      if (input.isTensor()) input = input.toTensor().clone();  // the caller may use his again
    }
    for (const RowSpan& span : batch->spans) done.sequences += span.tokens > 0 ? 1 : 0;
    requests->push_back(std::move(*batch));
  }
  if (tokens == 0) throw Error(ErrorCode::kInvalidInput, "calibration got no sequence with a real token");
  if (no_exits_.empty()) {
    done.exit = run_exit_sample(*requests);
    done.sequences = done.exit->outputs.size(0);
  }
  done.requests = std::move(requests);
  return done;
}

std::shared_ptr<const ExitSample> BudgetReuse::run_exit_sample(const std::vector<Batch>& requests) const {
  const auto layers = static_cast<std::int32_t>(model_.layers());
  std::unordered_set<std::string> known;
  std::vector<std::vector<at::Tensor>> states(static_cast<std::size_t>(layers));
  std::vector<at::Tensor> outputs;
  // Requests as they come, and some of their sequences alone.
  constexpr std::int64_t kAlone = 24;
  std::vector<double> together_ms(static_cast<std::size_t>(layers));
  std::vector<double> alone_ms(static_cast<std::size_t>(layers));
  std::int64_t ran = 0;
  std::int64_t alone = 0;
  const auto pass = [&](const Batch& part, Recorder* recorder, std::vector<double>& layer_ms) {
    ForwardReport report;
    auto result = execute_packed(model_, part.inputs, part.full_plan(layers), {}, nullptr, report, recorder);
    for (std::size_t l = 0; l < layer_ms.size(); ++l) layer_ms[l] += report.layer_ms[l];
    return result;
  };
  for (const Batch& batch : requests) {
    // Identical requests are answered without any error: they are no evidence.
    std::vector<std::int64_t> rows;
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      if (batch.spans[static_cast<std::size_t>(row)].tokens > 0 && known.insert(key_of(batch, row)).second) {
        rows.push_back(row);
      }
    }
    if (rows.empty()) continue;
    const Batch part = batch.select(rows);
    Recorder recorder(layers);
    const auto result = pass(part, &recorder, together_ms);
    ran += part.rows;
    if (alone < kAlone) {
      pass(batch.select({rows[static_cast<std::size_t>(alone) % rows.size()]}), nullptr, alone_ms);
      ++alone;
    }
    const auto pooled = result.toTensor().to(at::kFloat);
    if (pooled.dim() != 2) {
      throw Error(ErrorCode::kNotAvailable,
                  fmt::format("the model's output has {} dimensions; [batch, values] is expected", pooled.dim()));
    }
    auto finite = pooled.isfinite().all(1);
    for (std::size_t l = 0; l < states.size(); ++l) finite = finite.logical_and(recorder.means(l).isfinite().all(1));
    const auto usable = finite.nonzero().squeeze(1);
    outputs.push_back(pooled.index_select(0, usable));
    for (std::size_t l = 0; l < states.size(); ++l) states[l].push_back(recorder.means(l).index_select(0, usable));
  }
  auto all = std::make_shared<ExitSample>();
  all->outputs = at::cat(outputs);
  const auto passes = static_cast<double>(outputs.size());
  all->batch_rows = static_cast<double>(ran) / passes;
  for (std::size_t l = 0; l < states.size(); ++l) {
    all->layer_times.push_back(
        PartTime::from(alone_ms[l] / static_cast<double>(alone), together_ms[l] / passes, all->batch_rows));
  }
  for (auto& layer : states) {
    all->states.push_back(at::cat(layer));
    layer.clear();
  }
  return all;
}

CalibrationProfile BudgetReuse::calibrate(const CalibrationSample& sample) {
  check_available();
  if (sample.model_digest != profile_.digest || sample.requests == nullptr) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("the sample was run by a model of digest '{}', this one has '{}'", sample.model_digest,
                            profile_.digest));
  }
  CalibrationProfile profile;
  profile.budget = options_.budget;
  profile.early_exit = no_exits_.empty() ? options_.early_exit : EarlyExit::kOff;
  profile.model_digest = profile_.digest;
  if (no_exits_.empty() && sample.exit) calibrate_exit(*sample.exit, options_, capacity_bytes_, profile);
  if (ladder_) {
    // One of the two is used, so that one budget is spent: the one that computes less.
    double layers_run = 1;
    for (std::size_t l = 0; l < profile.expected_exits.size(); ++l) {
      const auto layers = static_cast<double>(profile.expected_exits.size());
      layers_run -= profile.expected_exits[l] * (1 - static_cast<double>(l) / layers);
    }
    const auto choice = ladder_->calibrate(*sample.requests);
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
  }
  use(profile);
  return profile;
}

void BudgetReuse::use(CalibrationProfile profile) {
  const auto refuse = [](const std::string& why) {
    throw Error(ErrorCode::kInvalidOptions, "the calibration profile does not fit this cache: " + why);
  };
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
  if (profile.exit && profile.early_exit != options_.early_exit) {
    refuse(fmt::format("its early exit is {}, BudgetOptions.early_exit is {}", to_string(profile.early_exit),
                       to_string(options_.early_exit)));
  }
  std::shared_ptr<ExitRules> rules;
  if (profile.exit) {
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
    rules = std::make_shared<ExitRules>();
    rules->exit = exit.to(model_.device());
    rules->scores = options_.scores;
    const ExitModel& own = rules->exit;
    const bool decides = own.metric == BudgetMetric::kDecision && own.outputs.size(0) > 0;
    if (decides && !at::equal(decisions_of(own.outputs, rules->scores), own.decisions)) {
      refuse("BudgetOptions.scores decides otherwise than when it was made");
    }
    if (options_.audit_rate > 0) {
      RiskGate::Settings settings;
      settings.epsilon = asked.epsilon;
      settings.audit_rate = options_.audit_rate;
      settings.closed_audit_rate = std::max(options_.audit_rate, 0.25);
      for (std::size_t level = 0; level < own.thresholds.size(); ++level) {
        settings.seed = options_.seed + level;
        rules->gates.push_back(std::make_unique<RiskGate>(settings));
      }
    }
  }
  const std::lock_guard one_at_a_time(use_mutex_);
  const std::size_t bytes = rules ? rules->exit.bytes() : 0;
  if (bytes > exit_bytes_) reserve_exits(bytes);
  if (ladder_) ladder_->use(profile.reuse);
  if (ladder_ && !profile.reuse) ladder_->clear();
  const std::lock_guard lock(mutex_);
  calibration_ = std::move(profile);
  rules_ = std::move(rules);
  account_.release(std::exchange(exit_bytes_, bytes) - bytes);
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

void BudgetReuse::clear() {
  if (ladder_) ladder_->clear();
}

std::optional<BudgetReuse::Answer> BudgetReuse::run_exits(const Batch& batch, ForwardReport& report, KeptLater& kept) {
  const auto rules = this->rules();
  if (rules == nullptr) return std::nullopt;
  const Plan plan = batch.full_plan(static_cast<std::int32_t>(model_.layers()));
  Pass pass(*rules, plan.sequences.size(), audits_ != nullptr);
  Answer answer;
  answer.computed = execute_packed(model_, batch.inputs, plan, {}, nullptr, report, &pass);
  answer.rows.resize(static_cast<std::size_t>(batch.rows));
  pass.close();
  for (std::size_t i = 0; i < plan.sequences.size(); ++i) {
    Pass::Sequence& sequence = pass.sequences()[i];
    const std::int64_t row = plan.sequences[i].row;
    SequenceReport& told = report.sequences[static_cast<std::size_t>(row)];
    if (sequence.left >= 0) {
      kept.add([this, left = sequence.left] { ++exits_[static_cast<std::size_t>(left)]; });
      answer.rows[static_cast<std::size_t>(row)] = {sequence.answer.to(profile_.dtype).unsqueeze(0)};
      told.source = Source::kEarlyExit;
      told.resumed_layer = sequence.left;
      told.expected_error = sequence.expected;
      if (!sequence.trials.empty()) {
        audits_->add([this, rules, one = batch.select({row}),
                      trials = std::move(sequence.trials)] { audit(*rules, one, trials); },
                     0);
      }
    } else if (!sequence.trials.empty()) {
      const auto& span = batch.spans[static_cast<std::size_t>(row)];
      const auto full = row_of(answer.computed, output_, row, span.first, span.tokens, batch.width)[0];
      told.shadowed = true;
      told.drift = record(*rules, sequence.trials, full.reshape({-1}));
    }
  }
  return answer;
}

void BudgetReuse::audit(ExitRules& rules, const Batch& sequence, const std::vector<Trial>& trials) const {
  model_.check_unchanged();
  ForwardReport report;
  const auto plan = sequence.full_plan(static_cast<std::int32_t>(model_.layers()));
  const auto result = execute_packed(model_, sequence.inputs, plan, {}, nullptr, report);
  const RowSpan& span = sequence.spans[0];
  record(rules, trials, row_of(result, output_, 0, span.first, span.tokens, sequence.width)[0].reshape({-1}));
}

void BudgetReuse::fill(Stats& stats) const {
  BudgetStats& budget = stats.budget.emplace();
  const auto rules = this->rules();
  for (const auto& exits : exits_) {
    budget.exits_by_layer.push_back(exits);
    budget.early_exits += exits;
  }
  if (ladder_) ladder_->fill(stats);
  if (audits_) {
    budget.audits_waiting = audits_->waiting();
    budget.audits_dropped = audits_->dropped();
  }
  if (rules == nullptr) return;
  budget.calibrated = true;
  budget.levels = rules->exit.thresholds.size();
  budget.bytes = rules->exit.bytes();
  for (const auto& gate : rules->gates) {
    const auto counters = gate->counters();
    budget.audits += counters.audits;
    budget.audit_errors += counters.losses;
    budget.closings += counters.closings;
    budget.reopenings += counters.reopenings;
  }
  budget.level = rules->gates.empty() ? 0 : rules->level();
  stats.entries += static_cast<std::uint64_t>(rules->exit.outputs.size(0));
}

}  // namespace llmcache
