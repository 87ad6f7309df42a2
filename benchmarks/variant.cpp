#include "variant.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <utility>

#include "document_cache.h"
#include "failure.h"
#include "quality_served.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;

/// Runs `what` and notes the time.
template <class What>
auto timed(std::vector<double>& ms, const What& what) {
  const auto start = Clock::now();
  auto result = what();
  ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  return result;
}

std::size_t bytes(const Setting& setting) { return static_cast<std::size_t>(*setting.capacity_mib) << 20; }

/// What similarity is measured on, as records tell it.
void describe_similarity(const Setting& setting, const VariantContext& context, Record& record) {
  record.threshold = setting.threshold;
  record.fingerprint = to_string(context.fingerprint.kind);
  if (context.fingerprint.kind != FingerprintKind::kJaccard) {
    record.fingerprint_layer = context.arguments.fingerprint_layer;
    record.centring = context.fingerprint.kind == FingerprintKind::kPca ? to_string(Centring::kFitted)
                                                                        : to_string(context.fingerprint.centring);
  }
  record.eviction = setting.eviction;
}

class PlainVariant final : public Variant {
 public:
  explicit PlainVariant(const VariantContext& context) : model_(context.model) {}

  Run run(const Request& request) override {
    Run result;
    c10::IValue output = timed(result.ms, [&] { return model_.plain(request.inputs); });
    result.returned.push_back(all_of(std::move(output), request.rows));
    result.tokens_computed = static_cast<double>(request.padded);
    result.served_from.assign(request.rows.size(), ServedCounts::kNotServed);
    return result;
  }
  void fill(const Request&, const FillRun&) override {}
  [[nodiscard]] bool identical_only() const override { return true; }
  void clear() override {}
  void start() override {}
  void describe(Record& record) const override { record.hit_rate = 0; }

 private:
  LoadedModel& model_;
};

/// Tokens that went through the layers. A report counts real ones; a batch that ran dense computed its padding too.
double tokens_computed(const ForwardReport& report, const Rows& rows) {
  if (report.execution == Execution::kNone) return 0;
  std::size_t tokens = 0;
  std::size_t width = 0;
  for (const auto& row : rows) {
    tokens += row.size();
    width = std::max(width, row.size());
  }
  if (report.execution == Execution::kPacked) return report.computed_fraction() * static_cast<double>(tokens);
  const auto known = std::count_if(report.sequences.begin(), report.sequences.end(),
                                   [](const SequenceReport& s) { return s.source == Source::kIdentical; });
  return static_cast<double>((static_cast<std::int64_t>(report.sequences.size()) - known) *
                             static_cast<std::int64_t>(width));
}

/// Runs a call through a cache and adds what it did to `result`; `first`: it is the first call of a request.
ForwardReport forward(Cache& cache, const Call& call, RequestOptions options, bool first, Run& result) {
  options.output = call.output;
  Returned returned;
  returned.output = timed(result.ms, [&] { return cache.forward(call.inputs, options); });
  ForwardReport report = cache.last_report();
  // The first answer of each size, and few later ones, are compared with the plain model's.
  result.ms.back() -= report.verify_ms;
  result.verify_ms += report.verify_ms;
  for (std::size_t row = 0; row < report.sequences.size(); ++row) {
    const auto tokens = static_cast<std::int64_t>(call.rows[row].size());
    const std::int64_t known = report.sequences[row].reused_tokens;
    returned.tokens.push_back({call.output == Output::kAll         ? 0
                               : call.output == Output::kLastToken ? tokens - 1
                                                                   : known,
                               tokens});
    if (!first) continue;
    result.tokens_reused += known;
    result.tokens_shared += report.sequences[row].shared_tokens;
  }
  result.returned.push_back(std::move(returned));
  result.tokens_computed += tokens_computed(report, call.rows);
  return report;
}

class LayerCacheVariant final : public Variant {
 public:
  LayerCacheVariant(Setting setting, const VariantContext& context, std::shared_ptr<Cache> cache)
      : setting_(std::move(setting)), context_(context), cache_(std::move(cache)) {
    cache_->clear();
    start();
  }

