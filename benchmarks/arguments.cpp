#include "arguments.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <system_error>

#include "failure.h"
#include "llmcache/version.h"

namespace llmcache::bench {
namespace {

constexpr std::size_t kNameColumn = 30;

constexpr const char* kDescription =
    "llmcache-bench: runs recorded requests through a model, plain and wrapped in LLMCache, side by side in one\n"
    "process, and reports latency, speedup, hit rate, divergence from the plain model's outputs, and memory.\n"
    "\n"
    "Without options it runs every full-size model on every workload made for its tokenizer (but the small 'sample'\n"
    "where others exist) and ends in under 10 minutes.";

constexpr const char* kFooter = R"(
How it measures
  nocache    the TorchScript module as loaded, on the padded batch, without gradients.
  llmcache   llmcache::LayerCache around the same module: weights are shared, not loaded twice.
  Each request runs in all modes, one after the other, in an order that alternates from request to request. The first
  requests are run beforehand to warm up, and the cache is emptied after that. Latency is wall time per request.

Columns
  requests   run, of those in the stream; fewer where the time budget ended first.
  computed   tokens that went through the layers / real tokens; padding counts, so a plain padded batch is above 1.
  speedup    sum of nocache latencies / sum of this mode's latencies, over the same requests.
  hits       sequences answered from an identical earlier request / all sequences.
  divergence relative L2 distance of the real (not padding) outputs of a request from nocache's: mean and largest.
  cache MiB  held by the cache at the end.
The second table says what wrapping cost: time, and resident memory of the process before and after it beside the size of
the model's weights. 'runs' is what the model allows: whole layers, packed batches, or single tokens.

Files
  MODELS/NAME.pt, NAME.json            model and its description         (tools/export_models.py)
  DATA/WORKLOAD.TOKENIZER.safetensors  tokenized requests                (tools/prepare_data.py)

Exit status: 0, or 2 after an error, which is one line on stderr. Results that were measured are shown all the same.

Examples
  llmcache-bench --list
  llmcache-bench --model minilm --workload banking77 --seconds 20
  llmcache-bench --model gpt2,smollm2 --zipf 1.0 --shuffle 7 --json results.json
  llmcache-bench --model /models/mine.pt --tokenizer bert-base-uncased --mode nocache
)";

std::string command_text(int argc, const char* const* argv) {
  std::string text = std::filesystem::path(argv[0]).filename().string();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool quote = argument.empty() || argument.find_first_of(" \t\"'$*;&|<>()") != std::string::npos;
    text += quote ? fmt::format(" '{}'", argument) : " " + argument;
  }
  return text;
}

/// Breaks a description into lines that fit beside the names of the options.
std::string wrapped(const std::string& text) {
  constexpr std::size_t kWidth = 120 - kNameColumn;
  std::string lines;
  std::size_t used = 0;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    if (used > 0 && used + 1 + word.size() > kWidth) {
      lines += '\n';
      used = 0;
    } else if (used > 0) {
      lines += ' ';
      ++used;
    }
    lines += word;
    used += word.size();
  }
  return lines;
}

/// A number from `low` to `high`; unlike CLI::Range it refuses NaN.
CLI::Validator number_between(double low, double high) {
  return {[low, high](const std::string& text) {
            char* end = nullptr;
            const double value = std::strtod(text.c_str(), &end);
            const bool good = end != text.c_str() && *end == '\0' && value >= low && value <= high;
            return good ? std::string() : fmt::format("'{}' is not a number from {} to {}", text, low, high);
          },
          ""};
}

/// Digits only: a conversion to an unsigned number takes -1 for a large one.
CLI::Validator digits() {
  return {[](const std::string& text) {
            const bool good = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
            return good ? std::string() : fmt::format("'{}' is not a whole number, 0 or more", text);
          },
          ""};
}

}  // namespace

bool Arguments::has_mode(const std::string& mode) const {
  return std::find(modes.begin(), modes.end(), mode) != modes.end();
}

std::filesystem::path program_folder() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::filesystem::current_path() : program.parent_path();
}

