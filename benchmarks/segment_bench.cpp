// llmcache-segment-bench: time to first token and quality of prompts made of known passages in a new order, and of
// prompts with an edit, against the lossless reuse of their longest known prefix.
//
// Passages and questions come from a token file of task "answer" (passage, question, answer in each sequence): what
// neighbouring sequences have in common is a passage. The pool is known from earlier prompts: each of its passages was
// in a few of them, among others. Then for each prompt: head, six passages of the pool in random order, a question
// about one of them. Every variant answers the same prompt in turn, in an order that rotates. Quality is that of the
// next token: does the most likely one agree with the lossless run's, and KL(lossless || variant).
//
// The edit: a text of 400 tokens is known, ten of its tokens (from number 40 on) are replaced, and a question follows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/core.h>
#include <torch/script.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "execute/self_check.h"
#include "failure.h"
#include "guarded_main.h"
#include "llmcache/llmcache.h"
#include "llmcache/model/torchscript.h"
#include "machine.h"
#include "prefix_reuse.h"
#include "segment_reuse.h"
#include "statistics.h"
#include "token_file.h"

namespace llmcache::bench {
namespace {

using Clock = std::chrono::steady_clock;
using Tokens = std::vector<std::int64_t>;

struct Arguments {
  std::string model;
  std::string data;
  std::string weights = "as-loaded";
  int threads = 1;
  std::size_t prompts = 40;
  std::size_t pool = 36;
  std::size_t passages = 6;
  std::size_t known_together = 6;
  std::size_t known_times = 4;
  std::uint16_t most_averaged = SegmentOptions{}.most_averaged;
  std::vector<double> shares = {0, 0.1, 0.2, 0.3};
  std::vector<std::int64_t> heads = {4};
  std::vector<std::int32_t> layers = {1};
  /// "Answer the question from the passages below.\n" for SmolLM2.
  Tokens head = {21350, 260, 1962, 429, 260, 14471, 2441, 30, 198};
  std::int64_t end_of_line = 198;
  std::uint64_t seed = 1;
  std::string scored = "last";
};

struct Question {
  Tokens tokens;  ///< up to where the answer begins
  Tokens answer;
};

/// A passage up to its end of line, and questions about it.
struct Item {
  Tokens passage;
  std::vector<Question> questions;
};

std::vector<Item> items_of(const TokenFile& file, std::int64_t end_of_line) {
  std::vector<Item> items;
  for (std::int64_t i = 0; i + 1 < file.sequences(); ++i) {
    const auto a = file.sequence(i);
    const auto b = file.sequence(i + 1);
    auto common = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first;
    while (common != a.begin() && *(common - 1) != end_of_line) --common;
    if (common == a.begin()) continue;
    const Tokens passage(a.begin(), common);
    if (items.empty() || items.back().passage != passage) items.push_back({passage, {}});
    const TokenRange& answer = file.scored[static_cast<std::size_t>(i)];
    if (answer.begin == answer.end) continue;  // cut off
    items.back().questions.push_back(
        {{common, a.begin() + answer.begin}, {a.begin() + answer.begin, a.begin() + answer.end}});
  }
  return items;
}

/// A model, and both ways to reuse what is known of a prompt.
class Bed {
 public:
  explicit Bed(const Arguments& arguments) : weights_(weights_from_string(arguments.weights)) {
    Options options;
    options.weights = weights_;
    model_ = ModelTraits<torch::jit::Module>::wrap(torch::jit::load(arguments.model), options);
    inputs_ = model_->input_spec();
    model_->describe(profile_);
    output_ = probe(*model_, inputs_, {}, profile_);
    self_check(*model_, inputs_, output_, profile_);
    constexpr std::size_t kCapacity = std::size_t{6} << 30;
    const auto start = Clock::now();
    SegmentOptions settings;
    settings.most_averaged = arguments.most_averaged;
    segments_ = std::make_unique<SegmentReuse>(*model_, inputs_, output_, profile_, settings, kCapacity);
    fmt::print("wrapping for segments: {:.0f} ms; keys {}\n",
               std::chrono::duration<double, std::milli>(Clock::now() - start).count(),
               segments_->positions().movable ? "can be moved" : segments_->positions().why);
    prefixes_ = std::make_unique<PrefixReuse>(*model_, inputs_, output_, profile_, PrefixOptions{}, kCapacity);
  }

