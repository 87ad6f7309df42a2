// llmcache-bench: see arguments.cpp for what it does, or --help.
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "arguments.h"
#include "failure.h"
#include "runner.h"
#include "selection.h"
#include "table.h"

namespace {

using namespace llmcache::bench;

constexpr int kFailed = 2;

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

void complain(const std::string& text) { std::fputs(fmt::format("llmcache-bench: error: {}\n", text).c_str(), stderr); }

/// Finds out before measuring, not after, that the results cannot be written.
void check_target(const std::filesystem::path& path) {
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  if (!std::filesystem::is_directory(folder) || std::filesystem::is_directory(path)) {
    throw Failure(fmt::format("--json {}: the folder is missing, or the name is a folder's", path.string()));
  }
}

int bench(int argc, char** argv) {
  const Arguments arguments = parse_arguments(argc, argv);
  if (arguments.list) {
    print(list_files(arguments));
    return 0;
  }
  if (arguments.json) check_target(*arguments.json);
  const auto selected = select(arguments);
  const Results results = run(arguments, selected);
  const Machine machine = this_machine();
  if (!results.records.empty()) {
    const std::string batch = arguments.batch ? fmt::format(" batches of {};", *arguments.batch) : "";
    print(fmt::format("{}, {} cores, {:.1f} GiB; {} {};{} LibTorch {}, {}, LLMCache {}\n\n", machine.cpu, machine.cores,
                      machine.memory_gib, arguments.threads, arguments.threads == 1 ? "thread" : "threads", batch,
                      versions().torch, versions().compiler, versions().llmcache));
    print(results_table(results.records));
    if (const std::string list = greedy_list(results.records); !list.empty()) {
      print(fmt::format("\nTokens that do not come out on top as in nocache:\n{}", list));
    }
    if (!results.wraps.empty()) print(fmt::format("\n{}", wrap_table(results.wraps)));
    std::fflush(stdout);
  }
  if (arguments.json && !results.records.empty()) {
    const auto document = results_json(machine, versions(), arguments.command, results.records);
    write_atomically(*arguments.json, document.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }
  for (const std::string& failure : results.failures) complain(failure);
  return results.failures.empty() ? 0 : kFailed;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return bench(argc, argv);
  } catch (const HelpAsked& help) {
    print(help.text);
    return 0;
  } catch (const std::exception& error) {
    complain(error.what());
    return kFailed;
  }
}