Arguments parse_arguments(int argc, const char* const* argv) {
  Arguments arguments;
  arguments.command = command_text(argc, argv);
  arguments.models_folder = (program_folder() / ".." / "models").lexically_normal();
  arguments.data_folder = (program_folder() / ".." / "data").lexically_normal();

  CLI::App app(kDescription, "llmcache-bench");
  app.footer(kFooter);
  app.get_formatter()->column_width(kNameColumn);
  app.set_version_flag("--version", "llmcache-bench " LLMCACHE_VERSION);
  const auto list = [&](const char* name, std::vector<std::string>& target, const char* type, const char* help) {
    return app.add_option(name, target, help)->delimiter(',')->type_name(type);
  };
  list("--model", arguments.models, "NAME|PATH", "models by name, or paths of .pt files [all full-size models]");
  list("--workload", arguments.workloads, "NAME", "workloads by name [all made for the model's tokenizer]");
  list("--mode", arguments.modes, "MODE", "nocache, llmcache or both [nocache,llmcache]")
      ->check(CLI::IsMember({"nocache", "llmcache"}));
  app.add_option("--fidelity", arguments.fidelity,
                 "what llmcache may reuse: identical (whole outputs of identical requests, bit-identical) or lossless "
                 "(and padding is not computed; equal up to rounding) [lossless]")
      ->check(CLI::IsMember({"identical", "lossless"}))
      ->type_name("LEVEL");
  app.add_option("--threads", arguments.threads, "threads within an operator [1]; between operators always 1")
      ->check(number_between(1, 1024))
      ->type_name("N");
  app.add_option("--limit", arguments.limit, "requests of each workload [all that the time budget allows]")
      ->check(number_between(1, 1e12))
      ->type_name("N");
  app.add_option("--seconds", arguments.seconds,
                 "time budget of each model on each workload, warm-up included; one request always runs [with --limit: "
                 "none; otherwise 30, or less so that all together take 8 minutes]")
      ->check(number_between(1e-3, 1e6))
      ->type_name("S");
  app.add_option("--shuffle", arguments.shuffle,
                 "send requests in an order drawn with this seed [the file's order; workloads whose file is grouped by "
                 "label are always shuffled, with seed 0]")
      ->check(digits())
      ->type_name("SEED");
  app.add_option("--zipf", arguments.zipf,
                 "draw requests, with repeats, by a Zipf law with this exponent: the k-th request of the stream with "
                 "probability ~ 1/k^S, with the seed of --shuffle or 0 [each request once]")
      ->check(number_between(0, 10))
      ->type_name("S");
  app.add_option("--capacity-mib", arguments.capacity_mib, "capacity of the cache in MiB [256]")
      ->check(number_between(0, 1 << 20))
      ->type_name("N");
  app.add_option("--models", arguments.models_folder, "folder of the models [../models beside the program's folder]")
      ->type_name("DIR");
  app.add_option("--data", arguments.data_folder, "folder of the token files [../data beside the program's folder]")
      ->type_name("DIR");
  app.add_option("--tokenizer", arguments.tokenizer,
                 "tokenizer of models that have no sidecar: bert-base-uncased, gpt2, smollm2, ...")
      ->type_name("NAME");
  app.add_option("--json", arguments.json, "write the results to this file, see benchmarks/results.schema.json")
      ->type_name("FILE");
  app.add_flag("--list", arguments.list, "print the models and workloads found, and stop");

  for (CLI::Option* option : app.get_options()) option->description(wrapped(option->get_description()));

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForVersion&) {
    throw HelpAsked{app.version() + "\n"};
  } catch (const CLI::CallForHelp&) {
    throw HelpAsked{app.help()};
  } catch (const CLI::ParseError& error) {
    throw Failure(fmt::format("{}; llmcache-bench --help lists the options", error.what()));
  }
  std::sort(arguments.modes.begin(), arguments.modes.end(), std::greater<>());  // nocache first
  arguments.modes.erase(std::unique(arguments.modes.begin(), arguments.modes.end()), arguments.modes.end());
  return arguments;
}

}  // namespace llmcache::bench
