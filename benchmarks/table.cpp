#include "table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <set>
#include <utility>

namespace llmcache::bench {
namespace {

constexpr double kMiB = 1024.0 * 1024.0;

std::string mebibytes(std::int64_t bytes) { return fmt::format("{:.1f}", static_cast<double>(bytes) / kMiB); }

/// "-" where nothing was measured.
std::string number(double value, int digits) { return std::isnan(value) ? "-" : fmt::format("{:.{}f}", value, digits); }

std::string small(double value) {
  if (std::isnan(value)) return "-";
  return value == 0 ? "0" : fmt::format("{:.1e}", value);
}

/// "llmcache/threshold 0.90", "semantic-cache 0.90", "llmcache/lossless packed-fp16", "kvcache", and the capacity in
/// MiB if there are several in one table.
std::string mode_name(const Record& r, bool with_capacity, bool with_eviction) {
  std::string name = r.fidelity.empty() || r.mode == "kvcache" ? r.mode : fmt::format("{}/{}", r.mode, r.fidelity);
  if (r.weights_held != "as-loaded") name += " " + r.weights_held;
  if (!r.weights_sample.empty()) name += " tuned";
  if (r.budget) name += fmt::format(" {:g}{}", r.budget->epsilon, r.budget->cache_free ? " cache-free" : "");
  if (r.budget && r.budget->calibration_part) name += fmt::format(" part {}", *r.budget->calibration_part);
  if (r.threshold) name += fmt::format(" {:.2f}", *r.threshold);
  if (with_eviction && !r.eviction.empty()) name += " " + r.eviction;
  if (with_capacity && r.capacity_bytes) {
    name += fmt::format(" {:g} MiB", static_cast<double>(*r.capacity_bytes) / kMiB);
  }
  return name;
}

/// True if the records that have the field differ in it.
bool varies(const std::vector<Record>& records, const std::function<std::string(const Record&)>& field) {
  std::set<std::string> values;
  for (const Record& r : records) values.insert(field(r));
  values.erase("");
  return values.size() > 1;
}

/// The last columns: "accuracy 92.9 -> 91.7%, -1.2 [-1.9, -0.6]".
std::string quality(const Record& r) {
  if (r.random_weights()) return "divergence only";
  std::string text;
  for (const auto& t : {r.task, r.second_task}) {
    if (!t) continue;
    const bool percent = t->metric != "perplexity" && t->metric != "answer_nll" && t->metric != "spearman";
    const double scale = percent ? 100 : 1;
    const int digits = percent ? 1 : 3;
    text += fmt::format("{}{} {}{}", text.empty() ? "" : "; ", t->metric, number(scale * t->value, digits),
                        percent ? "%" : "");
    if (r.mode == "nocache" || std::isnan(t->change)) continue;
    text += fmt::format(", {:+.{}f} [{:+.{}f}, {:+.{}f}]", scale * t->change, digits, scale * t->ci95.low, digits,
                        scale * t->ci95.high, digits);
  }
  const auto rate = [&](const char* name, const Rate& value) {
    if (value.of == 0) return;
    text += fmt::format("{}{} {:.1f}% [{:.1f}, {:.1f}]", text.empty() ? "" : ", ", name, 100 * value.rate,
                        100 * value.ci95.low, 100 * value.ci95.high);
  };
  if (!std::isnan(r.recall)) text += fmt::format(", recall {:.1f}%", 100 * r.recall);
  if (r.unsafe_served) rate("unsafe", r.unsafe_served->rate);
  rate("same answer", r.same_answer.value_or(Rate()));
  return text.empty() ? "-" : text;
}

std::string weights_name(const std::string& weights) {
  return weights.starts_with("random") ? "random weights" : weights;
}

std::string workload_name(const Record& record) {
  return record.shuffle ? record.workload + " (shuffled)" : record.workload;
}

std::string percent(double value) { return std::isnan(value) ? "-" : number(100 * value, 1) + "%"; }

/// "1234/1234", "1230/1234 (4 tied)".
std::string greedy_text(const std::optional<GreedyResult>& result) {
  if (!result) return "-";
  std::string text = fmt::format("{}/{}", result->compared - result->different, result->compared);
  if (result->tied > 0) text += fmt::format(" ({} tied)", result->tied);
  return text;
}

/// "0.0104 [0.0064, 0.0168]"
std::string error(const std::optional<ObservedError>& e) {
  if (!e) return "-";
  return fmt::format("{} [{}, {}]", number(e->rate, 4), number(e->ci95.low, 4), number(e->ci95.high, 4));
}

std::string ms(const std::optional<Summary>& times) { return number(times ? times->mean : kNotMeasured, 2); }

constexpr std::size_t kLeftColumns = 5;

struct Column {
  const char* header;
  std::function<std::string(const Record&)> cell;
};

std::vector<Column> columns_of(bool capacities, bool evictions) {
  const LaterTurns none;
  return {
      {"model", [](const Record& r) { return r.model; }},
      {"weights", [](const Record& r) { return weights_name(r.weights); }},
      {"workload", workload_name},
      {"mode", [=](const Record& r) { return mode_name(r, capacities, evictions); }},
      {"quality", quality},
      {"speedup", [](const Record& r) { return number(r.speedup_vs_nocache, 2); }},
      {"promised", [](const Record& r) { return number(r.budget ? r.budget->promised : kNotMeasured, 4); }},
      {"error", [](const Record& r) { return error(r.observed_error); }},
      {"hits", [](const Record& r) { return percent(r.hit_rate); }},
      {"requests", [](const Record& r) { return fmt::format("{}/{}", r.requests, r.requests_available); }},
      {"filled",
       [](const Record& r) { return r.fill_available == 0 ? "-" : fmt::format("{}/{}", r.filled, r.fill_available); }},
      {"sequences", [](const Record& r) { return fmt::format("{}", r.sequences); }},
      {"computed", [](const Record& r) { return number(r.tokens_computed_fraction, 3); }},
      {"mean ms", [](const Record& r) { return number(r.latency_ms.mean, 2); }},
      {"p50", [](const Record& r) { return number(r.latency_ms.p50, 2); }},
      {"p95", [](const Record& r) { return number(r.latency_ms.p95, 2); }},
      {"p99", [](const Record& r) { return number(r.latency_ms.p99, 2); }},
      {"prefill ms", [](const Record& r) { return ms(r.prefill_ms); }},
      {"vs nocache", [](const Record& r) { return number(r.prefill_speedup_vs_nocache, 2); }},
      {"vs kvcache", [](const Record& r) { return number(r.prefill_speedup_vs_kvcache, 2); }},
      {"reused", [](const Record& r) { return percent(r.tokens_reused_fraction); }},
      {"shared", [](const Record& r) { return percent(r.tokens_shared_fraction); }},
      {"decode ms", [](const Record& r) { return ms(r.decode_ms); }},
      {"tokens/s", [](const Record& r) { return number(r.tokens_per_second, 1); }},
      {"later turns: ms", [=](const Record& r) { return ms(r.later_turns.value_or(none).prefill_ms); }},
      {"vs kvcache ", [=](const Record& r) { return number(r.later_turns.value_or(none).speedup_vs_kvcache, 2); }},
      {"greedy", [](const Record& r) { return greedy_text(r.greedy); }},
      {"divergence", [](const Record& r) { return small(r.divergence.mean); }},
      {"largest", [](const Record& r) { return small(r.divergence.max); }},
      {"cache MiB", [](const Record& r) { return mebibytes(r.cache_bytes); }},
  };
}

}  // namespace

Table::Table(std::vector<std::string> headers, std::size_t left) : rows_{std::move(headers)}, left_(left) {}

void Table::add(std::vector<std::string> cells) {
  cells.resize(rows_[0].size());
  rows_.push_back(std::move(cells));
}

std::string Table::text() const {
  std::vector<std::size_t> widths(rows_[0].size(), 0);
  for (std::size_t i = 0; i < widths.size(); ++i) {
    const auto filled = [i](const auto& row) { return !row[i].empty() && row[i] != "-"; };
    if (std::none_of(rows_.begin() + 1, rows_.end(), filled)) continue;  // 0: it is left out
    for (const auto& row : rows_) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (widths[i] == 0) continue;
      line += i < left_ ? fmt::format("{:<{}}  ", row[i], widths[i]) : fmt::format("{:>{}}  ", row[i], widths[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string results_table(const std::vector<Record>& records) {
  const bool capacities =
      varies(records, [](const Record& r) { return r.capacity_bytes ? std::to_string(*r.capacity_bytes) : ""; });
  const bool evictions = varies(records, [](const Record& r) { return r.eviction; });
  const auto columns = columns_of(capacities, evictions);
  std::vector<std::string> headers;
  for (const Column& column : columns) headers.emplace_back(column.header);
  Table table(headers, kLeftColumns);
  for (const Record& r : records) {
    std::vector<std::string> cells;
    for (const Column& column : columns) cells.push_back(column.cell(r));
    table.add(std::move(cells));
  }
  return table.text();
}

std::string greedy_list(const std::vector<Record>& records) {
  std::string text;
  for (const Record& r : records) {
    if (r.weights_held != "as-loaded") continue;
    const GreedyResult greedy = r.greedy.value_or(GreedyResult());
    for (const GreedyDifference& d : greedy.differences) {
      text +=
          fmt::format("{} on {}, {}: sequence {}, token {}: {:.1e} below nocache's best{}\n", r.model, workload_name(r),
                      mode_name(r, false, false), d.sequence, d.token, d.gap, d.gap <= kTiedLogits ? " (tied)" : "");
    }
  }
  return text;
}

std::string wrap_table(const std::vector<WrapCost>& costs) {
  Table table({"wrapped", "weights", "held", "runs", "saved profile", "wrap ms", "resident before MiB", "after",
               "difference", "model's weights MiB", "packed MiB"},
              5);
  for (const WrapCost& c : costs) {
    table.add({c.model, weights_name(c.weights), c.held, c.granularity, c.saved_profile, number(c.wrap_ms, 0),
               mebibytes(c.resident_before), mebibytes(c.resident_after),
               mebibytes(c.resident_after - c.resident_before), mebibytes(c.weight_bytes),
               c.packed_bytes > 0 ? mebibytes(c.packed_bytes) : "-"});
  }
  std::string text = table.text();
  for (const WrapCost& c : costs) {
    for (const std::string& note : c.notes) text += fmt::format("{}: {}\n", c.model, note);
  }
  return text;
}

}  // namespace llmcache::bench
