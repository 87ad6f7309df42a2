// Text in, streamed text out, by a causal language model that is a plain traced forward(input_ids, attention_mask):
// the cache keeps keys and values, so that each step computes one token, and a second question about a passage
// computes only what is new.
//
//   llmcache-generate --model build/models/smollm2.pt --chat --prompt-file passage.txt
//                     --question "Who wrote it?" --question "When?"
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "sampling.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;
using Clock = std::chrono::steady_clock;
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
  Sampling sampling;
  std::uint64_t seed = 0;
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
  app.add_option("--seed", arguments.seed, "of the sampling: equal seeds give equal text");
  app.add_option("--weights", arguments.weights, "as-loaded, packed-fp32 or packed-fp16");
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

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

double percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

void show(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);  // streamed: each piece as it comes
}

/// What one answer cost.
struct Turn {
  std::int64_t prompt_tokens = 0;
  std::int64_t prompt_reused = 0;
  double prefill_ms = 0;
  std::int64_t generated = 0;     // tokens of the answer, the end token not counted
  std::int64_t steps = 0;         // passes behind the first one
  std::int64_t step_tokens = 0;   // of the sequences that these passes were asked about
  std::int64_t steps_reused = 0;  // of these, known
  double decode_ms = 0;           // passes, sampling and text
  const char* stopped = "";
};

class Generator {
 public:
  Generator(Cache& cache, Tokenizer& tokenizer, const Arguments& arguments, std::int64_t context)
      : cache_(cache), tokenizer_(tokenizer), arguments_(arguments), context_(context) {
    if (!cache.profile().causal) {
      throw std::runtime_error("the model is no causal language model: it cannot continue a text");
    }
    ends_ = tokenizer.end_tokens();
    for (const std::string& token : arguments.end_tokens) {
      ends_.push_back(tokenizer.id_of(token));
      if (ends_.back() < 0) throw std::runtime_error("--end-token: the vocabulary has no token '" + token + "'");
    }
  }

  /// Prints the answer while it is made.
  Turn answer(Ids ids) {
    check(ids);
    Turn turn;
    turn.prompt_tokens = static_cast<std::int64_t>(ids.size());
    std::mt19937_64 generator(arguments_.seed);
    auto start = Clock::now();
    at::Tensor logits = forward(ids);
    turn.prefill_ms = ms_since(start);
    turn.prompt_reused = cache_.last_report().sequences.at(0).reused_tokens;
    start = Clock::now();
    for (;;) {
      const std::int64_t next = choose(logits, generator);
      if (std::find(ends_.begin(), ends_.end(), next) != ends_.end()) {
        turn.stopped = "end token";
        break;
      }
      show(tokenizer_.stream(next));
      ids.push_back(next);
      if (++turn.generated == arguments_.max_tokens) {
        turn.stopped = "--max-tokens";
        break;
      }
      if (context_ > 0 && static_cast<std::int64_t>(ids.size()) > context_) {
        turn.stopped = "the model takes no longer sequence";
        break;
      }
      logits = forward(ids);
      const auto report = cache_.last_report();
      turn.step_tokens += report.sequences.at(0).tokens;
      turn.steps_reused += report.sequences.at(0).reused_tokens;
      ++turn.steps;
    }
    show(tokenizer_.finish());
    turn.decode_ms = ms_since(start);
    return turn;
  }

 private:
  void check(const Ids& ids) const {
    if (ids.empty()) throw std::runtime_error("the prompt has no tokens");
    if (context_ > 0 && static_cast<std::int64_t>(ids.size()) > context_) {
      throw std::runtime_error("the prompt has " + std::to_string(ids.size()) + " tokens, the model takes " +
                               std::to_string(context_));
    }
    const auto vocabulary = cache_.profile().vocabulary;
    if (vocabulary > 0 && *std::max_element(ids.begin(), ids.end()) >= vocabulary) {
      throw std::runtime_error("the tokenizer gives ids beyond the model's vocabulary of " +
                               std::to_string(vocabulary) + ": it is another model's");
    }
  }

  /// Logits behind the last token.
  at::Tensor forward(const Ids& ids) {
    const at::Tensor row = at::tensor(ids, at::kLong).unsqueeze(0);
    const auto result =
        cache_.forward(inputs_for(cache_.profile(), row, at::ones_like(row)), {.output = llmcache::Output::kLastToken});
    const at::Tensor logits = first_tensor(result);
    if (logits.dim() != 3 || !logits.is_floating_point()) {
      throw std::runtime_error("the model returns no logits [batch, tokens, vocabulary]");
    }
    return logits.select(1, -1)[0].to(at::kFloat).contiguous();
  }

  std::int64_t choose(const at::Tensor& logits, std::mt19937_64& generator) const {
    return sample({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())}, arguments_.sampling,
                  next_draw(generator));
  }

  Cache& cache_;
  Tokenizer& tokenizer_;
  const Arguments& arguments_;
  std::int64_t context_;
  Ids ends_;
};

void print(const Turn& turn) {
  std::printf("\n\nprefill: %lld tokens, %lld of them known (%.1f %% reused), %.1f ms, %.1f tokens/s\n",
              static_cast<long long>(turn.prompt_tokens), static_cast<long long>(turn.prompt_reused),
              percent(turn.prompt_reused, turn.prompt_tokens), turn.prefill_ms,
              static_cast<double>(turn.prompt_tokens) / turn.prefill_ms * 1000);
  if (turn.steps > 0) {
    std::printf("decode:  %lld tokens, %.1f ms a token, %.1f tokens/s, %.1f %% reused\n",
                static_cast<long long>(turn.steps), turn.decode_ms / static_cast<double>(turn.steps),
                static_cast<double>(turn.steps) / turn.decode_ms * 1000, percent(turn.steps_reused, turn.step_tokens));
  } else {
    std::printf("decode:  none\n");
  }
  std::printf("stopped: %s, after %lld tokens\n", turn.stopped, static_cast<long long>(turn.generated));
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
  Tokenizer tokenizer(
      arguments.python, arguments.helper,
      arguments.tokenizer.empty() ? tokenizer_beside(model) : std::filesystem::path(arguments.tokenizer));
  if (arguments.chat && !tokenizer.has_chat_template()) {
    throw std::runtime_error("--chat: this tokenizer has no chat template");
  }
  Cache cache(std::move(module), {.capacity_bytes = arguments.capacity_mib << 20,
                                  .weights = llmcache::weights_from_string(arguments.weights)});
  Generator generator(cache, tokenizer, arguments, sidecar.max_tokens);

  std::printf("%s (weights: %s), held %s; threads: %d%s\n", model.filename().c_str(),
              sidecar.weights.empty() ? "unknown" : sidecar.weights.c_str(), arguments.weights.c_str(),
              at::get_num_threads(),
              cache.profile().prefix_reuse ? "" : "; prefixes are not reused: llmcache-inspect says why");
  const auto questions = arguments.questions.empty() ? std::vector<std::string>{""} : arguments.questions;
  for (std::size_t i = 0; i < questions.size(); ++i) {
    if (!questions[i].empty()) std::printf("\n== %zu. %s\n", i + 1, questions[i].c_str());
    std::string text = passage;
    if (!questions[i].empty()) text += (passage.empty() ? "" : "\n\n") + questions[i];
    print(generator.answer(arguments.chat ? tokenizer.chat({{"user", text}}) : tokenizer.encode(text)));
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
