#include "records.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "failure.h"

namespace llmcache::bench {
namespace {

using Json = nlohmann::ordered_json;

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }
Json text(const std::string& value) { return value.empty() ? Json(nullptr) : Json(value); }

template <class T>
Json maybe(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json interval(const Interval& value) { return Json::array({number(value.low), number(value.high)}); }

Json task(const std::optional<TaskResult>& value) {
  if (!value) return nullptr;
  return {{"metric", value->metric},
          {"value", number(value->value)},
          {"baseline", number(value->baseline)},
          {"change", number(value->change)},
          {"ci95", interval(value->ci95)}};
}

Json unsafe_served(const std::optional<UnsafeServed>& value) {
  if (!value) return nullptr;
  return {{"rate", number(value->rate.rate)},
          {"ci95", interval(value->rate.ci95)},
          {"served", value->rate.of},
          {"unlabelled", value->unlabelled}};
}

Json same_answer(const std::optional<Rate>& value) {
  if (!value) return nullptr;
  return {{"rate", number(value->rate)}, {"ci95", interval(value->ci95)}, {"served", value->of}};
}

Json summary(const Summary& value) {
  return {
      {"mean", number(value.mean)}, {"p50", number(value.p50)}, {"p95", number(value.p95)}, {"p99", number(value.p99)}};
}

Json maybe_summary(const std::optional<Summary>& value) { return value ? summary(*value) : Json(nullptr); }

Json greedy(const std::optional<GreedyResult>& value) {
  if (!value) return nullptr;
  Json list = Json::array();
  for (const GreedyDifference& d : value->differences) {
    list.push_back({{"sequence", d.sequence}, {"token", d.token}, {"gap", number(d.gap)}});
  }
  return {{"compared", value->compared},
          {"different", value->different},
          {"tied", value->tied},
          {"differences", std::move(list)}};
}

Json later_turns(const std::optional<LaterTurns>& value) {
  if (!value) return nullptr;
  return {{"turns", value->turns},
          {"prefill_ms", summary(value->prefill_ms)},
          {"speedup_vs_nocache", number(value->speedup_vs_nocache)},
          {"speedup_vs_kvcache", number(value->speedup_vs_kvcache)},
          {"tokens_reused_fraction", number(value->tokens_reused_fraction)}};
}

Json observed_error(const std::optional<ObservedError>& value) {
  if (!value) return nullptr;
  return {{"value", number(value->value)},
          {"low", number(value->ci95.low)},
          {"high", number(value->ci95.high)},
          {"n", value->of}};
}

/// The fields of a budget, all null where there is none.
void write_budget(const std::optional<BudgetResult>& b, Json& json) {
  const auto set = [&](const char* name, Json value) { json[name] = b ? std::move(value) : Json(nullptr); };
  const BudgetResult r = b.value_or(BudgetResult{});
  set("budget_metric", r.metric);
  set("budget_epsilon", r.epsilon);
  set("budget_delta", r.delta);
  set("cache_free", r.cache_free);
  set("promised_error", number(r.promised));
  set("calibration_requests", r.calibration_requests);
  set("share_reused", {{"early_exit", r.early_exit},
                       {"cache_free_exit", r.cache_free_exit},
                       {"token_reuse", r.token_reuse},
                       {"segment_reuse", r.segment_reuse}});
  set("exits_by_layer", r.exits_by_layer.empty() ? Json(nullptr) : Json(r.exits_by_layer));
  set("audits", r.audits);
  set("gate_closings", r.closings);
  set("gate_reopenings", r.reopenings);
}

double number_from(const Json& json) { return json.is_null() ? kNotMeasured : json.get<double>(); }
std::string text_from(const Json& json) { return json.is_null() ? std::string() : json.get<std::string>(); }

template <class T>
void read_maybe(const Json& json, std::optional<T>& value) {
  if (!json.is_null()) value = json.get<T>();
}

Interval interval_from(const Json& json) { return {number_from(json.at(0)), number_from(json.at(1))}; }

Rate rate_from(const Json& json) {
  return {number_from(json.at("rate")), interval_from(json.at("ci95")), json.at("served").get<std::int64_t>()};
}

Summary summary_from(const Json& json) {
  return {.mean = number_from(json.at("mean")),
          .p50 = number_from(json.at("p50")),
          .p95 = number_from(json.at("p95")),
          .p99 = number_from(json.at("p99")),
          .max = kNotMeasured};
}

/// Older results have no budgets.
std::optional<TaskResult> task_from(const Json& json) {
  if (json.is_null()) return std::nullopt;
  return TaskResult{.metric = json.at("metric").get<std::string>(),
                    .value = number_from(json.at("value")),
                    .baseline = number_from(json.at("baseline")),
                    .change = number_from(json.at("change")),
                    .ci95 = interval_from(json.at("ci95"))};
}

void read_budget(const Json& json, Record& r) {
  if (const Json error = json.value("observed_error", Json(nullptr)); !error.is_null()) {
    r.observed_error = {.value = number_from(error.at("value")),
                        .ci95 = {number_from(error.at("low")), number_from(error.at("high"))},
                        .of = error.at("n").get<std::int64_t>()};
  }
  if (json.value("budget_metric", Json(nullptr)).is_null()) return;
  const Json& share = json.at("share_reused");
  const Json& exits = json.at("exits_by_layer");
  r.budget = {.metric = json.at("budget_metric").get<std::string>(),
              .epsilon = number_from(json.at("budget_epsilon")),
              .delta = number_from(json.at("budget_delta")),
              .cache_free = json.at("cache_free").get<bool>(),
              .promised = number_from(json.at("promised_error")),
              .calibration_requests = json.at("calibration_requests").get<std::int64_t>(),
              .early_exit = number_from(share.at("early_exit")),
              .cache_free_exit = number_from(share.at("cache_free_exit")),
              .token_reuse = number_from(share.at("token_reuse")),
              .segment_reuse = number_from(share.at("segment_reuse")),
              .exits_by_layer = exits.is_null() ? std::vector<double>{} : exits.get<std::vector<double>>(),
              .audits = json.at("audits").get<std::int64_t>(),
              .closings = json.at("gate_closings").get<std::int64_t>(),
              .reopenings = json.at("gate_reopenings").get<std::int64_t>()};
}

/// What only decoders have.
void read_decoding(const Json& json, Record& r) {
  r.speedup_vs_kvcache = number_from(json.at("speedup_vs_kvcache"));
  if (!json.at("prefill_ms").is_null()) r.prefill_ms = summary_from(json["prefill_ms"]);
  r.prefill_speedup_vs_nocache = number_from(json.at("prefill_speedup_vs_nocache"));
  r.prefill_speedup_vs_kvcache = number_from(json.at("prefill_speedup_vs_kvcache"));
  r.tokens_reused_fraction = number_from(json.at("tokens_reused_fraction"));
  r.tokens_shared_fraction = number_from(json.at("tokens_shared_fraction"));
  if (!json.at("decode_ms").is_null()) r.decode_ms = summary_from(json["decode_ms"]);
  r.tokens_per_second = number_from(json.at("tokens_per_second"));
  if (const Json& t = json.at("later_turns"); !t.is_null()) {
    r.later_turns = {.turns = t.at("turns").get<std::int64_t>(),
                     .prefill_ms = summary_from(t.at("prefill_ms")),
                     .speedup_vs_nocache = number_from(t.at("speedup_vs_nocache")),
                     .speedup_vs_kvcache = number_from(t.at("speedup_vs_kvcache")),
                     .tokens_reused_fraction = number_from(t.at("tokens_reused_fraction"))};
  }
  if (const Json& g = json.at("greedy"); !g.is_null()) {
    r.greedy = {.compared = g.at("compared").get<std::int64_t>(),
                .different = g.at("different").get<std::int64_t>(),
                .tied = g.at("tied").get<std::int64_t>(),
                .differences = {}};
    for (const Json& d : g.at("differences")) {
      r.greedy->differences.push_back(
          {d.at("sequence").get<std::int64_t>(), d.at("token").get<std::int64_t>(), number_from(d.at("gap"))});
    }
  }
}

/// The fields that say how similar requests were found, and what that did to quality.
void read_similarity(const Json& json, Record& r) {
  read_maybe(json.at("threshold"), r.threshold);
  r.fingerprint = text_from(json.at("fingerprint"));
  read_maybe(json.at("fingerprint_layer"), r.fingerprint_layer);
  r.centring = text_from(json.at("centring"));
  r.cache_layers = text_from(json.at("cache_layers"));
  r.eviction = text_from(json.at("eviction"));
  read_maybe(json.at("ttl_seconds"), r.ttl_seconds);
  read_maybe(json.at("shadow_rate"), r.shadow_rate);
  read_maybe(json.at("capacity_bytes"), r.capacity_bytes);
  if (!json.at("hit_rate_by_layer").is_null())
    r.hit_rate_by_layer = json["hit_rate_by_layer"].get<std::vector<double>>();
  r.task = task_from(json.at("task"));
  r.task_per_byte = task_from(json.at("task_per_byte"));
  r.recall = number_from(json.at("recall"));
  if (const Json& u = json.at("unsafe_served"); !u.is_null()) {
    r.unsafe_served = {.rate = rate_from(u), .unlabelled = u.at("unlabelled").get<std::int64_t>()};
  }
  if (!json.at("same_answer").is_null()) r.same_answer = rate_from(json["same_answer"]);
}

}  // namespace

Json to_json(const Record& r, const Versions& versions) {
  Json json = {
      {"model", r.model},
      {"weights", r.weights},
      {"workload", r.workload},
      {"mode", r.mode},
      {"fidelity", text(r.fidelity)},
      {"weights_held", r.weights_held},
      {"output", r.output},
      {"threshold", maybe(r.threshold)},
      {"fingerprint", text(r.fingerprint)},
      {"fingerprint_layer", maybe(r.fingerprint_layer)},
      {"centring", text(r.centring)},
      {"cache_layers", text(r.cache_layers)},
      {"eviction", text(r.eviction)},
      {"ttl_seconds", maybe(r.ttl_seconds)},
      {"shadow_rate", maybe(r.shadow_rate)},
      {"capacity_bytes", maybe(r.capacity_bytes)},
      {"threads", r.threads},
      {"requests", r.requests},
      {"requests_available", r.requests_available},
      {"filled", r.filled},
      {"fill_available", r.fill_available},
      {"sequences", r.sequences},
      {"tokens", r.tokens},
      {"tokens_computed_fraction", number(r.tokens_computed_fraction)},
      {"latency_ms", summary(r.latency_ms)},
      {"verification_ms", number(r.verification_ms)},
      {"speedup_vs_nocache", number(r.speedup_vs_nocache)},
      {"speedup_median", number(r.speedup_median)},
      {"speedup_vs_kvcache", number(r.speedup_vs_kvcache)},
      {"prefill_ms", maybe_summary(r.prefill_ms)},
      {"prefill_speedup_vs_nocache", number(r.prefill_speedup_vs_nocache)},
      {"prefill_speedup_vs_kvcache", number(r.prefill_speedup_vs_kvcache)},
      {"tokens_reused_fraction", number(r.tokens_reused_fraction)},
      {"tokens_shared_fraction", number(r.tokens_shared_fraction)},
      {"decode_ms", maybe_summary(r.decode_ms)},
      {"tokens_per_second", number(r.tokens_per_second)},
      {"later_turns", later_turns(r.later_turns)},
      {"greedy", greedy(r.greedy)},
      {"hit_rate", number(r.hit_rate)},
      {"hit_rate_by_layer", r.hit_rate_by_layer.empty() ? Json(nullptr) : Json(r.hit_rate_by_layer)},
      {"task", task(r.task)},
      {"task_per_byte", task(r.task_per_byte)},
      {"recall", number(r.recall)},
      {"unsafe_served", unsafe_served(r.unsafe_served)},
      {"same_answer", same_answer(r.same_answer)},
      {"divergence",
       {{"mean", number(r.divergence.mean)}, {"p95", number(r.divergence.p95)}, {"max", number(r.divergence.max)}}},
      {"cache_bytes", r.cache_bytes},
      {"zipf", maybe(r.zipf)},
      {"shuffle", maybe(r.shuffle)},
      {"note", text(r.note)},
      {"source", r.source},
      {"versions",
       {{"llmcache", versions.llmcache},
        {"torch", versions.torch},
        {"compiler", versions.compiler},
        {"model_torch", text(r.model_torch)},
        {"model_transformers", text(r.model_transformers)}}}};
  json["observed_error"] = observed_error(r.observed_error);
  write_budget(r.budget, json);
  return json;
}

Record record_from_json(const Json& json) {
  Record r;
  r.model = json.at("model").get<std::string>();
  r.weights = json.at("weights").get<std::string>();
  r.workload = json.at("workload").get<std::string>();
  r.mode = json.at("mode").get<std::string>();
  r.fidelity = text_from(json.at("fidelity"));
  r.weights_held = json.at("weights_held").get<std::string>();
  r.output = json.at("output").get<std::string>();
  r.threads = json.at("threads").get<int>();
  r.requests = json.at("requests").get<std::int64_t>();
  r.requests_available = json.at("requests_available").get<std::int64_t>();
  r.filled = json.at("filled").get<std::int64_t>();
  r.fill_available = json.at("fill_available").get<std::int64_t>();
  r.sequences = json.at("sequences").get<std::int64_t>();
  read_similarity(json, r);
  read_budget(json, r);
  r.tokens = json.at("tokens").get<std::int64_t>();
  r.tokens_computed_fraction = number_from(json.at("tokens_computed_fraction"));
  r.latency_ms = summary_from(json.at("latency_ms"));
  r.verification_ms = number_from(json.at("verification_ms"));
  r.speedup_vs_nocache = number_from(json.at("speedup_vs_nocache"));
  r.speedup_median = number_from(json.at("speedup_median"));
  read_decoding(json, r);
  r.hit_rate = number_from(json.at("hit_rate"));
  const Json& divergence = json.at("divergence");
  r.divergence = {.mean = number_from(divergence.at("mean")),
                  .p95 = number_from(divergence.at("p95")),
                  .max = number_from(divergence.at("max"))};
  r.cache_bytes = json.at("cache_bytes").get<std::int64_t>();
  if (!json.at("zipf").is_null()) r.zipf = json.at("zipf").get<double>();
  if (!json.at("shuffle").is_null()) r.shuffle = json.at("shuffle").get<std::uint64_t>();
  r.note = text_from(json.at("note"));
  r.source = json.at("source").get<std::string>();
  r.model_torch = text_from(json.at("versions").at("model_torch"));
  r.model_transformers = text_from(json.at("versions").at("model_transformers"));
  return r;
}

Json results_json(const Machine& machine, const Versions& versions, const std::string& command,
                  const std::vector<Record>& records) {
  Json list = Json::array();
  for (const Record& record : records) list.push_back(to_json(record, versions));
  return {{"schema", 1},
          {"machine", {{"cpu", machine.cpu}, {"cores", machine.cores}, {"memory_gib", number(machine.memory_gib)}}},
          {"command", command},
          {"records", std::move(list)}};
}

void write_atomically(const std::filesystem::path& path, const std::string& content) {
  std::filesystem::path temporary = path;
  temporary += fmt::format(".{}.tmp", ::getpid());
  std::error_code error;
  {
    std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
    out << content;
    out.flush();
    if (!out) {
      std::filesystem::remove(temporary, error);
      throw Failure(fmt::format("{}: cannot be written; check folder, permissions and space", path.string()));
    }
  }
  std::filesystem::rename(temporary, path, error);
  if (error) {
    const std::string reason = error.message();
    std::filesystem::remove(temporary, error);
    throw Failure(fmt::format("{}: cannot be written ({})", path.string(), reason));
  }
}

}  // namespace llmcache::bench
