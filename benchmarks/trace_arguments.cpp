#include "trace_arguments.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <system_error>

#include "failure.h"
#include "llmcache/error.h"
#include "llmcache/version.h"

namespace llmcache::bench {
namespace {

constexpr const char* kTraceFile = "traces/mooncake_conversation.jsonl";

constexpr const char* kDescription =
    "llmcache-trace: replays a recorded trace of requests against a bank of prefix blocks, without a model, and "
    "prints\n"
    "what each eviction policy would have reused at each capacity, beside the best that any policy could.";

constexpr const char* kFooter = R"(
The trace
  One JSON object a line with "timestamp" (milliseconds) and "hash_ids": the prompt as a list of block numbers, where a
  number stands for all tokens up to the end of its block. Other fields are not looked at. The default is the
  conversation trace of Mooncake (Qin et al., FAST 2025; blocks of 512 tokens), traces/mooncake_conversation.jsonl in
  the folder that LLMCACHE_RAW_DATA names, else in a folder shared/data somewhere above this program.

How it measures
  hit        a block that is held, with all blocks before it, when its request comes. A request's blocks are then used
             or inserted, the last first. While more than the capacity are held, the policy's victim goes. The bank
             starts empty, and nothing is left out as warm-up.
  saved      the same hits, weighted by what they save: a block costs 1, and 1/52 more for each block before it, as for
             a decoder of 7e9 parameters, whose attention costs as much as its matrices at 52 * 512 tokens.
  time       the trace's timestamps.
  no limit   what a bank that never evicts would reuse.

Policies
  lru        least recently used.
  decay      least used, where a use counts half after each --half-life.
  s3fifo     S3-FIFO (Yang et al., SOSP 2023), with the paper's settings unless given otherwise.
  gdsf       Greedy-Dual-Size-Frequency (Cherkasova, 1998): uses * cost / size, with ageing. A block's cost is the mean
             of its request's blocks; sizes are equal.
  belady     MIN (Belady, 1966): evicts the block that is needed again last. It knows the future: the most hits possible.

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
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  auto folder = error ? std::filesystem::current_path() : program.parent_path();
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

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForVersion&) {
    throw TraceHelpAsked{app.version() + "\n"};
  } catch (const CLI::CallForHelp&) {
    throw TraceHelpAsked{app.help()};
  } catch (const CLI::ParseError& error) {
    throw Failure(fmt::format("{}; llmcache-trace --help lists the options", error.what()));
  }
  try {
    arguments.eviction.validate();
  } catch (const Error& error) {
    throw Failure(fmt::format("{}; llmcache-trace --help lists the options", error.what()));
  }
  if (arguments.trace.empty()) arguments.trace = default_trace();
  return arguments;
}

}  // namespace llmcache::bench
