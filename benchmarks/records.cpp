#include "records.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <type_traits>

namespace llmcache::bench {
namespace {

using Json = nlohmann::ordered_json;

template <class T>
inline constexpr bool is_optional = false;
template <class T>
inline constexpr bool is_optional<std::optional<T>> = true;
template <class T>
inline constexpr bool is_list = false;
template <class T>
inline constexpr bool is_list<std::vector<T>> = true;

std::optional<std::string> maybe(const std::string& text) { return text.empty() ? std::nullopt : std::optional(text); }
template <class T>
std::optional<std::vector<T>> maybe(const std::vector<T>& values) {
  return values.empty() ? std::nullopt : std::optional(values);
}

// What the schema says of a field beside its type, which follows from that of the value.
const Json kShare = {{"minimum", 0}, {"maximum", 1}};
const Json kAny = {{"minimum", nullptr}};  // of numbers, which otherwise are 0 or more
const Json kAtLeast1 = {{"minimum", 1}};
const Json kFilled = {{"minLength", 1}};
constexpr const char* kLeftOut = "left out";  // of results that were written before there was such a field
Json one_of(std::initializer_list<const char*> words) { return {{"enum", words}}; }

// The list of fields: each calls `field`(name, value, rules of the schema, description) for all of a struct.

void fields(const Machine& m, const auto& field) {
  field("cpu", m.cpu, kFilled);
  field("cores", m.cores);
  field("memory_gib", m.memory_gib);
}

void fields(const Summary& s, const auto& field) {
  field("mean", s.mean);
  field("p50", s.p50);
  field("p95", s.p95);
  field("p99", s.p99);
}

void fields(const Divergence& d, const auto& field) {
  field("mean", d.mean);
  field("p95", d.p95);
  field("max", d.max);
}

void fields(const Comparison& t, const auto& field) {
  field("metric", t.metric,
        one_of({"accuracy", "choice_accuracy", "choice_accuracy_per_byte", "perplexity", "answer_nll", "f1",
                "exact_match", "spearman", "precision"}),
        "precision (duplicates): served from the pair's text and labelled a duplicate / labelled");
  field("value", t.value, kAny);
  field("baseline", t.baseline, kAny, "of nocache, over the same requests");
  field("change", t.change, kAny, "value - baseline, in the metric's unit");
  field("ci95", t.ci95, {}, "of the change: paired bootstrap over requests");
}

void fields(const Rate& r, const auto& field) {
  field("rate", r.rate);
  field("ci95", r.ci95, {}, "Wilson's");
  field("served", r.of);
}

void fields(const UnsafeServed& u, const auto& field) {
  fields(u.rate, field);
  field("unlabelled", u.unlabelled, {}, "served from a text of another pair");
}

void fields(const GreedyDifference& d, const auto& field) {
  field("sequence", d.sequence, {}, "of the token file");
  field("token", d.token, {}, "place in it that is predicted");
  field("gap", d.gap, {}, "nocache's best logit - its logit of this token");
}

void fields(const GreedyResult& g, const auto& field) {
  field("compared", g.compared);
  field("different", g.different);
  field("tied", g.tied, {}, "Different, but within 1e-4 of nocache's best");
  field("differences", g.differences, {{"maxItems", GreedyResult::kListed}}, "The first hundred");
}

void fields(const LaterTurns& t, const auto& field) {
  field("turns", t.turns, kAtLeast1);
  field("prefill_ms", t.prefill_ms);
  field("speedup_vs_nocache", t.speedup_vs_nocache);
  field("speedup_vs_kvcache", t.speedup_vs_kvcache);
  field("tokens_reused_fraction", t.tokens_reused_fraction, kShare);
}

void fields(const ObservedError& e, const auto& field) {
  field("value", e.rate, kShare);
  field("low", e.ci95.low, kShare, "of the 95 % interval");
  field("high", e.ci95.high, kShare, "of the 95 % interval");
  field("n", e.of, {}, "Sequences (metric token: tokens) compared");
}

void fields(const ReuseShares& s, const auto& field) {
  field("early_exit", s.early_exit, kShare, "At a layer, corrected by a cached neighbour");
  field("cache_free_exit", s.cache_free_exit, kShare, "At a layer, by regression, without a neighbour");
  field("token_reuse", s.token_reuse, kShare, "States of a near-identical request's tokens");
  field("segment_reuse", s.segment_reuse, kShare, "A decoder's keys and values of moved segments");
}

void fields(const Versions& v, const auto& field) {
  field("llmcache", v.llmcache);
  field("torch", v.torch);
  field("compiler", v.compiler);
  field("model_torch", maybe(v.model_torch), {}, "that exported the model");
  field("model_transformers", maybe(v.model_transformers));
}

/// Of records of fidelity budget; null elsewhere.
void budget_fields(const std::optional<BudgetResult>& budget, const auto& field) {
  const BudgetResult b = budget.value_or(BudgetResult{});
  const auto set = [&](const char* name, const auto& value, Json rules, const char* about) {
    using Value = std::decay_t<decltype(value)>;
    rules[kLeftOut] = true;
    if constexpr (is_optional<Value>) {
      field(name, budget ? value : Value(), rules, about);
    } else {
      field(name, budget ? std::optional(value) : std::nullopt, rules, about);
    }
  };
  set("budget_metric", b.metric, one_of({"decision", "relative", "token"}),
      "Error against nocache: another decision, too large a relative distance, or another top token");
  set("budget_epsilon", b.epsilon, {{"minimum", nullptr}, {"exclusiveMinimum", 0}, {"maximum", 1}},
      "Share of all asked sequences that may be in error");
  set("budget_delta", b.delta, {{"minimum", nullptr}, {"exclusiveMinimum", 0}, {"exclusiveMaximum", 1}},
      "The budget is kept with probability 1 - delta or more");
  set("cache_free", b.cache_free, Json::object(), "Early exits by regression only, without cached neighbours");
  set("promised_error", b.promised, kShare,
      "Upper bound of the error rate from calibration alone, at confidence 1 - delta");
  set("calibration_requests", b.calibration_requests, Json::object(),
      "Requests of the fill part that the budget was calibrated on");
  set("calibration_part", b.calibration_part, kAtLeast1,
      "Which of several parts without a common text these are; null: there is one");
  set("share_reused", b.share_reused, Json::object(),
      "Shares of the asked sequences that were answered in each way; the rest was computed in full");
  set("exits_by_layer", maybe(b.exits_by_layer), {{"minItems", 1}, {"items", kShare}},
      "Per layer: sequences answered from the state in front of it, it and all above skipped / all asked");
  set("audits", b.audits, Json::object(),
      "Asked sequences that were served and also computed in full, to check the budget");
  set("gate_closings", b.closings, Json::object(), "How often audits stopped a kind of reuse");
  set("gate_reopenings", b.reopenings, Json::object(), "How often audits let a stopped kind of reuse go on");
}

/// How similar requests were found; null where only identical ones count.
void similarity_fields(const Record& r, const auto& field) {
  field("threshold", r.threshold, {{"minimum", -1}, {"maximum", 1}},
        "Similarity from which on an earlier request counts; null where only identical ones do");
  field("fingerprint", maybe(r.fingerprint),
        one_of({"raw", "pca", "simhash64", "simhash128", "simhash256", "jaccard"}));
  field("fingerprint_layer", r.fingerprint_layer, {},
        "State whose mean is fingerprinted: 0 the embedding output, k the state after k layers");
  field("centring", maybe(r.centring), one_of({"off", "running", "fitted"}), "What is subtracted from that mean");
  field("cache_layers", maybe(r.cache_layers), {{"pattern", "^(all|last|[0-9]+(,[0-9]+)*)$"}},
        "Layers whose output is kept; null where whole outputs are");
  field("eviction", maybe(r.eviction), one_of({"lru", "decay", "s3fifo", "gdsf"}));
  field("ttl_seconds", r.ttl_seconds, {{"minimum", nullptr}, {"exclusiveMinimum", 0}}, "null: entries do not expire");
  field("audit_rate", r.audit_rate, kShare);
}

/// Only of decoders.
void decoder_fields(const Record& r, const auto& field) {
  field("prefill_ms", r.prefill_ms, {},
        "Time of the first call of a request, or of each turn of a conversation; null unless a decoder");
  field("prefill_speedup_vs_nocache", r.prefill_speedup_vs_nocache, {}, "Of sums over the same requests");
  field("prefill_speedup_vs_kvcache", r.prefill_speedup_vs_kvcache, {}, "Of sums over the same requests");
  field("tokens_reused_fraction", r.tokens_reused_fraction, kShare,
        "Tokens of prompts that were known from earlier requests");
  field("tokens_shared_fraction", r.tokens_shared_fraction, kShare,
        "Tokens of prompts that were computed once for several rows of a batch");
  field("decode_ms", r.decode_ms, {}, "Time of each generated token but the first; null unless text was generated");
  field("tokens_per_second", r.tokens_per_second, {}, "Generated tokens / all time");
  field("later_turns", r.later_turns, {}, "Prefill of all turns of conversations but the first");
  field("greedy", r.greedy, {},
        "Tokens that come out on top of the logits, against nocache; null where that was not compared");
}

void quality_fields(const Record& r, const auto& field) {
  field("task", r.task, {}, "Quality of the outputs; null where it was not or cannot be measured");
  field("second_task", r.second_task, {},
        "By the task's second metric: of choices by log-likelihoods divided by the lengths in bytes, of answers found "
        "in a passage by exact match; null elsewhere");
  field("recall", r.recall, kShare, "Duplicates: served rightly / sequences whose pair is labelled a duplicate");
  field("unsafe_served", r.unsafe_served, {},
        "Duplicates: served from the pair's text though labelled no duplicate / all served");
  field("same_answer", r.same_answer, {}, "Answers: served from a request with the same gold answer / all served");
  field("divergence", r.divergence, {}, "Relative L2 distance of a request's outputs at real tokens from nocache's");
}

void fields(const Record& r, const auto& field) {
  field("model", r.model, kFilled);
  field("weights", r.weights, {{"pattern", "^(hub:.+|pypi:.+|random \\(seed [0-9]+\\)|unknown)$"}},
        "Where the weights came from");
  field("workload", r.workload, kFilled);
  field("mode", r.mode, one_of({"nocache", "kvcache", "llmcache", "semantic-cache"}));
  field("fidelity", maybe(r.fidelity), one_of({"identical", "lossless", "budget", "threshold"}),
        "null unless llmcache or kvcache");
  field("weights_held", r.weights_held,
        one_of({"as-loaded", "packed-fp32", "packed-fp16", "packed-bf16", "packed-int8"}),
        "How the weights of linear layers were held");
  field("weights_sample", maybe(r.weights_sample), {}, "Workload that packed-int8 was tuned on; null: it was not");
  field("output", r.output, one_of({"all", "last", "new", "last+new"}),
        "Tokens whose outputs were asked for: last+new in two calls, the prompt and then the whole");
  similarity_fields(r, field);
  field("capacity_bytes", r.capacity_bytes, {}, "null for nocache and kvcache");
  field("threads", r.threads, kAtLeast1, "within an operator; between operators 1");
  field("requests", r.requests, kAtLeast1, "timed");
  field("requests_available", r.requests_available, kAtLeast1, "in the stream that was to be sent");
  field("filled", r.filled, {}, "Requests that were only kept, before timing");
  field("fill_available", r.fill_available, {}, "Requests of the workload that only fill");
  field("sequences", r.sequences, kAtLeast1);
  field("tokens", r.tokens, kAtLeast1, "real ones, padding excluded");
  field("tokens_computed_fraction", r.tokens_computed_fraction, {},
        "Tokens that went through the layers, padding included, divided by `tokens`");
  field("latency_ms", r.latency_ms, {}, "Wall time of a request");
  field("verification_ms", r.verification_ms, kAny,
        "In all, beside the latencies: comparing the first answer of each size, and samples, with the plain model");
  field("speedup_vs_nocache", r.speedup_vs_nocache, {},
        "Sum of nocache latencies divided by the sum of this mode's, over the same requests");
  field("speedup_median", r.speedup_median, {}, "Median of the ratios of single requests");
  field("speedup_vs_kvcache", r.speedup_vs_kvcache, {},
        "Sum of kvcache latencies, weights held alike, divided by the sum of this mode's");
  decoder_fields(r, field);
  field("hit_rate", r.hit_rate, kShare,
        "Sequences answered from an earlier request: an identical one, or a similar one");
  field("hit_rate_by_layer", maybe(r.hit_rate_by_layer), {{"minItems", 1}, {"items", kShare}},
        "Per layer: sequences that went on from the kept output of that layer / all sequences");
  quality_fields(r, field);
  field("cache_bytes", r.cache_bytes, {}, "Held by the cache at the end");
  field("shuffle", r.shuffle, {}, "Seed; null: the order of the file");
  field("note", maybe(r.note), {}, "Why it is slower than nocache; null where it is not");
  field("source", r.source, {}, "What the token file was made from");
  field("versions", r.versions);
  field("observed_error", r.observed_error, {{kLeftOut, true}},
        "Sequences of the asking part in error / all compared with nocache");
  budget_fields(r.budget, field);
}

/// A value, or all fields of a struct.
template <class T>
Json written(const T& value) {
  if constexpr (is_optional<T>) {
    return value ? written(*value) : Json(nullptr);
  } else if constexpr (std::is_floating_point_v<T>) {
    return std::isfinite(value) ? Json(value) : Json(nullptr);
  } else if constexpr (is_list<T>) {
    Json list = Json::array();
    for (const auto& element : value) list.push_back(written(element));
    return list;
  } else if constexpr (std::is_same_v<T, Interval>) {
    return Json::array({written(value.low), written(value.high)});
  } else if constexpr (std::is_arithmetic_v<T> || std::is_same_v<T, std::string>) {
    return value;
  } else {
    Json object = Json::object();
    fields(value, [&](const char* name, const auto& field, const Json& = {}, const char* = "") {
      object[name] = written(field);
    });
    return object;
  }
}

/// Adds what the list of fields says of one to the schema of its type.
void add_rules(const Json& rules, const char* about, Json& schema) {
  for (const auto& [key, value] : rules.items()) {
    if (key == kLeftOut) continue;
    if (value.is_null()) {
      schema.erase(key);
    } else if (key == "items") {
      schema[key].update(value);
    } else {
      schema[key] = value;
    }
  }
  if (schema.contains("enum") && schema["type"].is_array()) schema["enum"].push_back(nullptr);
  if (*about != '\0') schema["description"] = about;
}

/// The schema of a value's type.
template <class T>
Json schema_of(const T& value) {
  if constexpr (is_optional<T>) {
    Json schema = schema_of(typename T::value_type{});
    const Json type = schema["type"];
    if (!type.is_array()) schema["type"] = {type, "null"};
    return schema;
  } else if constexpr (std::is_same_v<T, bool>) {
    return {{"type", "boolean"}};
  } else if constexpr (std::is_same_v<T, std::string>) {
    return {{"type", "string"}};
  } else if constexpr (std::is_floating_point_v<T>) {
    return {{"type", {"number", "null"}}, {"minimum", 0}};
  } else if constexpr (std::is_integral_v<T>) {
    return {{"type", "integer"}, {"minimum", 0}};
  } else if constexpr (is_list<T>) {
    return {{"type", "array"}, {"items", schema_of(typename T::value_type{})}};
  } else if constexpr (std::is_same_v<T, Interval>) {
    return {{"type", "array"}, {"minItems", 2}, {"maxItems", 2}, {"items", {{"type", {"number", "null"}}}}};
  } else {
    Json schema = {{"type", "object"}, {"required", Json::array()}, {"additionalProperties", false}};
    fields(value, [&](const char* name, const auto& field, const Json& rules = {}, const char* about = "") {
      if (!rules.contains(kLeftOut)) schema["required"].push_back(name);
      add_rules(rules, about, schema["properties"][name] = schema_of(field));
    });
    return schema;
  }
}

}  // namespace

Json to_json(const Record& record) { return written(record); }

Json results_json(const Machine& machine, const std::string& command, const std::vector<Record>& records) {
  return {{"schema", 1}, {"machine", written(machine)}, {"command", command}, {"records", written(records)}};
}

Json results_schema() {
  Json record = schema_of(Record{});
  record["description"] = "One model on one workload in one mode";
  return {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
          {"title", "Results of llmcache-bench"},
          {"description",
           "Written by llmcache-bench --json FILE. A number that was not measured, or is not finite, is null. Made by "
           "llmcache-bench --schema"},
          {"type", "object"},
          {"required", {"schema", "machine", "command", "records"}},
          {"additionalProperties", false},
          {"properties",
           {{"schema", {{"const", 1}}},
            {"machine", schema_of(Machine{})},
            {"command", {{"type", "string"}, {"description", "The command line, the program by its name only"}}},
            {"records", {{"type", "array"}, {"minItems", 1}, {"items", {{"$ref", "#/$defs/record"}}}}}}},
          {"$defs", {{"record", std::move(record)}}}};
}

}  // namespace llmcache::bench
