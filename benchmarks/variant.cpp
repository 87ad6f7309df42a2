#include "variant.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "document_cache.h"
#include "failure.h"
#include "quality_served.h"

namespace llmcache::bench {
namespace {

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

  c10::IValue forward(const Request& request) override { return model_.plain(request.inputs); }
  Done done(const Request& request) override {
    return {static_cast<double>(request.padded),
            std::vector<std::int64_t>(request.rows.size(), ServedCounts::kNotServed)};
  }
  void fill(const Request&, const FillRun&) override {}
  [[nodiscard]] bool identical_only() const override { return true; }
  void clear() override {}
  void start() override {}
  void describe(Record& record) const override { record.hit_rate = 0; }

 private:
  LoadedModel& model_;
};

class LayerCacheVariant final : public Variant {
 public:
  LayerCacheVariant(Setting setting, const VariantContext& context, std::shared_ptr<Cache> cache)
      : setting_(std::move(setting)), context_(context), cache_(std::move(cache)) {
    cache_->clear();
    start();
  }

  c10::IValue forward(const Request& request) override { return cache_->forward(request.inputs, options_); }

  Done done(const Request& request) override {
    const ForwardReport report = cache_->last_report();
    remember(report, request);
    Done result{.tokens_computed = tokens_computed(report, request), .served_from = {}};
    for (std::size_t row = 0; row < report.sequences.size(); ++row) {
      result.served_from.push_back(
          served_from(report.sequences[row], request.first_sequence + static_cast<std::int64_t>(row)));
    }
    return result;
  }

  void fill(const Request& request, const FillRun&) override {
    RequestOptions keep_all = options_;
    keep_all.look_up = false;
    cache_->forward(request.inputs, keep_all);
    remember(cache_->last_report(), request);
  }

  [[nodiscard]] bool identical_only() const override { return setting_.fidelity != "threshold"; }
  void clear() override { cache_->clear(); }
  void start() override { before_ = cache_->stats(); }

  void describe(Record& record) const override {
    const Stats after = cache_->stats();
    const auto sequences = static_cast<double>(after.sequences - before_.sequences);
    const auto share = [&](std::uint64_t hits) { return static_cast<double>(hits) / sequences; };
    record.fidelity = setting_.fidelity;
    record.capacity_bytes = static_cast<std::int64_t>(bytes(setting_));
    record.cache_bytes = static_cast<std::int64_t>(after.bytes);
    record.hit_rate = share(after.identical_hits + after.similar_hits - before_.identical_hits - before_.similar_hits);
    if (setting_.fidelity != "threshold") return;
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

  /// Its report counts real tokens; a batch that ran dense computed its padding too.
  static double tokens_computed(const ForwardReport& report, const Request& request) {
    if (report.execution == Execution::kNone) return 0;
    if (report.execution == Execution::kPacked) return report.computed_fraction() * static_cast<double>(request.tokens);
    const auto known = std::count_if(report.sequences.begin(), report.sequences.end(),
                                     [](const SequenceReport& s) { return s.source == Source::kIdentical; });
    const auto width = request.padded / static_cast<std::int64_t>(request.rows.size());
    return static_cast<double>((static_cast<std::int64_t>(report.sequences.size()) - known) * width);
  }

  const Setting setting_;
  const VariantContext context_;
  const std::shared_ptr<Cache> cache_;
  const RequestOptions options_ = {.fidelity = fidelity_from_string(setting_.fidelity), .tenant = {}};
  Stats before_;
  std::map<std::int64_t, std::int64_t> origins_;
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

  c10::IValue forward(const Request& request) override {
    return cache_.forward(
        request.rows, request.first_sequence,
        [&] { return context_.model.cache().pooled_state(request.inputs, context_.arguments.fingerprint_layer); },
        [&](const std::vector<std::size_t>& rows) { return run(request, rows); });
  }

  Done done(const Request& request) override {
    Done result{.tokens_computed = static_cast<double>(computed_), .served_from = {}};
    computed_ = 0;
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
    computed_ = 0;
  }

  void describe(Record& record) const override {
    describe_similarity(setting_, context_, record);
    record.capacity_bytes = static_cast<std::int64_t>(bytes(setting_));
    record.cache_bytes = static_cast<std::int64_t>(cache_.bytes());
    record.hit_rate = static_cast<double>(hits_) / static_cast<double>(sequences_);
  }

 private:
  c10::IValue run(const Request& request, const std::vector<std::size_t>& rows) {
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
  std::int64_t computed_ = 0;  // tokens of the latest forward
};

}  // namespace

Options cache_options(const Setting& setting, const Arguments& arguments, const FingerprintOptions& fingerprint,
                      std::int64_t layers) {
  Options options;
  options.fidelity = fidelity_from_string(setting.fidelity);
  options.capacity_bytes = bytes(setting);
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
  if (setting.mode == "doccache") return std::make_unique<DocumentVariant>(setting, context);
  Cache& wrapped = context.model.cache();
  const Options options = cache_options(setting, context.arguments, context.fingerprint, wrapped.profile().layers);
  std::shared_ptr<Cache> cache;
  if (options.fidelity == wrapped.options().fidelity && options.capacity_bytes == wrapped.options().capacity_bytes) {
    cache = context.model.shared_cache();
  } else if (context.fingerprint.pca || context.arguments.shadow_rate > 0) {
    cache = context.model.make_cache(options);  // fitted on this workload; a threshold that moves stays moved
  } else {
    cache = context.model.cache_named(fmt::format("{} {} {} {}", setting.fidelity, setting.threshold.value_or(0),
                                                  setting.eviction, options.capacity_bytes),
                                      options);
  }
  return std::make_unique<LayerCacheVariant>(setting, context, std::move(cache));
}

}  // namespace llmcache::bench
