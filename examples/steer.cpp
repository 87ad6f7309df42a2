// Steers what a causal language model writes: the difference between the states of two texts at one layer is added to
// the states of every token of the prompt and the answer (activation addition, arXiv 2308.10248).
//
//   llmcache-steer --model build/models/smollm2.pt --prompt "My day was" --towards "joy" --away-from "grief" --layer 12
#include <ATen/ATen.h>
#include <llmcache/llmcache.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;

/// Adds a vector to the states in front of one layer.
class Add final : public llmcache::LayerHook {
 public:
  Add(std::int64_t layer, at::Tensor vector) : layer_(layer), vector_(std::move(vector)) {}
  bool watches(std::int64_t layer) const override { return layer == layer_; }
  bool writes() const override { return true; }
  llmcache::HookAction at_layer(llmcache::LayerStates& at) override {
    at.states.add_(vector_);
    return llmcache::HookAction::kGoOn;
  }

 private:
  std::int64_t layer_;
  at::Tensor vector_;  ///< [hidden]
};

/// The mean state of a text in front of a layer.
at::Tensor mean_state(llmcache::TorchScriptCache& cache, Tokenizer& tokenizer, const std::string& text,
                      std::int64_t layer) {
  const auto inputs = llmcache::pad({tokenizer.encode(text)}).inputs(cache.profile());
  return at::tensor(cache.pooled_state(inputs, layer).at(0));
}

struct Arguments {
  std::string model, prompt, towards, away_from, tokenizer, python = default_python();
  std::string helper = default_helper().string();
  std::int64_t layer = 0, max_tokens = 40;
  double strength = 4;
};

void run(const Arguments& arguments) {
  Tokenizer tokenizer(arguments.python, arguments.helper, tokenizer_for(arguments.model, arguments.tokenizer));
  llmcache::Options options;
  options.profile_path = profile_beside(arguments.model);
  options.progress = progress_on_terminal();
  llmcache::TorchScriptCache cache = llmcache::load(arguments.model, options);
  const auto write = [&](const char* title) {
    const auto answer =
        llmcache::generate(cache, tokenizer.encode(arguments.prompt),
                           {.max_new_tokens = arguments.max_tokens, .stop_tokens = tokenizer.end_tokens()});
    std::printf("%s:\n%s%s\n", title, arguments.prompt.c_str(), tokenizer.decode(answer.tokens).c_str());
  };
  write("as it is");
  const auto vector = mean_state(cache, tokenizer, arguments.towards, arguments.layer) -
                      mean_state(cache, tokenizer, arguments.away_from, arguments.layer);
  cache.add_hook(std::make_shared<Add>(arguments.layer, arguments.strength * vector));
  write("steered");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Steers generated text by a vector that is added at one layer", "llmcache-steer");
  app.option_defaults()->always_capture_default();  // in --help
  Arguments arguments;
  app.add_option("--model", arguments.model, "TorchScript file, such as build/models/smollm2.pt")->required();
  app.add_option("--prompt", arguments.prompt, "the text to go on from")->required();
  app.add_option("--towards", arguments.towards, "a text with more of what is wanted")->required();
  app.add_option("--away-from", arguments.away_from, "a text with less of it")->required();
  app.add_option("--layer", arguments.layer, "in front of which the vector is added")->required();
  app.add_option("--strength", arguments.strength, "how many times");
  app.add_option("--max-tokens", arguments.max_tokens, "at most so many tokens")->check(CLI::Range(1, 1 << 20));
  app.add_option("--tokenizer", arguments.tokenizer,
                 "tokenizer.json or its folder; left out: tokenizers/NAME beside the model, as its sidecar says");
  app.add_option("--python", arguments.python, "a Python that has the package tokenizers");
  app.add_option("--helper", arguments.helper, "tokenizer_helper.py");
  CLI11_PARSE(app, argc, argv);
  try {
    run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-steer: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
