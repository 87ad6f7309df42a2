#include "trace_report.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <system_error>

#include "command_line.h"
#include "failure.h"
#include "files.h"
#include "llmcache/error.h"
#include "llmcache/version.h"
#include "table.h"

namespace llmcache::bench {
namespace {

constexpr const char* kTraceFile = "traces/mooncake_conversation.jsonl";

constexpr const char* kDescription =
    "llmcache-trace: replays a recorded trace of requests against a bank of prefix blocks, without a model, and "
    "prints\n"
    "what each eviction policy would have reused at each capacity, beside the best that any policy could.";

constexpr const char* kFooter = R"(
benchmarks/README.md explains the trace, how it measures, and the policies.

Exit status: 0, or 2 after an error, which is one line on stderr.

Examples
  llmcache-trace
  llmcache-trace --policy lru,s3fifo --capacity 1000,5000 --json trace.json
  llmcache-trace --policy s3fifo --ghost-share 5
  llmcache-trace --trace mine.jsonl --limit 1000
)";

CLI::Validator number_between(double low, double high) { return CLI::Range(low, high).description(""); }

/// $LLMCACHE_RAW_DATA, else shared/data in a folder above the program.
std::filesystem::path default_trace() {
  const char* variable = std::getenv("LLMCACHE_RAW_DATA");
  if (variable != nullptr && *variable != '\0') {
    auto path = std::filesystem::path(variable) / kTraceFile;
    if (std::filesystem::is_regular_file(path)) return path;
    throw Failure(fmt::format(
        "{} is not there, where LLMCACHE_RAW_DATA points; mend that, or name a trace with --trace", path.string()));
  }
  std::error_code error;
  auto folder = program_folder();
  for (;; folder = folder.parent_path()) {
    auto path = folder / "shared" / "data" / kTraceFile;
    if (std::filesystem::is_regular_file(path, error)) return path;
    if (folder == folder.parent_path()) break;
  }
  throw Failure(
      fmt::format("no trace: {} was found in no folder shared/data above the program; set LLMCACHE_RAW_DATA to the "
                  "folder with the raw data sets, or name a trace with --trace",
                  kTraceFile));
}

std::string matrix(const std::string& title, const TraceArguments& arguments, const std::vector<TraceResult>& results,
                   double (Replay::*rate)() const, double unbounded) {
  std::vector<std::string> headers = {title};
  for (const std::int64_t capacity : arguments.capacities) headers.push_back(fmt::format("{}", capacity));
  Table table(headers, 1);
  auto result = results.begin();
  for (const std::string& policy : arguments.policies) {
    std::vector<std::string> cells = {policy};
    for (std::size_t i = 0; i < arguments.capacities.size(); ++i, ++result) {
      cells.push_back(fmt::format("{:.4f}", (result->replay.*rate)()));
    }
    table.add(cells);
  }
  std::vector<std::string> cells(arguments.capacities.size() + 1, fmt::format("{:.4f}", unbounded));
  cells[0] = "no limit";
  table.add(cells);
  return table.text();
}

}  // namespace