  Run run(const Request& request) override {
    Run result;
    const auto one = [&](const Call& call, bool first) {
      const ForwardReport report = forward(*cache_, call, options_, first, result);
      if (!first) return;
      if (similar()) remember(report, request);
      for (std::size_t row = 0; row < report.sequences.size(); ++row) {
        const SequenceReport& sequence = report.sequences[row];
        result.served_from.push_back(served_from(sequence, request.first_sequence + static_cast<std::int64_t>(row)));
        hits_ += sequence.source == Source::kIdentical ? 1 : 0;
      }
      sequences_ += static_cast<std::int64_t>(report.sequences.size());
    };
    if (setting_.fidelity != "lossless" && setting_.fidelity != "budget") {
      one({request.rows, request.inputs, Output::kAll}, true);
    } else {
      for (const Call& call : request.calls) one(call, &call == &request.calls.front());
    }
    return result;
  }

  void fill(const Request& request, const FillRun&) override {
    RequestOptions keep_all = options_;
    keep_all.look_up = false;
    cache_->forward(request.inputs, keep_all);
    if (similar()) remember(cache_->last_report(), request);
  }

  [[nodiscard]] bool identical_only() const override { return !similar(); }
  void clear() override { cache_->clear(); }
  void start() override {
    before_ = cache_->stats();
    hits_ = 0;
    sequences_ = 0;
  }

  void describe(Record& record) const override {
    const Stats after = cache_->stats();
    const auto sequences = static_cast<double>(after.sequences - before_.sequences);
    const auto share = [&](std::uint64_t hits) { return static_cast<double>(hits) / sequences; };
    record.fidelity = setting_.fidelity;
    record.weights_held = setting_.weights;
    record.capacity_bytes = static_cast<std::int64_t>(bytes(setting_));
    record.cache_bytes = static_cast<std::int64_t>(after.bytes);
    record.hit_rate = static_cast<double>(hits_) / static_cast<double>(sequences_);
    if (after.budget) describe_budget(*after.budget, sequences, record);
    if (!similar()) return;
    record.hit_rate = share(after.identical_hits + after.similar_hits - before_.identical_hits - before_.similar_hits);
    describe_similarity(setting_, context_, record);
    record.cache_layers = context_.arguments.cache_layers;
    record.ttl_seconds = context_.arguments.ttl_seconds;
    record.shadow_rate = context_.arguments.shadow_rate;
    record.hit_rate_by_layer.assign(static_cast<std::size_t>(cache_->profile().layers), 0);
    for (std::size_t i = 0; i < after.layers.size(); ++i) {
      const std::uint64_t earlier = i < before_.layers.size() ? before_.layers[i].hits : 0;
      record.hit_rate_by_layer.at(static_cast<std::size_t>(after.layers[i].layer)) =
          share(after.layers[i].hits - earlier);
    }
  }

 private:
  [[nodiscard]] bool similar() const { return setting_.fidelity == "threshold"; }

  void describe_budget(const BudgetStats& after, double sequences, Record& record) const {
    const BudgetStats& before = *before_.budget;
    const CalibrationProfile profile = *cache_->calibration();
    BudgetResult& budget = record.budget.emplace();
    budget.metric = to_string(profile.budget.metric);
    budget.epsilon = profile.budget.epsilon;
    budget.delta = profile.budget.delta;
    budget.cache_free = setting_.early_exit == "cache-free";
    budget.promised = profile.error_bound;
    budget.calibration_requests = context_.calibration->requests();
    const double exits = static_cast<double>(after.early_exits - before.early_exits) / sequences;
    (budget.cache_free ? budget.cache_free_exit : budget.early_exit) = exits;
    budget.token_reuse = static_cast<double>(after.token_reuses - before.token_reuses) / sequences;
    budget.segment_reuse = static_cast<double>(after.segment_reuses - before.segment_reuses) / sequences;
    record.hit_rate += exits + budget.token_reuse + budget.segment_reuse;
    for (std::size_t l = 0; l < after.exits_by_layer.size(); ++l) {
      budget.exits_by_layer.push_back(static_cast<double>(after.exits_by_layer[l] - before.exits_by_layer[l]) /
                                      sequences);
    }
    budget.audits = static_cast<std::int64_t>(after.audits - before.audits);
    budget.closings = static_cast<std::int64_t>(after.closings - before.closings);
    budget.reopenings = static_cast<std::int64_t>(after.reopenings - before.reopenings);
  }

  /// Which sequence of the file a number of the cache is.
  void remember(const ForwardReport& report, const Request& request) {
    for (std::size_t row = 0; row < report.sequences.size(); ++row) {
      origins_[static_cast<std::int64_t>(report.sequences[row].number)] =
          request.first_sequence + static_cast<std::int64_t>(row);
    }
  }

