// llmcache-bench: see README.md for what it does, or --help.
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "command_line.h"
#include "config.h"
#include "failure.h"
#include "files.h"
#include "runner.h"
#include "selection.h"
#include "table.h"

namespace {

using namespace llmcache::bench;

constexpr const char* kName = "llmcache-bench";

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

/// Finds out before measuring, not after, that the results cannot be written.
void check_target(const std::filesystem::path& path) {
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  if (!std::filesystem::is_directory(folder) || std::filesystem::is_directory(path)) {
    throw Failure(fmt::format("--json {}: the folder is missing, or the name is a folder's", path.string()));
  }
}

void print_results(const Results& results, const Machine& machine, const Settings& settings) {
  const Versions& versions = results.records.front().versions;
  const std::string batch = settings.batch ? fmt::format(" batches of {};", *settings.batch) : "";
  print(fmt::format("{}, {} cores, {:.1f} GiB; {} {};{} LibTorch {}, {}, LLMCache {}\n\n", machine.cpu, machine.cores,
                    machine.memory_gib, settings.threads, settings.threads == 1 ? "thread" : "threads", batch,
                    versions.torch, versions.compiler, versions.llmcache));
  print(results_table(results.records));
  if (const std::string list = greedy_list(results.records); !list.empty()) {
    print(fmt::format("\nTokens that do not come out on top as in nocache:\n{}", list));
  }
  if (!results.wraps.empty()) print(fmt::format("\n{}", wrap_table(results.wraps)));
  std::fflush(stdout);
}

int bench(int argc, char** argv) {
  const Command command = parse_command(argc, argv);
  const Settings& settings = command.configuration.settings;
  if (command.list || command.schema || command.needs) {
    print(command.list     ? list_files(settings)
          : command.schema ? results_schema().dump(1) + "\n"
                           : needs_text(command.configuration));
    return 0;
  }
  if (settings.json) check_target(*settings.json);
  const Results results = run(command.configuration, select(command.configuration));
  if (!results.records.empty()) {
    const Machine machine = this_machine();
    print_results(results, machine, settings);
    if (settings.json) write_json(*settings.json, results_json(machine, command.text, results.records));
  }
  for (const std::string& failure : results.failures) complain(kName, failure);
  return results.failures.empty() ? 0 : 2;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kName, [&] { return bench(argc, argv); });
}