  void keep(const Tokens& tokens) {
    ForwardReport report;
    const Batch batch = batch_of(tokens);
    segments_->keep(batch, "", report);
    run_prefix(batch, "", Output::kLastToken, report);
  }

  struct Answer {
    at::Tensor logits;  ///< of the last tokens, `[tokens, vocabulary]`
    double ms = 0;
    double computed = 0;  ///< share of token-layers
  };

  /// With the logits of the last `wanted` tokens.
  Answer lossless(const Tokens& tokens, bool known, std::int64_t wanted) {
    const Batch batch = batch_of(tokens);
    ForwardReport report;
    const auto start = Clock::now();
    // A tenant that knows nothing computes everything.
    const auto result = run_prefix(batch, known ? "" : fmt::format("{}", ++nobody_), output_for(wanted), report);
    return answer(result, start, report, wanted);
  }

  Answer reused(const Tokens& tokens, const SegmentSettings& settings, std::int64_t wanted) {
    const Batch batch = batch_of(tokens);
    ForwardReport report;
    const auto start = Clock::now();
    auto matches = segments_->find(batch, "", settings);
    const auto result = segments_->run(batch, "", std::move(matches), settings, output_for(wanted), report);
    return answer(result, start, report, wanted);
  }

 private:
  /// With what it computes kept.
  c10::IValue run_prefix(const Batch& batch, const std::string& tenant, Output output, ForwardReport& report) {
    KeptLater kept;
    std::vector<PrefixUse> uses;
    auto result = prefixes_->run(batch, tenant, output, report, kept, uses);
    kept.commit();
    return result;
  }

  [[nodiscard]] Batch batch_of(const Tokens& tokens) const {
    const auto ids = at::tensor(tokens, at::TensorOptions().dtype(at::kLong)).unsqueeze(0);
    Inputs inputs;
    for (std::size_t i = 0; i < inputs_.names.size(); ++i) {
      inputs.emplace_back(static_cast<int>(i) == profile_.ids_argument ? ids : at::ones_like(ids));
    }
    return check_batch(inputs, inputs_, profile_, model_->device());
  }

  static Output output_for(std::int64_t wanted) { return wanted == 1 ? Output::kLastToken : Output::kAll; }

  static Answer answer(const c10::IValue& result, Clock::time_point start, const ForwardReport& report,
                       std::int64_t wanted) {
    const double ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    const auto& logits = result.isTuple() ? result.toTupleRef().elements()[0].toTensor() : result.toTensor();
    return {logits[0].narrow(0, logits.size(1) - wanted, wanted).to(at::kDouble), ms, report.computed_fraction()};
  }

  Weights weights_;
  std::unique_ptr<Model> model_;
  InputSpec inputs_;
  ModelProfile profile_;
  OutputSpec output_;
  std::unique_ptr<SegmentReuse> segments_;
  std::unique_ptr<PrefixReuse> prefixes_;
  std::uint64_t nobody_ = 0;
};

/// What one way to answer did, prompt by prompt.
struct Variant {
  std::string name;
  SegmentSettings settings;
  std::vector<double> ms, kl, agree, computed;

