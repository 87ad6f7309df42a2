// Labels texts with the most similar of a few descriptions, by an encoder such as MiniLM: nothing is trained. Texts
// come in batches of different lengths, of which the cache computes no padding.
//
//   llmcache-classify --model build/models/minilm.pt --label "sports: a match, a team, a player"
//                     --label "business: companies, markets, money" --text "Rovers win the cup"
//
// How good the labels are is a matter of the encoder and of the descriptions: with --labelled it is counted.
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "model.h"
#include "sidecar.h"
#include "tokenizer.h"

namespace {

using namespace llmcache::examples;
using Clock = std::chrono::steady_clock;
using Ids = std::vector<std::int64_t>;

struct Arguments {
  std::string model;
  std::string tokenizer;
  std::vector<std::string> labels;
  std::string labels_file;
  std::vector<std::string> texts;
  std::string texts_file;
  bool labelled = false;
  bool compare = false;
  bool quiet = false;
  std::size_t batch = 8;
  std::int64_t max_tokens = 256;
  std::string weights = "as-loaded";
  int threads = 0;
  std::string python = default_python();
  std::string helper = default_helper().string();
};

void declare(CLI::App& app, Arguments& arguments) {
  app.option_defaults()->always_capture_default();  // in --help
  app.add_option("--model", arguments.model, "TorchScript file of an encoder, such as build/models/minilm.pt")
      ->required();
  app.add_option("--tokenizer", arguments.tokenizer,
                 "tokenizer.json or its folder; left out: tokenizers/NAME beside the model, as its sidecar says");
  app.add_option("--label", arguments.labels, "\"NAME: what such a text is about\"; two or more")
      ->allow_extra_args(false);
  app.add_option("--labels", arguments.labels_file, "a file of them, one a line");
  app.add_option("--text", arguments.texts, "a text to label; may be given several times")->allow_extra_args(false);
  app.add_option("--texts", arguments.texts_file, "a file of them, one a line");
  app.add_flag("--labelled", arguments.labelled,
               "each text begins with its right label and a tab: counts how many are found");
  app.add_flag("--compare", arguments.compare, "run the plain module on the same padded batches too");
  app.add_flag("--quiet", arguments.quiet, "print the sums only, not the texts");
  app.add_option("--batch", arguments.batch, "texts in a batch")->check(CLI::Range(1, 4096));
  app.add_option("--max-tokens", arguments.max_tokens, "longer texts are cut")->check(CLI::Range(1, 1 << 16));
  app.add_option("--weights", arguments.weights,
                 "as-loaded, packed-fp32, packed-fp16, packed-bf16, packed-int8 or fastest");
  app.add_option("--threads", arguments.threads, "of LibTorch; 0: as it likes")->check(CLI::Range(0, 1024));
  app.add_option("--python", arguments.python, "a Python that has the package tokenizers");
  app.add_option("--helper", arguments.helper, "tokenizer_helper.py");
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// `lines`, and those of the file; empty ones are left out.
std::vector<std::string> with_lines_of(std::vector<std::string> lines, const std::string& path) {
  if (path.empty()) return lines;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("there is no file " + path);
  for (std::string line; std::getline(file, line);) {
    if (!line.empty()) lines.push_back(line);
  }
  return lines;
}

/// What stands before and behind the first `mark`; both the whole text if there is none.
std::pair<std::string, std::string> split(const std::string& text, char mark) {
  const auto at = text.find(mark);
  if (at == std::string::npos) return {text, text};
  const auto begin = text.find_first_not_of(' ', at + 1);
  return {text.substr(0, at), begin == std::string::npos ? "" : text.substr(begin)};
}

/// Unit vectors of texts, by the cache; and what that took.
class Embedder {
 public:
  Embedder(Cache& cache, torch::jit::Module* plain, Tokenizer& tokenizer, std::int64_t max_tokens)
      : cache_(cache), plain_(plain), tokenizer_(tokenizer), max_tokens_(max_tokens) {}

  struct Sums {
    std::size_t batches = 0;
    std::int64_t real = 0;      // tokens of the texts
    std::int64_t padded = 0;    // what a padded batch has
    std::int64_t computed = 0;  // what the cache ran through the layers; a whole pass counts a token once
    double ms = 0;
    double plain_ms = 0;
    double difference = 0;  // largest between an element of the cache's and of the plain module's vectors
  };

  /// [texts, hidden]
  at::Tensor embed(const std::vector<std::string>& texts) {
    std::vector<Ids> rows;
    for (const std::string& text : texts) {
      rows.push_back(tokenizer_.encode(text, max_tokens_));
      if (rows.back().empty()) throw std::runtime_error("'" + text + "' has no tokens");
    }
    for (const Ids& row : rows) sums.real += static_cast<std::int64_t>(row.size());
    const auto batch = llmcache::pad(rows);
    const auto inputs = batch.inputs(cache_.profile());
    const auto start = Clock::now();
    const auto result = cache_.forward(inputs);
    sums.ms += ms_since(start);
    ++sums.batches;
    sums.padded += batch.ids.numel();
    sums.computed += computed(batch.ids.numel());
    const at::Tensor vectors = pooled(first_tensor(result), batch.mask);
    if (plain_ != nullptr) compare(inputs, batch.mask, vectors);
    return vectors;
  }

  Sums sums;

 private:
  std::int64_t computed(std::int64_t padded) const {
    const auto report = cache_.last_report();
    if (report.execution == llmcache::Execution::kDense) return padded;
    std::int64_t token_layers = 0;
    for (const auto& sequence : report.sequences) {
      for (const auto& layer : sequence.layers) token_layers += layer.computed;
    }
    return token_layers / std::max<std::int64_t>(cache_.profile().layers, 1);
  }

  /// The model's own vector of a text, or the mean of its real tokens' states; at unit length.
  static at::Tensor pooled(const at::Tensor& output, const at::Tensor& mask) {
    if (!output.is_floating_point() || (output.dim() != 2 && output.dim() != 3)) {
      throw std::runtime_error("the model returns neither [batch, hidden] nor [batch, tokens, hidden]");
    }
    at::Tensor vectors = output.to(at::kFloat);
    if (vectors.dim() == 3) {
      const at::Tensor real = mask.unsqueeze(-1).to(at::kFloat);
      vectors = (vectors * real).sum(1) / real.sum(1);
    }
    if (!vectors.isfinite().all().item<bool>()) throw std::runtime_error("the model returns NaN or infinity");
    return vectors / vectors.norm(2, {1}, /*keepdim=*/true).clamp_min(1e-12);
  }

  void compare(const llmcache::Inputs& inputs, const at::Tensor& mask, const at::Tensor& vectors) {
    const at::NoGradGuard no_grad;
    const auto start = Clock::now();
    const auto result = plain_->forward(inputs);
    sums.plain_ms += ms_since(start);
    const auto difference = (pooled(first_tensor(result), mask) - vectors).abs().max().item<double>();
    sums.difference = std::max(sums.difference, difference);
  }

  Cache& cache_;
  torch::jit::Module* plain_;
  Tokenizer& tokenizer_;
  std::int64_t max_tokens_;
};

void print(const Embedder::Sums& sums, std::size_t texts, bool compare) {
  std::printf(
      "%zu texts in %zu batches: %lld tokens computed, %lld with padding (%lld real); %.1f ms, %.2f ms a text\n", texts,
      sums.batches, static_cast<long long>(sums.computed), static_cast<long long>(sums.padded),
      static_cast<long long>(sums.real), sums.ms, sums.ms / static_cast<double>(texts));
  if (!compare) return;
  std::printf(
      "plain module on the padded batches: %.1f ms, %.2f times as long; largest difference of a vector's element "
      "%.1e\n",
      sums.plain_ms, sums.plain_ms / sums.ms, sums.difference);
}

void run(const Arguments& arguments) {
  if (arguments.threads > 0) at::set_num_threads(arguments.threads);
  const std::filesystem::path model = arguments.model;
  const Sidecar sidecar = read_sidecar(model);
  std::vector<std::string> names;
  std::vector<std::string> descriptions;
  for (const std::string& line : with_lines_of(arguments.labels, arguments.labels_file)) {
    const auto [name, description] = split(line, ':');
    names.push_back(name);
    descriptions.push_back(description);
  }
  if (names.size() < 2) throw std::runtime_error("two labels or more are needed; give them by --label or --labels");
  const auto lines = with_lines_of(arguments.texts, arguments.texts_file);
  if (lines.empty()) throw std::runtime_error("there is no text to label; give some by --text or --texts");

  auto module = load_module(model);
  Tokenizer tokenizer(arguments.python, arguments.helper, tokenizer_for(model, arguments.tokenizer));
  const auto weights = llmcache::weights_from_string(arguments.weights);
  Cache cache(module, {.weights = weights, .profile_path = profile_beside(model, weights)});
  if (cache.profile().causal) throw std::runtime_error("the model is a causal one, expected an encoder");
  const auto max_tokens =
      sidecar.max_tokens > 0 ? std::min(arguments.max_tokens, sidecar.max_tokens) : arguments.max_tokens;
  Embedder embedder(cache, arguments.compare ? &module : nullptr, tokenizer, max_tokens);
  const at::Tensor labels = embedder.embed(descriptions);
  embedder.sums = {};  // of the texts only

  std::size_t right = 0;
  for (std::size_t first = 0; first < lines.size(); first += arguments.batch) {
    const std::size_t count = std::min(arguments.batch, lines.size() - first);
    std::vector<std::string> wanted;
    std::vector<std::string> texts;
    for (std::size_t i = first; i < first + count; ++i) {
      auto [label, text] = split(lines[i], arguments.labelled ? '\t' : '\0');
      if (arguments.labelled && std::find(names.begin(), names.end(), label) == names.end()) {
        throw std::runtime_error("'" + lines[i] + "' begins with none of the labels and a tab");
      }
      wanted.push_back(std::move(label));
      texts.push_back(std::move(text));
    }
    const at::Tensor similarities = at::matmul(embedder.embed(texts), labels.t());
    const auto two_best = at::topk(similarities, 2, 1);
    const at::Tensor& best = std::get<0>(two_best);
    const at::Tensor& chosen = std::get<1>(two_best);
    for (std::size_t i = 0; i < count; ++i) {
      const auto row = static_cast<std::int64_t>(i);
      const auto name_of = [&](std::int64_t rank) {
        return names[static_cast<std::size_t>(chosen[row][rank].item<std::int64_t>())];
      };
      const std::string name = name_of(0);
      right += name == wanted[i] ? 1 : 0;
      if (arguments.quiet) continue;
      std::printf("%-20s %6.3f  (next: %s %.3f)  %s\n", name.c_str(), best[row][0].item<double>(), name_of(1).c_str(),
                  best[row][1].item<double>(), texts[i].c_str());
    }
  }
  print(embedder.sums, lines.size(), arguments.compare);
  if (arguments.labelled) {
    std::printf("right label: %zu of %zu (%.1f %%)\n", right, lines.size(),
                100.0 * static_cast<double>(right) / static_cast<double>(lines.size()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Labels texts with the most similar description, by an encoder wrapped in an LLMCache. Nothing is trained.");
  Arguments arguments;
  declare(app, arguments);
  try {
    app.parse(argc, argv);
    llmcache::weights_from_string(arguments.weights);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llmcache-classify: error: %s\n", error.what());
    return 2;
  }
  try {
    run(arguments);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "llmcache-classify: error: %s\n", one_line(error).c_str());
    return 1;
  }
  return 0;
}
