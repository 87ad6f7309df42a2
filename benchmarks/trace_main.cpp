// llmcache-trace: see trace.cpp for what it does, or --help.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "files.h"
#include "trace.h"

int main(int argc, char** argv) {
  using namespace llmcache::bench;
  return run_program("llmcache-trace", [&] {
    const TraceArguments arguments = parse_trace_arguments(argc, argv);
    const Trace trace = read_trace(arguments.trace, arguments.limit);
    const auto results = replay_all(trace, arguments);
    std::fputs(trace_text(trace, arguments, results).c_str(), stdout);
    std::fflush(stdout);
    if (arguments.json) write_json(*arguments.json, trace_json(trace, arguments, results));
    return 0;
  });
}