  void add(const Bed::Answer& answer, const Bed::Answer& reference) {
    ms.push_back(answer.ms);
    computed.push_back(answer.computed);
    const auto p = at::log_softmax(reference.logits, 1);
    const auto q = at::log_softmax(answer.logits, 1);
    const auto divergence = (p.exp() * (p - q)).sum(1).contiguous();
    const auto same = p.argmax(1).eq(q.argmax(1)).to(at::kDouble).contiguous();
    const auto n = static_cast<std::size_t>(same.size(0));
    kl.insert(kl.end(), divergence.const_data_ptr<double>(), divergence.const_data_ptr<double>() + n);
    agree.insert(agree.end(), same.const_data_ptr<double>(), same.const_data_ptr<double>() + n);
  }
};

std::vector<Variant> variants_of(const Arguments& arguments) {
  std::vector<Variant> variants;
  for (const std::int32_t layer : arguments.layers) {
    for (const std::int64_t head : arguments.heads) {
      for (const double share : arguments.shares) {
        Variant& variant = variants.emplace_back();
        variant.name = fmt::format("share {:.2f}, head {}, layer {}", share, head, layer);
        variant.settings.recompute_share = share;
        variant.settings.head_tokens = head;
        variant.settings.choosing_layer = layer;
        variant.settings.keep = false;
      }
    }
  }
  return variants;
}

void print(const std::string& title, const std::vector<Variant>& variants, const std::vector<double>& full_ms,
           const std::vector<double>& prefix_ms) {
  fmt::print("\n{}\n{:34} {:>9} {:>9} {:>9} {:>9} {:>16} {:>9}\n", title, "", "ms (p50)", "against", "computed",
             "top-1", "95 % interval", "KL");
  if (!full_ms.empty()) fmt::print("{:34} {:9.1f}\n", "nothing known", median(full_ms));
  fmt::print("{:34} {:9.1f} {:>8}x\n", "longest known prefix (lossless)", median(prefix_ms), 1);
  for (const Variant& variant : variants) {
    std::vector<double> ratios;
    for (std::size_t i = 0; i < variant.ms.size(); ++i) ratios.push_back(prefix_ms[i] / variant.ms[i]);
    const double agreement = mean(variant.agree);
    const auto count = static_cast<std::int64_t>(variant.agree.size());
    const Interval interval =
        wilson(static_cast<std::int64_t>(std::lround(agreement * static_cast<double>(count))), count);
    fmt::print("{:34} {:9.1f} {:8.2f}x {:9.3f} {:9.3f} {:>8.3f}-{:.3f} {:11.4f}\n", variant.name, median(variant.ms),
               median(ratios), mean(variant.computed), agreement, interval.low, interval.high, mean(variant.kl));
  }
}

class Bench {
 public:
  explicit Bench(const Arguments& arguments) : arguments_(arguments), random_(arguments.seed), bed_(arguments) {
    auto all = items_of(read_token_file(arguments.data), arguments.end_of_line);
    std::erase_if(all, [](const Item& item) {
      return item.questions.empty() || item.passage.size() < 60 || item.passage.size() > 120;
    });
    std::shuffle(all.begin(), all.end(), random_);
    if (all.size() < arguments.pool || arguments.pool < arguments.passages) {
      throw Failure(fmt::format("{} passages of 60 to 120 tokens in {}, {} are wanted; use a smaller --pool",
                                all.size(), arguments.data, arguments.pool));
    }
    items_.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(arguments.pool));
  }

  void passages() {
    for (std::size_t time = 0; time < arguments_.known_times; ++time) {
      std::shuffle(items_.begin(), items_.end(), random_);
      for (std::size_t i = 0; i < items_.size();) {
        Tokens tokens = arguments_.head;
        const std::size_t end = std::min(i + arguments_.known_together, items_.size());
        for (; i < end; ++i) append(tokens, items_[i].passage);
        bed_.keep(tokens);
      }
    }
    measure(fmt::format("{} passages in random order, then a question", arguments_.passages), [this] {
      std::vector<std::size_t> order(items_.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random_);
      order.resize(arguments_.passages);
      Tokens tokens = arguments_.head;
      for (const std::size_t i : order) append(tokens, items_[i].passage);
      return asked(std::move(tokens), items_[order[random_() % order.size()]]);
    });
  }

  void edits() {
    measure("10 tokens replaced early in a known text of 400 tokens, then a question", [this] {
      constexpr std::size_t kText = 400;
      constexpr std::size_t kFrom = 40;
      constexpr std::size_t kEdited = 10;
      Tokens tokens = arguments_.head;
      const Item* item = nullptr;
      while (tokens.size() < kText) {
        item = &items_[random_() % items_.size()];
        append(tokens, item->passage);
      }
      tokens.resize(kText);
      bed_.keep(tokens);
      const Tokens& other = items_[random_() % items_.size()].passage;
      std::copy_n(other.begin() + 20, kEdited, tokens.begin() + kFrom);
      return asked(std::move(tokens), *item);
    });
  }

 private:
  static void append(Tokens& tokens, const Tokens& more) { tokens.insert(tokens.end(), more.begin(), more.end()); }