TraceArguments parse_trace_arguments(int argc, const char* const* argv) {
  constexpr std::size_t kNameColumn = 30;
  constexpr double kMost = 1e12;
  TraceArguments arguments;
  S3FifoPolicy::Config& s3_fifo = arguments.eviction.s3_fifo;

  CLI::App app(kDescription, "llmcache-trace");
  app.footer(kFooter);
  app.get_formatter()->column_width(kNameColumn);
  app.set_version_flag("--version", "llmcache-trace " LLMCACHE_VERSION);
  app.add_option("--trace", arguments.trace, "the trace [Mooncake's, see below]")->type_name("FILE");
  app.add_option("--policy", arguments.policies, "which policies [lru,decay,s3fifo,gdsf,belady]")
      ->delimiter(',')
      ->check(CLI::IsMember({"lru", "decay", "s3fifo", "gdsf", kBelady}).description(""))
      ->type_name("NAME");
  app.add_option("--capacity", arguments.capacities, "capacities in blocks [1000,5000,10000,50000]")
      ->delimiter(',')
      ->check(number_between(1, kMost))
      ->type_name("N");
  app.add_option(
         "--half-life", arguments.eviction.decay.half_life_s,
         fmt::format("decay: seconds after which a use counts half [{:g}]", arguments.eviction.decay.half_life_s))
      ->type_name("S");
  app.add_option("--small-share", s3_fifo.small_share,
                 fmt::format("s3fifo: share of the small queue, 0 to 1 [{:g}]", s3_fifo.small_share))
      ->type_name("X");
  app.add_option("--ghost-share", s3_fifo.ghost_share,
                 fmt::format("s3fifo: evicted blocks remembered for each block held [{:g}]", s3_fifo.ghost_share))
      ->type_name("X");
  app.add_option(
         "--hits-to-stay", s3_fifo.hits_to_stay,
         fmt::format("s3fifo: hits in the small queue that lead to the main one, 1 to 3 [{}]", s3_fifo.hits_to_stay))
      ->check(number_between(1, 3))
      ->type_name("N");
  app.add_option("--limit", arguments.limit, "requests of the trace, from its start [all]")
      ->check(number_between(1, kMost))
      ->type_name("N");
  app.add_option("--json", arguments.json, "write the results to this file")->type_name("FILE");

  parse(app, argc, argv);
  try {
    arguments.eviction.validate();
  } catch (const Error& error) {
    throw Failure(fmt::format("{}; llmcache-trace --help lists the options", error.what()));
  }
  if (arguments.trace.empty()) arguments.trace = default_trace();
  return arguments;
}

std::vector<TraceResult> replay_all(const Trace& trace, const TraceArguments& arguments) {
  std::vector<TraceResult> results;
  for (const std::string& policy : arguments.policies) {
    for (const std::int64_t capacity : arguments.capacities) {
      const auto blocks = static_cast<std::uint64_t>(capacity);
      EvictionOptions options = arguments.eviction;
      if (policy != kBelady) options.policy = eviction_from_string(policy);
      results.push_back(
          {policy, capacity, policy == kBelady ? replay_belady(trace, blocks) : replay(trace, blocks, options)});
    }
  }
  return results;
}

std::string trace_text(const Trace& trace, const TraceArguments& arguments, const std::vector<TraceResult>& results) {
  const Replay unbounded = replay_unbounded(trace);
  return fmt::format("{}: {} requests, {} blocks, {} different ones\n\n{}\n{}", arguments.trace.string(),
                     trace.requests.size(), trace.blocks, trace.distinct,
                     matrix("hit rate at capacity", arguments, results, &Replay::hit_rate, unbounded.hit_rate()),
                     matrix("saved at capacity", arguments, results, &Replay::saved_rate, unbounded.saved_rate()));
}

nlohmann::ordered_json trace_json(const Trace& trace, const TraceArguments& arguments,
                                  const std::vector<TraceResult>& results) {
  const Replay unbounded = replay_unbounded(trace);
  nlohmann::ordered_json json;
  json["trace"] = arguments.trace.filename().string();
  json["requests"] = trace.requests.size();
  json["blocks"] = trace.blocks;
  json["distinct_blocks"] = trace.distinct;
  json["unbounded_hit_rate"] = unbounded.hit_rate();
  json["unbounded_saved_rate"] = unbounded.saved_rate();
  json["settings"] = {{"half_life_s", arguments.eviction.decay.half_life_s},
                      {"small_share", arguments.eviction.s3_fifo.small_share},
                      {"ghost_share", arguments.eviction.s3_fifo.ghost_share},
                      {"hits_to_stay", arguments.eviction.s3_fifo.hits_to_stay}};
  json["results"] = nlohmann::ordered_json::array();
  for (const TraceResult& result : results) {
    json["results"].push_back({{"policy", result.policy},
                               {"capacity", result.capacity},
                               {"hit_rate", result.replay.hit_rate()},
                               {"saved_rate", result.replay.saved_rate()},
                               {"evictions", result.replay.evictions}});
  }
  return json;
}

}  // namespace llmcache::bench
