// What the command lines of the benchmark's programs have in common.
#pragma once

#include <functional>
#include <string>

namespace CLI {
class App;
}

namespace llmcache::bench {

/// Nothing to do: help was asked for and is in `text`.
struct HelpAsked {
  std::string text;
};

/// Throws Failure for a bad command line, HelpAsked for --help and --version.
void parse(CLI::App& app, int argc, const char* const* argv);

/// Runs a program; prints help that was asked for, and an error as one line on stderr. Returns the exit status: that of
/// `run`, or 2 after an error.
int run_program(const char* name, const std::function<int()>& run);

void complain(const char* name, const std::string& text);

}  // namespace llmcache::bench
