// llmcache-trace: see trace_report.cpp for what it does, or --help.
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <nlohmann/json.hpp>

#include "files.h"
#include "trace.h"
#include "trace_report.h"

namespace {

using namespace llmcache::bench;

int trace_main(int argc, char** argv) {
  const TraceArguments arguments = parse_trace_arguments(argc, argv);
  const Trace trace = read_trace(arguments.trace, arguments.limit);
  const auto results = replay_all(trace, arguments);
  std::fputs(trace_text(trace, arguments, results).c_str(), stdout);
  std::fflush(stdout);
  if (arguments.json) write_json(*arguments.json, trace_json(trace, arguments, results));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return trace_main(argc, argv);
  } catch (const TraceHelpAsked& help) {
    std::fputs(help.text.c_str(), stdout);
    return 0;
  } catch (const std::exception& error) {
    std::fputs(fmt::format("llmcache-trace: error: {}\n", error.what()).c_str(), stderr);
    return 2;
  }
}