  [[nodiscard]] std::int64_t served_from(const SequenceReport& report, std::int64_t asking) const {
    if (report.source == Source::kIdentical) return asking;  // its ids, whichever request they came from
    if (report.source != Source::kSimilar) return ServedCounts::kNotServed;
    const auto found = origins_.find(report.entry);
    return found == origins_.end() ? ServedCounts::kUnknown : found->second;
  }

  const Setting setting_;
  const VariantContext context_;
  const std::shared_ptr<Cache> cache_;
  const RequestOptions options_ = {.fidelity = fidelity_from_string(setting_.fidelity), .tenant = {}};
  Stats before_;
  std::int64_t hits_ = 0;  // whole requests that were known
  std::int64_t sequences_ = 0;
  std::map<std::int64_t, std::int64_t> origins_;
};

/// What an ordinary decoder does. Two caches: one keeps what a request has computed, and is emptied before the next;
/// the other, for batches, computes all rows whole, without their padding, and keeps nothing.
class KvCacheVariant final : public Variant {
 public:
  KvCacheVariant(Setting setting, const VariantContext& context) : setting_(std::move(setting)), context_(context) {}

  void prepare(const Request& request) override { cache_for(request); }
  void begin() override { clear(); }
  Run run(const Request& request) override {
    Run result;
    Cache& cache = cache_for(request);
    for (const Call& call : request.calls) {
      forward(cache, call, {.fidelity = Fidelity::kLossless}, &call == &request.calls.front(), result);
    }
    result.served_from.assign(request.rows.size(), ServedCounts::kNotServed);
    return result;
  }
  void fill(const Request&, const FillRun&) override {}
  [[nodiscard]] bool identical_only() const override { return true; }
  void clear() override {
    if (growing_) growing_->clear();
  }
  void start() override {}
  void describe(Record& record) const override {
    record.fidelity = setting_.fidelity;
    record.weights_held = setting_.weights;
    record.cache_bytes = growing_ ? static_cast<std::int64_t>(growing_->stats().bytes) : 0;
    record.hit_rate = 0;
  }

 private:
  Cache& cache_for(const Request& request) { return request.rows.size() == 1 ? growing() : whole(); }

  Cache& growing() {
    if (!growing_) {
      growing_ = context_.model.cache_named(fmt::format("kvcache {} {}", setting_.weights, bytes(setting_)), options());
      growing_->clear();
    }
    return *growing_;
  }

  Cache& whole() {
    if (!whole_) {
      Options nothing = options();
      nothing.capacity_bytes = 0;
      nothing.prefix.capacity_share = 0;
      whole_ = context_.model.cache_named(fmt::format("kvcache {} whole", setting_.weights), nothing);
    }
    return *whole_;
  }

  [[nodiscard]] Options options() const { return cache_options(setting_, context_.arguments, context_.fingerprint, 0); }

  const Setting setting_;
  const VariantContext context_;
  std::shared_ptr<Cache> growing_;  // both made when first used: wrapping takes seconds
  std::shared_ptr<Cache> whole_;
};

class DocumentVariant final : public Variant {
 public:
  DocumentVariant(Setting setting, const VariantContext& context)
      : setting_(std::move(setting)),
        context_(context),
        cache_({.fingerprint = context.fingerprint,
                .tau = *setting_.threshold,
                .capacity_bytes = bytes(setting_),
                .dims = context.model.cache().profile().hidden,
                .causal = context.model.cache().profile().causal,
                .token_output = context.model.token_output()}) {}

  Run run(const Request& request) override {
    Run result;
    computed_ = 0;
    c10::IValue output = timed(result.ms, [&] {
      return cache_.forward(
          request.rows, request.first_sequence,
          [&] { return context_.model.cache().pooled_state(request.inputs, context_.arguments.fingerprint_layer); },
          [&](const std::vector<std::size_t>& rows) { return run_rows(request, rows); });
    });
    result.returned.push_back(all_of(std::move(output), request.rows));
    result.tokens_computed = static_cast<double>(computed_);
    for (const auto& label : cache_.served_from()) {
      result.served_from.push_back(label.value_or(ServedCounts::kNotServed));
      hits_ += label ? 1 : 0;
    }
    sequences_ += static_cast<std::int64_t>(request.rows.size());
    return result;
  }

