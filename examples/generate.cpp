// Text in, streamed text out, by a causal language model that is a plain traced forward(input_ids, attention_mask):
// the cache keeps keys and values, so that each step computes one token, and a second question about a passage
// computes only what is new.
//
//   llmcache-generate --model build/models/smollm2.pt --chat --prompt-file passage.txt
//                     --question "Who wrote it?" --question "When?"
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;
using Ids = std::vector<std::int64_t>;

struct Arguments {
  std::string model;
  std::string tokenizer;
  std::string prompt;
  std::string prompt_file;
  std::vector<std::string> questions;
  bool chat = false;
  std::int64_t max_tokens = 64;
  std::vector<std::string> end_tokens;
  llmcache::Sampling sampling;
  std::string weights = "as-loaded";
  std::size_t capacity_mib = 512;
  int threads = 0;
  std::string python = default_python();
  std::string helper = default_helper().string();
};

void declare(CLI::App& app, Arguments& arguments) {
  app.option_defaults()->always_capture_default();  // in --help
  app.add_option("--model", arguments.model, "TorchScript file, such as build/models/smollm2.pt")->required();
  app.add_option("--tokenizer", arguments.tokenizer,
                 "tokenizer.json or its folder; left out: tokenizers/NAME beside the model, as its sidecar says");
  auto* prompt = app.add_option("--prompt", arguments.prompt, "the text to go on from, or the passage to ask about");
  app.add_option("--prompt-file", arguments.prompt_file, "the same, from a file")->excludes(prompt);
  app.add_option("--question", arguments.questions,
                 "may be given several times: each is put behind the prompt, and answered by itself")
      ->allow_extra_args(false);
  app.add_flag("--chat", arguments.chat, "put prompt and question through the tokenizer's chat template");
  app.add_option("--max-tokens", arguments.max_tokens, "at most so many tokens an answer")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--end-token", arguments.end_tokens, "stop here too, beside the tokenizer's own end token")
      ->allow_extra_args(false);
  app.add_option("--temperature", arguments.sampling.temperature, "0: always the most probable token");
  app.add_option("--top-k", arguments.sampling.top_k, "sample from the K most probable tokens only; 0: all");
  app.add_option("--top-p", arguments.sampling.top_p,
                 "sample from the most probable tokens that have probability P together");
  app.add_option("--seed", arguments.sampling.seed, "of the sampling: equal seeds give equal text");
  app.add_option("--weights", arguments.weights,
                 "as-loaded, packed-fp32, packed-fp16, packed-bf16, packed-int8 or fastest");
  app.add_option("--capacity-mib", arguments.capacity_mib, "room for what the cache keeps")
      ->check(CLI::Range(0, 1 << 20));
  app.add_option("--threads", arguments.threads, "of LibTorch; 0: as it likes")->check(CLI::Range(0, 1024));
  app.add_option("--python", arguments.python, "a Python that has the package tokenizers");
  app.add_option("--helper", arguments.helper, "tokenizer_helper.py");
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("there is no file " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

double percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

void show(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);  // streamed: each piece as it comes
}

/// Ids at which an answer ends: the tokenizer's own, and those asked for.
Ids end_tokens(Tokenizer& tokenizer, const Arguments& arguments) {
  Ids ends = tokenizer.end_tokens();
  for (const std::string& token : arguments.end_tokens) {
    ends.push_back(tokenizer.id_of(token));
    if (ends.back() < 0) throw std::runtime_error("--end-token: the vocabulary has no token '" + token + "'");
  }
  return ends;
}

/// Prints the answer while it is made, and then what it cost.
void answer(Cache& cache, Tokenizer& tokenizer, const llmcache::GenerateOptions& options, const Ids& prompt) {
  const auto result = llmcache::generate(cache, prompt, options, [&](std::int64_t token) {
    show(tokenizer.stream(token));
    return true;
  });
  show(tokenizer.finish());
  std::printf("\n\nprefill: %lld tokens, %lld of them known (%.1f %% reused), %.1f ms, %.1f tokens/s\n",
              static_cast<long long>(result.prompt_tokens), static_cast<long long>(result.prompt_reused),
              percent(result.prompt_reused, result.prompt_tokens), result.prefill_ms,
              static_cast<double>(result.prompt_tokens) / result.prefill_ms * 1000);
  if (result.steps > 0) {
    std::printf("decode:  %lld tokens, %.1f ms a token, %.1f tokens/s\n", static_cast<long long>(result.steps),
                result.decode_ms / static_cast<double>(result.steps),
                static_cast<double>(result.steps) / result.decode_ms * 1000);
  } else {
    std::printf("decode:  none\n");
  }
  const char* stopped = result.stopped == llmcache::StopReason::kMaxNewTokens ? "--max-tokens"
                        : result.stopped == llmcache::StopReason::kMaxTokens  ? "the model takes no longer sequence"
                                                                              : "end token";
  std::printf("stopped: %s, after %zu tokens\n", stopped, result.tokens.size());
  std::fflush(stdout);
}

void run(const Arguments& arguments) {
  if (arguments.threads > 0) at::set_num_threads(arguments.threads);
  const std::filesystem::path model = arguments.model;
  const Sidecar sidecar = read_sidecar(model);
  std::string passage = arguments.prompt_file.empty() ? arguments.prompt : read_text(arguments.prompt_file);
  if (passage.empty() && arguments.questions.empty()) {
    throw std::runtime_error("nothing to go on from: give --prompt, --prompt-file or --question");
  }
  auto module = load_module(model);
  Tokenizer tokenizer(arguments.python, arguments.helper, tokenizer_for(model, arguments.tokenizer));
  if (arguments.chat && !tokenizer.has_chat_template()) {
    throw std::runtime_error("--chat: this tokenizer has no chat template");
  }
  const llmcache::GenerateOptions options = {.max_new_tokens = arguments.max_tokens,
                                             .stop_tokens = end_tokens(tokenizer, arguments),
                                             .sampling = arguments.sampling,
                                             .max_tokens = sidecar.max_tokens};
  llmcache::Options chosen;
  chosen.capacity_bytes = arguments.capacity_mib << 20;
  chosen.weights = llmcache::weights_from_string(arguments.weights);
  chosen.profile_path = profile_beside(model, chosen.weights);
  chosen.progress = progress_on_terminal();
  Cache cache(std::move(module), chosen);

  std::printf("%s (weights: %s), held %s; threads: %d%s\n", model.filename().c_str(),
              sidecar.weights.empty() ? "unknown" : sidecar.weights.c_str(), arguments.weights.c_str(),
              at::get_num_threads(),
              cache.profile().prefix_reuse ? "" : "; prefixes are not reused: llmcache-inspect says why");
  const auto questions = arguments.questions.empty() ? std::vector<std::string>{""} : arguments.questions;
  for (std::size_t i = 0; i < questions.size(); ++i) {
    if (!questions[i].empty()) std::printf("\n== %zu. %s\n", i + 1, questions[i].c_str());
    std::string text = passage;
    if (!questions[i].empty()) text += (passage.empty() ? "" : "\n\n") + questions[i];
    answer(cache, tokenizer, options, arguments.chat ? tokenizer.chat({{"user", text}}) : tokenizer.encode(text));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Continues a text, or answers questions about it, with a language model wrapped in an LLMCache.");
  Arguments arguments;
  declare(app, arguments);
  try {
    app.parse(argc, argv);
    arguments.sampling.validate();
    if (arguments.sampling.temperature == 0 && (arguments.sampling.top_k != 0 || arguments.sampling.top_p != 1)) {
      throw std::invalid_argument("top_k and top_p need a temperature above 0: at 0 the most probable token is taken");
    }
    llmcache::weights_from_string(arguments.weights);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-generate: error: %s\n", error.what());
    return 2;
  }
  try {
    run(arguments);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "llmcache-generate: error: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
