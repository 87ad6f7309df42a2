#include "systems.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "machine.h"
#include "scores.h"
#include "semantic_cache.h"

namespace llmcache::bench {
namespace {

/// Runs `what` and notes the time.
template <class What>
c10::IValue timed(double& ms, const What& what) {
  const auto start = Clock::now();
  c10::IValue result = what();
  ms = ms_since(start);
  return result;
}

std::size_t bytes(const RunConfig& config) { return static_cast<std::size_t>(*config.capacity_mib) << 20; }

/// What similarity is measured on, as records tell it.
void describe_similarity(const RunConfig& config, const SystemContext& context, Record& record) {
  record.threshold = config.threshold;
  record.fingerprint = to_string(context.fingerprint.kind);
  if (context.fingerprint.kind != FingerprintKind::kJaccard) {
    const bool pca = context.fingerprint.kind == FingerprintKind::kPca;
    record.fingerprint_layer = context.settings.fingerprint_layer;
    record.centring = to_string(pca ? Centring::kFitted : context.fingerprint.centring);
  }
  record.eviction = config.eviction;
}

class PlainSystem final : public System {
 public:
  explicit PlainSystem(const SystemContext& context) : model_(context.model) {}

  Answer run(const Call& call) override {
    Answer answer;
    c10::IValue output = timed(answer.ms, [&] { return model_.plain(call.inputs); });
    answer.returned = all_of(std::move(output), call.rows);
    answer.tokens_computed = static_cast<double>(padded_length(call.rows)) * static_cast<double>(call.rows.size());
    answer.served_from.assign(call.rows.size(), ServedCounts::kNotServed);
    return answer;
  }

 private:
  LoadedModel& model_;
};

/// Tokens that went through the layers. A report counts real ones; a batch that ran dense computed its padding too.
double tokens_computed(const ForwardReport& report, const Rows& rows) {
  if (report.execution == Execution::kNone) return 0;
  if (report.execution == Execution::kPacked) return report.computed_fraction() * static_cast<double>(tokens_of(rows));
  const auto known = std::ranges::count(report.sequences, Source::kIdentical, &SequenceReport::source);
  return static_cast<double>((std::ssize(report.sequences) - known) * padded_length(rows));
}

/// Runs a call through a cache. Nothing counts as served.
Answer forward(Cache& cache, const Call& call, RequestOptions options, ForwardReport& report) {
  options.output = call.output;
  Answer answer;
  answer.returned.output = timed(answer.ms, [&] { return cache.forward(call.inputs, options); });
  report = cache.last_report();
  // The first answer of each size, and few later ones, are compared with the plain model's.
  answer.ms -= report.verify_ms;
  answer.verify_ms = report.verify_ms;
  for (std::size_t row = 0; row < report.sequences.size(); ++row) {
    const std::int64_t tokens = std::ssize(call.rows[row]);
    const std::int64_t known = report.sequences[row].reused_tokens;
    const std::int64_t first = call.output == Output::kAll ? 0 : call.output == Output::kLastToken ? tokens - 1 : known;
    answer.returned.tokens.push_back({first, tokens});
    answer.tokens_reused += known;
    answer.tokens_shared += report.sequences[row].shared_tokens;
  }
  answer.tokens_computed = tokens_computed(report, call.rows);
  answer.served_from.assign(call.rows.size(), ServedCounts::kNotServed);
  return answer;
}

class LayerCacheSystem final : public System {
 public:
  LayerCacheSystem(RunConfig config, const SystemContext& context, std::shared_ptr<Cache> cache)
      : config_(std::move(config)), context_(context), cache_(std::move(cache)) {
    cache_->clear();
    start();
  }

  Answer run(const Call& call) override {
    ForwardReport report;
    Answer answer = forward(*cache_, call, options_, report);
    remember(report, call);
    std::int64_t asking = call.first_sequence;
    std::ranges::transform(report.sequences, answer.served_from.begin(),
                           [&](const SequenceReport& one) { return served_from(one, asking++); });
    return answer;
  }

  void fill(const Call& call, FillValues&) override {
    RequestOptions keep_all = options_;
    keep_all.look_up = false;
    cache_->forward(call.inputs, keep_all);
    remember(cache_->last_report(), call);
  }

  [[nodiscard]] bool identical_only() const override { return !similar(); }
  void clear() override { cache_->clear(); }
  void start() override { before_ = cache_->stats(); }

  void describe(Record& record) const override {
    const Stats after = cache_->stats();
    const auto sequences = static_cast<double>(after.sequences - before_.sequences);
    record.fidelity = config_.fidelity;
    record.weights_held = cache_->profile().weights;
    record.capacity_bytes = static_cast<std::int64_t>(bytes(config_));
    record.cache_bytes = static_cast<std::int64_t>(after.bytes);
    if (after.budget) describe_budget(*after.budget, sequences, record);
    if (!similar()) return;
    describe_similarity(config_, context_, record);
    record.cache_layers = context_.settings.cache_layers;
    record.ttl_seconds = context_.settings.ttl_seconds;
    record.audit_rate = context_.settings.audit_rate;
    record.hit_rate_by_layer.assign(static_cast<std::size_t>(cache_->profile().layers), 0);
    for (std::size_t i = 0; i < after.layers.size(); ++i) {
      const std::uint64_t earlier = i < before_.layers.size() ? before_.layers[i].hits : 0;
      record.hit_rate_by_layer.at(static_cast<std::size_t>(after.layers[i].layer)) =
          static_cast<double>(after.layers[i].hits - earlier) / sequences;
    }
  }

