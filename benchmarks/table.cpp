#include "table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace llmcache::bench {
namespace {

constexpr double kMiB = 1024.0 * 1024.0;

/// "-" where nothing was measured.
std::string number(double value, int digits) { return std::isnan(value) ? "-" : fmt::format("{:.{}f}", value, digits); }

std::string small(double value) {
  if (std::isnan(value)) return "-";
  return value == 0 ? "0" : fmt::format("{:.1e}", value);
}

bool random_weights(const std::string& weights) { return weights.starts_with("random"); }

std::string workload_name(const Record& record) {
  return record.zipf ? fmt::format("{} (zipf {:g})", record.workload, *record.zipf) : record.workload;
}

}  // namespace

Table::Table(std::vector<std::string> headers, std::size_t left) : rows_{std::move(headers)}, left_(left) {}

void Table::add(std::vector<std::string> cells) {
  cells.resize(rows_[0].size());
  rows_.push_back(std::move(cells));
}

std::string Table::text() const {
  std::vector<std::size_t> widths(rows_[0].size(), 0);
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += i < left_ ? fmt::format("{:<{}}  ", row[i], widths[i]) : fmt::format("{:>{}}  ", row[i], widths[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string results_table(const std::vector<Record>& records) {
  Table table({"model", "weights", "workload", "mode", "requests", "sequences", "computed", "mean ms", "p50", "p95",
               "p99", "speedup", "hits", "divergence", "largest", "cache MiB"},
              4);
  for (const Record& r : records) {
    table.add({r.model, random_weights(r.weights) ? "random weights" : r.weights, workload_name(r),
               r.fidelity.empty() ? r.mode : fmt::format("{}/{}", r.mode, r.fidelity),
               fmt::format("{}/{}", r.requests, r.requests_available), fmt::format("{}", r.sequences),
               number(r.tokens_computed_fraction, 3), number(r.latency_ms.mean, 2), number(r.latency_ms.p50, 2),
               number(r.latency_ms.p95, 2), number(r.latency_ms.p99, 2), number(r.speedup_vs_nocache, 2),
               number(100 * r.hit_rate, 1) + "%", small(r.divergence.mean), small(r.divergence.max),
               number(static_cast<double>(r.cache_bytes) / kMiB, 1)});
  }
  return table.text();
}

std::string wrap_table(const std::vector<WrapCost>& costs) {
  Table table(
      {"wrapped", "weights", "runs", "wrap ms", "resident before MiB", "after", "difference", "model's weights MiB"},
      3);
  for (const WrapCost& c : costs) {
    const auto mib = [](std::int64_t bytes) { return number(static_cast<double>(bytes) / kMiB, 1); };
    table.add({c.model, random_weights(c.weights) ? "random weights" : c.weights, c.granularity, number(c.wrap_ms, 0),
               mib(c.resident_before), mib(c.resident_after), mib(c.resident_after - c.resident_before),
               mib(c.weight_bytes)});
  }
  std::string text = table.text();
  for (const WrapCost& c : costs) {
    for (const std::string& note : c.notes) text += fmt::format("{}: {}\n", c.model, note);
  }
  return text;
}

}  // namespace llmcache::bench
