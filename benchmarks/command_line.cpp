#include "command_line.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "failure.h"

namespace llmcache::bench {

void parse(CLI::App& app, int argc, const char* const* argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForVersion&) {
    throw HelpAsked{app.version() + "\n"};
  } catch (const CLI::CallForHelp&) {
    throw HelpAsked{app.help()};
  } catch (const CLI::ParseError& error) {
    throw Failure(fmt::format("{}; {} --help lists the options", error.what(), app.get_name()));
  }
}

int run_program(const char* name, const std::function<int()>& run) {
  try {
    return run();
  } catch (const HelpAsked& help) {
    std::fputs(help.text.c_str(), stdout);
    return 0;
  } catch (const std::exception& error) {
    complain(name, error.what());
    return 2;
  }
}

void complain(const char* name, const std::string& text) { fmt::print(stderr, "{}: error: {}\n", name, text); }

}  // namespace llmcache::bench