 private:
  [[nodiscard]] bool similar() const { return config_.fidelity == "threshold"; }

  void describe_budget(const BudgetStats& after, double sequences, Record& record) const {
    const BudgetStats& before = *before_.budget;
    const CalibrationProfile profile = *cache_->calibration();
    const auto share = [&](std::uint64_t now, std::uint64_t then) {
      return static_cast<double>(now - then) / sequences;
    };
    const double exits = share(after.early_exits, before.early_exits);
    const bool cache_free = config_.early_exit == "cache-free";
    const ReuseShares reused = {.early_exit = cache_free ? 0 : exits,
                                .cache_free_exit = cache_free ? exits : 0,
                                .token_reuse = share(after.token_reuses, before.token_reuses),
                                .segment_reuse = share(after.segment_reuses, before.segment_reuses)};
    record.hit_rate += exits + reused.token_reuse + reused.segment_reuse;
    record.budget = {.metric = to_string(profile.budget.metric),
                     .epsilon = profile.budget.epsilon,
                     .delta = profile.budget.delta,
                     .cache_free = cache_free,
                     .promised = profile.error_bound,
                     .calibration_requests = context_.calibration->requests(config_).count(),
                     .calibration_part = config_.calibration_part,
                     .share_reused = reused,
                     .audits = static_cast<std::int64_t>(after.audits - before.audits),
                     .closings = static_cast<std::int64_t>(after.closings - before.closings),
                     .reopenings = static_cast<std::int64_t>(after.reopenings - before.reopenings)};
    std::ranges::transform(after.exits_by_layer, before.exits_by_layer,
                           std::back_inserter(record.budget->exits_by_layer), share);
  }

  /// Which sequence of the file a number of the cache is.
  void remember(const ForwardReport& report, const Call& call) {
    if (!similar()) return;
    std::int64_t sequence = call.first_sequence;
    for (const SequenceReport& one : report.sequences) origins_[static_cast<std::int64_t>(one.number)] = sequence++;
  }

  [[nodiscard]] std::int64_t served_from(const SequenceReport& report, std::int64_t asking) const {
    if (report.source == Source::kIdentical) return asking;  // its ids, whichever request they came from
    if (report.source != Source::kSimilar) return ServedCounts::kNotServed;
    const auto found = origins_.find(report.entry);
    return found == origins_.end() ? ServedCounts::kUnknown : found->second;
  }

  const RunConfig config_;
  const SystemContext context_;
  const std::shared_ptr<Cache> cache_;
  const RequestOptions options_ = {.fidelity = fidelity_from_string(config_.fidelity), .tenant = {}};
  Stats before_;
  std::map<std::int64_t, std::int64_t> origins_;
};

/// What an ordinary decoder does. Two caches: one keeps what a request has computed, and is emptied before the next;
/// the other, for batches, computes all rows whole, without their padding, and keeps nothing.
class KvCacheSystem final : public System {
 public:
  KvCacheSystem(RunConfig config, const SystemContext& context) : config_(std::move(config)) {
    Options options = cache_options(config_, context.settings, context.fingerprint, 0);
    const std::string name = fmt::format("kvcache {} {}", config_.weights, options.capacity_bytes);
    growing_ = context.model.cache_named(name, options);
    growing_->clear();
    options.capacity_bytes = 0;
    options.prefix.capacity_share = 0;
    whole_ = context.model.cache_named(fmt::format("kvcache {} whole", config_.weights), options);
  }

  void begin() override { clear(); }
  Answer run(const Call& call) override {
    ForwardReport report;
    return forward(call.rows.size() == 1 ? *growing_ : *whole_, call, {.fidelity = Fidelity::kLossless}, report);
  }
  void clear() override { growing_->clear(); }
  void describe(Record& record) const override {
    record.fidelity = config_.fidelity;
    record.weights_held = growing_->profile().weights;
    record.cache_bytes = static_cast<std::int64_t>(growing_->stats().bytes);
  }

 private:
  const RunConfig config_;
  std::shared_ptr<Cache> growing_;
  std::shared_ptr<Cache> whole_;
};

class SemanticCacheSystem final : public System {
 public:
  SemanticCacheSystem(RunConfig config, const SystemContext& context)
      : config_(std::move(config)),
        context_(context),
        cache_({.fingerprint = context.fingerprint,
                .tau = *config_.threshold,
                .capacity_bytes = bytes(config_),
                .hidden_size = context.model.cache().profile().hidden,
                .causal = context.model.cache().profile().causal,
                .token_output = context.model.token_output()}) {}