  void fill(const Request& request, const FillRun& fill) override {
    cache_.fill(
        request.rows, request.first_sequence, [&] { return fill.states(); },
        [&](const std::vector<std::size_t>&) { return fill.output(); });
  }

  [[nodiscard]] bool identical_only() const override { return false; }
  void clear() override { cache_.clear(); }
  void start() override {
    hits_ = 0;
    sequences_ = 0;
  }

  void describe(Record& record) const override {
    describe_similarity(setting_, context_, record);
    record.capacity_bytes = static_cast<std::int64_t>(bytes(setting_));
    record.cache_bytes = static_cast<std::int64_t>(cache_.bytes());
    record.hit_rate = static_cast<double>(hits_) / static_cast<double>(sequences_);
  }

 private:
  c10::IValue run_rows(const Request& request, const std::vector<std::size_t>& rows) {
    if (rows.size() == request.rows.size()) {
      computed_ += request.padded;
      return context_.model.plain(request.inputs);
    }
    Rows some;
    std::size_t width = 0;
    for (const std::size_t row : rows) {
      some.push_back(request.rows[row]);
      width = std::max(width, some.back().size());
    }
    computed_ += static_cast<std::int64_t>(width * some.size());
    return context_.model.plain(context_.model.inputs(some));
  }

  const Setting setting_;
  const VariantContext context_;
  DocumentCache cache_;
  std::int64_t hits_ = 0;
  std::int64_t sequences_ = 0;
  std::int64_t computed_ = 0;  // tokens of the latest run
};

}  // namespace

double Run::total_ms() const { return std::accumulate(ms.begin(), ms.end(), 0.0); }

std::string cache_name(const Setting& setting, const Arguments& arguments) {
  const bool keeps_layers = setting.threshold.has_value();
  return fmt::format("{} {} {} {} {} {}", setting.fidelity, setting.threshold.value_or(0), setting.eviction,
                     setting.capacity_mib.value_or(0), setting.weights, keeps_layers ? arguments.cache_layers : "");
}

Options cache_options(const Setting& setting, const Arguments& arguments, const FingerprintOptions& fingerprint,
                      std::int64_t layers) {
  Options options;
  options.fidelity = fidelity_from_string(setting.fidelity);
  options.capacity_bytes = bytes(setting);
  options.weights = weights_from_string(setting.weights);
  if (options.fidelity != Fidelity::kThreshold) return options;
  ThresholdOptions& threshold = options.threshold;
  threshold.tau = *setting.threshold;
  threshold.fingerprint = fingerprint;
  threshold.fingerprint_layers = {arguments.fingerprint_layer};
  threshold.cache_layers = parse_cache_layers(arguments.cache_layers, layers);
  if (arguments.cache_layers == "all") {
    // A state behind K layers says nothing about the layers before it.
    std::erase_if(threshold.cache_layers, [&](std::int64_t layer) { return layer < arguments.fingerprint_layer; });
  }
  threshold.capacity_share = 1;  // no other fidelity is asked of this cache
  threshold.eviction.policy = eviction_from_string(setting.eviction);
  if (arguments.ttl_seconds) threshold.ttl_seconds = *arguments.ttl_seconds;
  options.refresh.shadow_rate = arguments.shadow_rate;
  return options;
}

std::unique_ptr<Variant> make_variant(const Setting& setting, const VariantContext& context) {
  if (setting.mode == "nocache") return std::make_unique<PlainVariant>(context);
  if (setting.mode == "kvcache") return std::make_unique<KvCacheVariant>(setting, context);
  if (setting.mode == "doccache") return std::make_unique<DocumentVariant>(setting, context);
  Options options =
      cache_options(setting, context.arguments, context.fingerprint, context.model.cache().profile().layers);
  if (options.fidelity == Fidelity::kBudget) {
    options.budget = context.calibration->options(setting);
    auto cache = context.model.make_cache(options);  // bound to this workload
    context.calibration->calibrate(*cache, setting);
    return std::make_unique<LayerCacheVariant>(setting, context, std::move(cache));
  }
  const bool own =
      options.fidelity == Fidelity::kThreshold && (context.fingerprint.pca || context.arguments.shadow_rate > 0);
  std::shared_ptr<Cache> cache =
      own ? context.model.make_cache(options)  // fitted on this workload; a threshold that moves stays moved
          : context.model.cache_named(cache_name(setting, context.arguments), options);
  return std::make_unique<LayerCacheVariant>(setting, context, std::move(cache));
}

}  // namespace llmcache::bench
