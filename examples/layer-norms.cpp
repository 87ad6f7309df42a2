// Prints the norm of a text's hidden states in front of each layer: a hook that looks.
//
//   llmcache-layer-norms --model build/models/minilm.pt --text "The weather is fine"
#include <ATen/ATen.h>
#include <llmcache/llmcache.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;

/// Mean over the tokens of the length of their hidden states.
class PrintNorms final : public llmcache::LayerHook {
 public:
  explicit PrintNorms(std::int64_t layers) : layers_(layers) {}

  llmcache::HookAction at_layer(llmcache::LayerStates& at) override {
    const auto norms = at.states.to(at::kFloat).norm(2, 1);
    const std::string where = at.layer == 0         ? "embedding"
                              : at.layer == layers_ ? "final states"
                                                    : "layer " + std::to_string(at.layer - 1);
    std::printf("behind %-13s %8.3f (tokens: %.3f to %.3f)\n", where.c_str(), norms.mean().item<double>(),
                norms.min().item<double>(), norms.max().item<double>());
    return llmcache::HookAction::kGoOn;
  }

 private:
  std::int64_t layers_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Prints the norm of a text's hidden states between the layers of a model", "llmcache-layer-norms");
  std::string model, text, tokenizer_path, python = default_python(), helper = default_helper().string();
  app.add_option("--model", model, "TorchScript file, such as build/models/minilm.pt")->required();
  app.add_option("--text", text, "what runs through it")->required();
  app.add_option("--tokenizer", tokenizer_path,
                 "tokenizer.json or its folder; left out: tokenizers/NAME beside the model, as its sidecar says");
  app.add_option("--python", python, "a Python that has the package tokenizers");
  app.add_option("--helper", helper, "tokenizer_helper.py");
  CLI11_PARSE(app, argc, argv);
  try {
    Tokenizer tokenizer(python, helper, tokenizer_for(model, tokenizer_path));
    llmcache::Options options;
    options.profile_path = profile_beside(model);
    options.progress = progress_on_terminal();
    llmcache::TorchScriptCache cache = llmcache::load(model, options);
    const auto batch = llmcache::pad({tokenizer.encode(text)});
    cache.forward(batch.inputs(cache.profile()), {.hook = std::make_shared<PrintNorms>(cache.profile().layers)});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-layer-norms: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