  Answer run(const Call& call) override {
    Answer answer;
    std::int64_t computed = 0;
    c10::IValue output = timed(answer.ms, [&] {
      return cache_.forward(
          call.rows, call.first_sequence, [&] { return pooled_states(call); },
          [&](const std::vector<std::size_t>& rows) { return run_rows(call, rows, computed); });
    });
    answer.returned = all_of(std::move(output), call.rows);
    answer.tokens_computed = static_cast<double>(computed);
    for (const auto& label : cache_.served_from()) {
      answer.served_from.push_back(label.value_or(ServedCounts::kNotServed));
    }
    return answer;
  }

  void fill(const Call& call, FillValues& values) override {
    const auto states = [&] {
      if (!values.states) values.states = pooled_states(call);
      return *values.states;
    };
    if (!values.output) values.output = context_.model.plain(call.inputs);
    cache_.fill(call.rows, call.first_sequence, states, [&](const auto&) { return *values.output; });
  }

  [[nodiscard]] bool identical_only() const override { return false; }
  void clear() override { cache_.clear(); }

  void describe(Record& record) const override {
    describe_similarity(config_, context_, record);
    record.capacity_bytes = static_cast<std::int64_t>(bytes(config_));
    record.cache_bytes = static_cast<std::int64_t>(cache_.counters().bytes);
  }

 private:
  [[nodiscard]] std::vector<std::vector<float>> pooled_states(const Call& call) const {
    return context_.model.cache().pooled_state(call.inputs, context_.settings.fingerprint_layer);
  }

  c10::IValue run_rows(const Call& call, const std::vector<std::size_t>& rows, std::int64_t& computed) {
    Rows some;
    std::vector<RowMarks> marks;
    for (const std::size_t row : rows) {
      some.push_back(call.rows[row]);
      if (!call.marks.empty()) marks.push_back(call.marks[row]);
    }
    computed += padded_length(some) * static_cast<std::int64_t>(some.size());
    const bool all = rows.size() == call.rows.size();
    return context_.model.plain(all ? call.inputs : context_.model.inputs(some, marks));
  }

  const RunConfig config_;
  const SystemContext context_;
  SemanticCache cache_;
};

}  // namespace

std::string cache_name(const RunConfig& config, const Settings& settings) {
  return fmt::format("{} {} {} {} {} {}", config.fidelity, config.threshold.value_or(0), config.eviction,
                     config.capacity_mib.value_or(0), config.weights, config.threshold ? settings.cache_layers : "");
}

Options cache_options(const RunConfig& config, const Settings& settings, const FingerprintOptions& fingerprint,
                      std::int64_t layers) {
  Options options;
  options.fidelity = fidelity_from_string(config.fidelity);
  options.capacity_bytes = bytes(config);
  options.weights = weights_from_string(config.weights);
  if (options.fidelity != Fidelity::kThreshold) return options;
  ThresholdOptions& threshold = options.threshold;
  threshold.tau = *config.threshold;
  threshold.fingerprint = fingerprint;
  threshold.fingerprint_layers = {settings.fingerprint_layer};
  threshold.cache_layers = parse_cache_layers(settings.cache_layers, layers);
  if (settings.cache_layers == "all") {
    // A state behind K layers says nothing about the layers before it.
    std::erase_if(threshold.cache_layers, [&](std::int64_t layer) { return layer < settings.fingerprint_layer; });
  }
  threshold.capacity_share = 1;  // no other fidelity is asked of this cache
  threshold.eviction.policy = eviction_from_string(config.eviction);
  if (settings.ttl_seconds) threshold.ttl_seconds = *settings.ttl_seconds;
  options.refresh.audit_rate = settings.audit_rate;
  return options;
}

std::unique_ptr<System> make_system(const RunConfig& config, const SystemContext& context) {
  if (config.mode == "nocache") return std::make_unique<PlainSystem>(context);
  if (config.mode == "kvcache") return std::make_unique<KvCacheSystem>(config, context);
  if (config.mode == "semantic-cache") return std::make_unique<SemanticCacheSystem>(config, context);
  Options options =
      cache_options(config, context.settings, context.fingerprint, context.model.cache().profile().layers);
  std::shared_ptr<Cache> cache;
  if (options.fidelity == Fidelity::kBudget) {
    options.budget = context.calibration->options(config);
    cache = context.model.make_cache(options);  // bound to this workload
    context.calibration->calibrate(*cache, config);
  } else if (options.fidelity == Fidelity::kThreshold && (context.fingerprint.pca || context.settings.audit_rate > 0)) {
    cache = context.model.make_cache(options);  // fitted on this workload; a threshold that moves stays moved
  } else {
    cache = context.model.cache_named(cache_name(config, context.settings), options);
  }
  return std::make_unique<LayerCacheSystem>(config, context, std::move(cache));
}

}  // namespace llmcache::bench