  /// With a question behind it, and how many of the last tokens are scored.
  std::pair<Tokens, std::size_t> asked(Tokens tokens, const Item& item) {
    const Question& question = item.questions[random_() % item.questions.size()];
    append(tokens, question.tokens);
    if (arguments_.scored != "answer") return {std::move(tokens), all_scored() ? question.tokens.size() : 1};
    // The answer's first token is told by the question's last.
    tokens.insert(tokens.end(), question.answer.begin(), question.answer.end() - 1);
    return {std::move(tokens), question.answer.size()};
  }
  [[nodiscard]] bool all_scored() const { return arguments_.scored != "last"; }

  template <class Make>
  void measure(const std::string& title, Make make) {
    auto variants = variants_of(arguments_);
    std::vector<double> full_ms, prefix_ms, tokens;
    for (std::size_t i = 0; i < arguments_.prompts + 1; ++i) {
      const auto [prompt, scored] = make();
      const auto wanted = static_cast<std::int64_t>(scored);
      const auto prefix = bed_.lossless(prompt, true, wanted);
      const auto full = all_scored() ? prefix : bed_.lossless(prompt, false, wanted);
      std::vector<Bed::Answer> answers(variants.size());
      for (std::size_t k = 0; k < variants.size(); ++k) {
        const std::size_t v = (k + i) % variants.size();
        answers[v] = bed_.reused(prompt, variants[v].settings, wanted);
      }
      if (i == 0) continue;  // warm-up
      tokens.push_back(static_cast<double>(prompt.size()));
      if (!all_scored()) full_ms.push_back(full.ms);
      prefix_ms.push_back(prefix.ms);
      for (std::size_t v = 0; v < variants.size(); ++v) variants[v].add(answers[v], full);
    }
    print(fmt::format("{}: {} prompts of {:.0f} tokens (mean)", title, tokens.size(), mean(tokens)), variants, full_ms,
          prefix_ms);
    std::fflush(stdout);
  }

  const Arguments arguments_;
  std::mt19937_64 random_;
  Bed bed_;
  std::vector<Item> items_;
};

int run(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("Prompts made of known passages in a new order, and edited ones: time to first token and quality.");
  app.add_option("--model", arguments.model, "TorchScript file of a causal model")->required();
  app.add_option("--data", arguments.data, "token file of task answer, of the model's tokenizer")->required();
  app.add_option("--weights", arguments.weights, "as-loaded, packed-fp32 or packed-fp16");
  app.add_option("--threads", arguments.threads);
  app.add_option("--prompts", arguments.prompts, "of each kind");
  app.add_option("--pool", arguments.pool, "passages that are known");
  app.add_option("--passages", arguments.passages, "of a prompt");
  app.add_option("--known-together", arguments.known_together, "of each prompt that the pool is known from")
      ->check(CLI::PositiveNumber);
  app.add_option("--known-times", arguments.known_times, "each passage is in so many of these prompts")
      ->check(CLI::PositiveNumber);
  app.add_option("--most-averaged", arguments.most_averaged, "SegmentOptions::most_averaged");
  app.add_option("--shares", arguments.shares, "SegmentSettings::recompute_share")->delimiter(',');
  app.add_option("--heads", arguments.heads, "SegmentSettings::head_tokens")->delimiter(',');
  app.add_option("--layers", arguments.layers, "SegmentSettings::choosing_layer")->delimiter(',');
  app.add_option("--head", arguments.head, "ids in front of every prompt (default: of SmolLM2's)")->delimiter(',');
  app.add_option("--end-of-line", arguments.end_of_line, "id between passage and question (default: of SmolLM2's)");
  app.add_option("--seed", arguments.seed);
  app.add_option("--scored", arguments.scored,
                 "whose next token is compared: the last token's (first token of the answer), those of all tokens of "
                 "the question, or those that tell the true answer")
      ->check(CLI::IsMember({"last", "question", "answer"}));
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(arguments.threads);
  const c10::InferenceMode inference;
  const Machine machine = this_machine();
  fmt::print("{}, {} threads, LibTorch {}, {}; weights {}\n", machine.cpu, arguments.threads, TORCH_VERSION, compiler(),
             arguments.weights);
  Bench bench(arguments);
  bench.passages();
  bench.edits();
  return 0;
}

}  // namespace
}  // namespace llmcache::bench

int main(int argc, char** argv) {
  return llmcache::bench::guarded_main("llmcache-segment-bench", argc, argv, llmcache::bench::run);
}
