// The command line of llmcache-bench.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace llmcache::bench {

struct Arguments {
  std::vector<std::string> models;     ///< names or paths; empty: all found
  std::vector<std::string> workloads;  ///< names; empty: all that fit
  std::vector<std::string> modes = {"nocache", "llmcache"};
  std::string fidelity = "lossless";
  std::string tokenizer;  ///< for models without sidecar
  int threads = 1;
  std::optional<std::int64_t> limit;
  std::optional<double> seconds;
  std::optional<std::uint64_t> shuffle;
  std::optional<double> zipf;
  std::int64_t capacity_mib = 256;
  std::filesystem::path models_folder;
  std::filesystem::path data_folder;
  std::optional<std::filesystem::path> json;
  bool list = false;
  std::string command;  ///< as typed, the program by its name only

  [[nodiscard]] bool has_mode(const std::string& mode) const;
};

/// Nothing to do: help was asked for and is in `text`.
struct HelpAsked {
  std::string text;
};

/// Throws Failure for a bad command line, HelpAsked for --help and --version.
Arguments parse_arguments(int argc, const char* const* argv);

/// Folder of the running program.
std::filesystem::path program_folder();

}  // namespace llmcache::bench
